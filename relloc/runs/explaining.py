"""Explains mistakes on the command line.

Each gets one message, which names the setting and what to write instead.
"""

import contextlib
import difflib
import re
import sys
from collections.abc import Sequence

from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from relloc.errors import UsageError
from relloc.runs import settings
from relloc.runs.command_line import as_value, values
from relloc.runs.renamed import nearest_old_name, new_name, usual_name

# Groups whose settings are not only read by relloc, or where a word may stand for a number, such as
# launcher.processes=auto
_FREE = ("launcher", "hydra", "tracking")
# Below these, Hydra, sbatch or submitit decide which settings there are
_FREE_TO_ADD = ("hydra.", "hydra/", "launcher.additional_parameters", "launcher.submitit")


def explain(error: Exception, command: str) -> str | None:
    """Returns one message for a user's mistake, or None for an error that is none.

    `command` is the name of the command, such as `train`.
    """
    if isinstance(error, InstantiationException):
        return _explain_call(error)
    if isinstance(error, MissingConfigException):
        missing_file = error.missing_cfg_file or ""
        group, slash, member = missing_file.rpartition("/")
        if slash:
            return no_member(group, member)
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key
        return f"{key} is not set: give {key}=VALUE (see --help {key})"
    # Hydra has one class for all errors of composing; its message tells which one this is.
    preset = re.match(r"In 'experiment/(.+?)': Could not override", str(error))
    if isinstance(error, ConfigCompositionException) and preset:
        return _preset_of_another(preset[1], command) or str(error)
    unknown = re.match(r"Could not override '(.+?)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        if unknown[1] == "experiment" and command == "prepare":
            return _prepare_takes_data(sys.argv[1:])
        return no_setting(unknown[1], command, sys.argv[1:])
    return str(error)


def _preset_of_another(preset: str, command: str) -> str | None:
    """Explains a preset of another command, as in `relloc.evaluate experiment=card2022`.

    Returns None where no command has the preset.
    """
    for other in settings.COMMANDS:
        if other != command:
            with contextlib.suppress(HydraException, OmegaConfBaseException):
                settings.compose(other, [f"experiment={preset}"])
                return (
                    f"experiment={preset} is a preset of relloc.{other}, not of relloc.{command}: "
                    f"start python -m relloc.{other} experiment={preset}"
                )
    return None


def no_member(group: str, wrong: str) -> str:
    """Returns the message for a member that does not exist, such as `data=imagenet`.

    It proposes a member with a similar name, and those whose descriptions contain the word.
    """
    if group == "eval" and wrong in ("none", "null"):
        return f"there is no eval={wrong}: write eval=[] for no evaluation"
    known = settings.members(group)
    meant = difflib.get_close_matches(wrong, known, n=1)
    # Shorter words are found in too many descriptions.
    if len(wrong) > 3:
        for member in known:
            first_line = "".join(settings.about(f"{group}/{member}")[:1])
            if wrong.lower() in first_line.lower():
                meant.append(member)
    hint = f"Did you mean {' or '.join(sorted(set(meant)))}? " if meant else ""
    return f"there is no {group}={wrong}. {hint}There are {', '.join(known)}"


def check_members(overrides: Sequence[Override]) -> None:
    """Raises `UsageError` for members that Hydra itself does not refuse with a clear message.

    Hydra ignores a `recipe` or `probe` that does not exist, since these are optional, and can't
    read `eval=null`.
    """
    for override in overrides:
        group = override.key_or_group
        if override.is_delete():
            continue
        if group == "eval" and None in values(override):
            raise UsageError(no_member(group, "null"))
        if group in settings.CHOSEN_BY_DATA:
            for value in values(override):
                if isinstance(value, str) and settings.file_of(f"{group}/{value}") is None:
                    raise UsageError(no_member(group, value))


def _explain_call(error: InstantiationException) -> str | None:
    """Explains why a `_target_` could not be called; None if the settings are not the reason."""
    cause = error.__cause__
    if isinstance(cause, ValueError):
        return str(cause)
    if not isinstance(cause, TypeError):
        return None
    # A TypeError tells of an argument that is unknown or missing: name the words that gave it.
    node = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
    if node is None:
        return str(error)
    given = [word for word in sys.argv[1:] if word.startswith(f"{node[1]}.")]
    if not given:
        return str(error)
    reason = str(cause).splitlines()[0]
    setting = given[0].partition("=")[0]
    return f"{node[1]} can't be made with {' '.join(given)}: {reason}. See --help {setting}"


def no_setting(wrong: str, command: str, words: Sequence[str]) -> str:
    """Returns the message for a setting that does not exist, such as `gap_px` or `grid.gab_px`.

    It says which setting may have been meant, or which member or command has it. `words` are those
    of the command line.
    """
    if renamed := new_name(wrong):
        return f"{wrong} is now {renamed}"
    try:
        known = settings.compose(command, settings.chosen_groups(words)).names()
    except (HydraException, OmegaConfBaseException):
        # A group is misspelt as well.
        known = settings.compose(command).names()
    # A setting of another command, such as grid.gap_px with relloc.evaluate
    if wrong.partition(".")[0] not in known:
        for other in settings.COMMANDS:
            if wrong in settings.compose(other).names():
                return (
                    f"relloc.{command} has no setting {wrong}: "
                    f"it belongs to python -m relloc.{other}"
                )
    # A setting of another member of the group, such as data.root with data=photos
    group = wrong.partition(".")[0]
    if having := _members_with(wrong, command):
        swept = [word for word in words if word.startswith(f"{group}=") and "," in word]
        # Hydra first composes the default member with all words that are not swept.
        if swept:
            return f"{wrong} can't be given beside {swept[0]}: start one command for each {group}"
        return f"there is no setting {wrong} here. It belongs to {', '.join(having)}"
    # What other projects or earlier versions call a setting, and at last a similar name
    if (usual := usual_name(wrong)) in known:
        return f"there is no setting {wrong}. Did you mean {usual}?"
    if old := nearest_old_name(wrong):
        return f"there is no setting {wrong}. Did you mean {new_name(old)}, which was {old} before?"
    return f"there is no setting {wrong}{_meant(wrong, known)}"


def _prepare_takes_data(words: Sequence[str]) -> str:
    """Returns the message for a preset given to relloc.prepare, which names the preset's data."""
    given = next((word for word in words if word.startswith("experiment=")), "experiment=")
    start = f"relloc.prepare takes no preset ({given}), only a data set: give data="
    if given.partition("=")[2] in settings.members("experiment"):
        # A preset is made for one of the commands.
        for other in ("train", "evaluate"):
            with contextlib.suppress(HydraException, OmegaConfBaseException):
                data = settings.compose(other, [given]).value("data.name")
                return f"{start}{data}, which that preset uses"
    return f"{start}NAME, which may be {', '.join(settings.members('data'))}"


def _members_with(wrong: str, command: str) -> list[str]:
    """Returns the members, such as `data=folder`, that have the setting `wrong`."""
    group, _, inner = wrong.partition(".")
    # The settings of an evaluation come below its name: eval.linear.lr is a setting of eval=linear.
    if group == "eval":
        choice = f"eval={inner.partition('.')[0]}"
        if inner.partition(".")[0] not in settings.members(group):
            return []
        has_it = wrong in settings.compose(command, [choice]).names()
        return [choice] if has_it else []
    having = []
    for member in settings.members_general_first(group):
        content = settings.content_of(f"{group}/{member}")
        if inner in settings.flat(content.get(group, content)):
            having.append(f"{group}={member}")
    return having


def _meant(wrong: str, known: Sequence[str]) -> str:
    """Returns the end of a message: which of the `known` settings may have been meant."""
    parent, _, name = wrong.rpartition(".")
    beside = [key for key in known if key.rpartition(".")[0] == parent]
    # A similar name within the same group is likelier than one elsewhere.
    near = difflib.get_close_matches(wrong, beside, n=1, cutoff=0.8)
    if not near:
        near = difflib.get_close_matches(wrong, known, n=1)
    if parent and beside:
        near = [key for key in near if key in beside]
    elif not near or near[0] not in beside:
        # A setting of the same name in another group may be meant.
        elsewhere = [key for key in known if key.endswith(f".{name}")]
        near = elsewhere if 0 < len(elsewhere) < 5 else near
    if near:
        return f". Did you mean {' or '.join(near)}?"
    if parent and beside:
        names = [key.rpartition(".")[2] for key in beside]
        return f": {parent} has {', '.join(names)}"
    return ". See --help for the settings there are"


def check_kinds(overrides: Sequence[Override], command: str) -> None:
    """Refuses words where numbers, or true and false, belong.

    This is done before the config is composed, so that the message has the setting's own name.

    Raises:
        UsageError: a setting that is a number, or true or false, is given a word.
    """
    worded: list[tuple[str, str]] = []
    for override in overrides:
        key = override.key_or_group
        is_free = settings.is_group(key) or key.partition(".")[0] in _FREE or key == "checkpoint"
        if is_free or override.is_delete():
            continue
        for value in values(override):
            # An interpolation may resolve to a number.
            if isinstance(value, str) and "${" not in value:
                worded.append((key, value))
    if not worded:
        return
    words = [override.input_line or "" for override in overrides]
    try:
        composed = settings.compose(command, settings.chosen_groups(words))
    except (HydraException, OmegaConfBaseException):
        # Hydra raises it again when it composes the whole command line.
        return
    for key, value in worded:
        default = composed.default(key) if key in composed.unresolved else None
        if isinstance(default, bool | int | float):
            wrong = "neither true nor false" if isinstance(default, bool) else "not a number"
            raise UsageError(
                f"{key}={value} is {wrong}; {as_value(default)} by default. See --help {key}"
            )


def check_added(overrides: Sequence[Override], command: str) -> None:
    """Raises `UsageError` for added settings that nothing reads, such as `+recipe.epoch=2`.

    Hydra itself would add them. What is added to a call is left to the call, which knows its
    arguments.
    """
    added = []
    for override in overrides:
        key = override.key_or_group
        is_added = override.is_add() or override.is_force_add()
        if is_added and not settings.is_group(key) and not key.startswith(_FREE_TO_ADD):
            added.append(key)
    # One of the members that are swept over may have the setting.
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    words = [override.input_line or "" for override in overrides]
    try:
        known = settings.compose(command, settings.chosen_groups(words)).unresolved if added else {}
    except (HydraException, OmegaConfBaseException):
        # Hydra raises it again when it composes the whole command line.
        return
    # The nodes that are calls
    called = {
        name for name, value in known.items() if isinstance(value, dict) and "_target_" in value
    }
    for key in added:
        parts = key.split(".")
        parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        is_of_call = any(f"{parent}._target_" in added or parent in called for parent in parents)
        is_evaluation = parents == ["eval"]
        if key not in known and not is_of_call and not is_evaluation and parts[0] not in swept:
            raise UsageError(no_setting(key, command, words))
