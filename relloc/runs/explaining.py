"""Explains mistakes on the command line.

Each gets one message, which names the setting and what to write instead.
"""

import contextlib
import copy
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from relloc.errors import UsageError
from relloc.runs import settings
from relloc.runs.command_line import as_value, parsed, values
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
        explained = _preset_of_another(preset[1], command)
        return explained or str(error)
    unknown = re.match(r"Could not override '(.+?)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        key = unknown[1]
        words = sys.argv[1:]
        # relloc.prepare has no group of presets, so Hydra takes the word for a setting.
        if key == "experiment" and command == "prepare":
            return _prepare_takes_data(words)
        return no_setting(key, command, words)
    return str(error)


def _preset_of_another(preset: str, command: str) -> str | None:
    """Explains a preset of another command, as in `relloc.evaluate experiment=card2022`.

    Returns None where no command has the preset.
    """
    for other in settings.COMMANDS:
        if other == command:
            continue
        # A preset belongs to the command whose config it can be composed with.
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
    if group in settings.EVALUATION_GROUPS and wrong in ("none", "null"):
        return f"there is no {group}={wrong}: write {group}=[] for none"
    known = settings.members(group)
    if wrong == "null":
        if "none" in known:
            return f"there is no {group}=null: write {group}=none"
        listed = ", ".join(known)
        if group in settings.OPTIONAL_GROUPS:
            return (
                f"there is no {group}=null: leave the group out by '~{group}', or give one of "
                f"{listed}"
            )
        return f"there is no {group}=null: give one of {listed}"
    meant = difflib.get_close_matches(wrong, known, n=1)
    # Shorter words are found in too many descriptions.
    if len(wrong) > 3:
        for member in known:
            about = settings.about(f"{group}/{member}")
            first_line = "".join(about[:1])
            if wrong.lower() in first_line.lower():
                meant.append(member)
    hint = ""
    if meant:
        distinct = sorted(set(meant))
        hint = f"Did you mean {' or '.join(distinct)}? "
    if not known:
        # Plugins bring the members of a group such as hydra/sweeper.
        return f"there is no {group}={wrong}: the package that brings it is not installed"
    listed = ", ".join(known)
    return f"there is no {group}={wrong}. {hint}There are {listed}"


def check_members(overrides: Sequence[Override]) -> None:
    """Raises `UsageError` for members that Hydra itself does not refuse with a clear message.

    Hydra ignores a `recipe` or `probe` that does not exist, since these are optional, and can't
    read `null` as a member.
    """
    for override in overrides:
        group = override.key_or_group
        if override.is_delete():
            continue
        chosen = values(override)
        if None in chosen and settings.is_group(group):
            raise UsageError(no_member(group, "null"))
        if group not in settings.CHOSEN_BY_DATA:
            continue
        for value in chosen:
            # Only texts are names of members.
            if not isinstance(value, str):
                continue
            if settings.file_of(f"{group}/{value}") is None:
                raise UsageError(no_member(group, value))


def _explain_call(error: InstantiationException) -> str | None:
    """Explains why a `_target_` could not be called; None if the settings are not the reason."""
    cause = error.__cause__
    if isinstance(cause, ValueError):
        return str(cause)
    if not isinstance(cause, TypeError):
        return None
    # A TypeError tells of an argument that is unknown or missing: name the words that gave it.
    text = str(error)
    full_key = re.search(r"^full_key: (\S+)$", text, re.MULTILINE)
    if full_key is None:
        return text
    node = full_key[1]
    given = []
    for word in sys.argv[1:]:
        if word.startswith(f"{node}."):
            given.append(word)
    if not given:
        return text
    # Hydra appends what it called, and with which arguments.
    reason, *_ = str(cause).splitlines()
    setting, _, _ = given[0].partition("=")
    shown = " ".join(given)
    return f"{node} can't be made with {shown}: {reason}. See --help {setting}"


# Of a group that a command does not have, the command that has it
_COMMANDS_WITHOUT = {("study", "evaluate"): "study", ("eval", "study"): "evaluate"}


def no_setting(
    wrong: str,
    command: str,
    words: Sequence[str],
) -> str:
    """Returns the message for a setting that does not exist, such as `gap_px` or `grid.gab_px`.

    It says which setting may have been meant, or which member or command has it. `words` are those
    of the command line.
    """
    renamed = new_name(wrong)
    if renamed:
        return f"{wrong} is now {renamed}"
    try:
        chosen = settings.chosen_groups(words)
        composed = settings.compose(command, chosen)
    except (HydraException, OmegaConfBaseException):
        # A group is misspelt as well.
        composed = settings.compose(command)
    known = composed.names()
    other = _other_command(wrong, command, known)
    if other:
        return other
    # A setting of another member of the group, such as data.root with data=photos
    group, _, _ = wrong.partition(".")
    having = _members_with(wrong, command)
    if having:
        swept = [word for word in words if word.startswith(f"{group}=") and "," in word]
        # Hydra first composes the default member with all words that are not swept.
        if swept:
            return f"{wrong} can't be given beside {swept[0]}: start one command for each {group}"
        members = ", ".join(having)
        return f"there is no setting {wrong} here. It belongs to {members}"
    # What other projects or earlier versions call a setting, and at last a similar name
    usual = usual_name(wrong)
    if usual in known:
        return f"there is no setting {wrong}. Did you mean {usual}?"
    old = nearest_old_name(wrong)
    if old:
        return f"there is no setting {wrong}. Did you mean {new_name(old)}, which was {old} before?"
    hint = _meant(wrong, known)
    return f"there is no setting {wrong}{hint}"


def _other_command(wrong: str, command: str, known: Sequence[str]) -> str:
    """Returns the message for a setting of another command, such as grid.gap_px of relloc.train."""
    group, _, _ = wrong.partition(".")
    # Evaluations given to relloc.study, or studies to relloc.evaluate
    having_group = _COMMANDS_WITHOUT.get((group, command))
    if having_group:
        return f"relloc.{command} has no {group}=: give it to python -m relloc.{having_group}"
    others = () if group in known else settings.COMMANDS
    for other in others:
        if wrong in settings.compose(other).names():
            return (
                f"relloc.{command} has no setting {wrong}: it belongs to python -m relloc.{other}"
            )
    return ""


def _prepare_takes_data(words: Sequence[str]) -> str:
    """Returns the message for a preset given to relloc.prepare, which names the preset's data."""
    presets = [word for word in words if word.startswith("experiment=")]
    given = presets[0] if presets else "experiment="
    start = f"relloc.prepare takes no preset ({given}), only a data set: give data="
    _, _, preset = given.partition("=")
    if preset in settings.members("experiment"):
        # A preset is made for one of the commands.
        for other in settings.COMMANDS:
            with contextlib.suppress(HydraException, OmegaConfBaseException):
                composed = settings.compose(other, [given])
                data = composed.value("data.name")
                return f"{start}{data}, which that preset uses"
    data_sets = settings.members("data")
    return f"{start}NAME, which may be {', '.join(data_sets)}"


def _members_with(wrong: str, command: str) -> list[str]:
    """Returns the members, such as `data=folder`, that have the setting `wrong`."""
    group, _, inner = wrong.partition(".")
    # The settings of an evaluation come below its name: eval.linear.lr is a setting of eval=linear.
    if group in settings.EVALUATION_GROUPS:
        evaluation, _, _ = inner.partition(".")
        if evaluation not in settings.members(group):
            return []
        choice = f"{group}={evaluation}"
        composed = settings.compose(command, [choice])
        return [choice] if wrong in composed.names() else []
    having = []
    for member in settings.members_general_first(group):
        content = settings.content_of(f"{group}/{member}")
        # A file with another package names its group itself.
        in_group = content.get(group, content)
        if inner in settings.flat(in_group):
            having.append(f"{group}={member}")
    return having


def _meant(wrong: str, known: Sequence[str]) -> str:
    """Returns the end of a message: which of the `known` settings may have been meant."""
    parent, _, name = wrong.rpartition(".")
    # The settings beside it, and the last words of their names
    beside = []
    names = []
    for key in known:
        parent_of_key, _, last_word = key.rpartition(".")
        if parent_of_key == parent:
            beside.append(key)
            names.append(last_word)
    # A similar name within the same group is likelier than one elsewhere.
    near = difflib.get_close_matches(wrong, beside, n=1, cutoff=0.8)
    if not near:
        near = difflib.get_close_matches(wrong, known, n=1)
    is_group = bool(parent and beside)
    if is_group:
        near = [key for key in near if key in beside]
    elif not near or near[0] not in beside:
        # A setting of the same name in another group may be meant.
        elsewhere = [key for key in known if key.endswith(f".{name}")]
        # More than four would be no help.
        if 0 < len(elsewhere) < 5:
            near = elsewhere
    if near:
        return f". Did you mean {' or '.join(near)}?"
    if is_group:
        return f": {parent} has {', '.join(names)}"
    return ". See --help for the settings there are"


def check_kinds(overrides: Sequence[Override], command: str) -> None:
    """Refuses words where numbers, or true and false, belong.

    This is done before the config is composed, so that the message has the setting's own name.

    Raises:
        UsageError: a setting that is a number, or true or false, is given a word.
    """
    worded = _set_to_words(overrides)
    if not worded:
        return
    words = _as_typed(overrides)
    try:
        chosen = settings.chosen_groups(words)
        composed = settings.compose(command, chosen)
    except (HydraException, OmegaConfBaseException):
        # Hydra raises it again when it composes the whole command line.
        return
    for key, value in worded:
        # Unknown settings are refused with another message.
        if key not in composed.unresolved:
            continue
        default = composed.default(key)
        # bool first, as it is a kind of int.
        if isinstance(default, bool):
            wrong = "neither true nor false"
        elif isinstance(default, int | float):
            wrong = "not a number"
        else:
            continue
        raise UsageError(
            f"{key}={value} is {wrong}; {as_value(default)} by default. See --help {key}"
        )


def _set_to_words(overrides: Sequence[Override]) -> list[tuple[str, str]]:
    """Returns the settings that are given words, and these words."""
    worded: list[tuple[str, str]] = []
    for override in overrides:
        key = override.key_or_group
        group, _, _ = key.partition(".")
        is_free = group in _FREE or key in ("checkpoint", "watch")
        if is_free or settings.is_group(key) or override.is_delete():
            continue
        for value in values(override):
            # An interpolation may resolve to a number.
            if isinstance(value, str) and "${" not in value:
                worded.append((key, value))
    return worded


def _as_typed(overrides: Sequence[Override]) -> list[str]:
    """Returns the words that the overrides were parsed from."""
    return [override.input_line or "" for override in overrides]


def check_added(
    overrides: Sequence[Override],
    command: str,
) -> None:
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
    # Most commands add nothing, and composing takes time.
    if not added:
        return
    # One of the members that are swept over may have the setting.
    sweeps = filter(Override.is_sweep_override, overrides)
    swept = {override.key_or_group for override in sweeps}
    words = _as_typed(overrides)
    try:
        chosen = settings.chosen_groups(words)
        composed = settings.compose(command, chosen)
    except (HydraException, OmegaConfBaseException):
        # Hydra raises it again when it composes the whole command line.
        return
    known = composed.unresolved
    # The nodes that are calls: those that the added words make, and those of the config
    called = _calls(known)
    for key in added:
        if key.endswith("._target_"):
            called.add(key.removesuffix("._target_"))
    for key in added:
        group, *_ = key.split(".")
        parents = _parents(key)
        is_of_call = not called.isdisjoint(parents)
        # +eval.NAME adds a whole evaluation.
        is_evaluation = parents in (["eval"], ["study"])
        may_exist = is_of_call or is_evaluation or group in swept
        if key not in known and not may_exist:
            raise UsageError(no_setting(key, command, words))


def check_evaluations(words: Sequence[str], config: DictConfig) -> None:
    """Raises `UsageError` for a setting of an evaluation that is not chosen, if nothing uses it.

    Hydra refuses such a word, except where a preset has settings of the evaluation too. `words` are
    those of the command line, `config` what they compose.
    """
    overrides = {word: parsed(word) for word in words}
    # Settings of an evaluation that the same command takes out, as ~eval.knn, are no mistake.
    taken_out = {one.key_or_group for one in overrides.values() if one and one.is_delete()}
    for word, override in overrides.items():
        if override is None or override.is_delete():
            continue
        # A package is where the member of another group is put, as in data@eval.knn.data=folder.
        key = override.package or override.key_or_group
        group, _, inner = key.partition(".")
        evaluation, _, _ = inner.partition(".")
        if group not in settings.EVALUATION_GROUPS or not evaluation:
            continue
        if f"{group}.{evaluation}" in taken_out:
            continue
        chosen = settings.chosen_evaluations(config, group)
        if evaluation in chosen or _is_read(key, config):
            continue
        if settings.file_of(f"{group}/{evaluation}") is None:
            raise UsageError(f"{word}: {group}.{evaluation} is no evaluation, it has no _target_")
        raise UsageError(
            f"there is no setting {key} here. It belongs to {group}={evaluation}, which is not "
            "among those chosen"
        )


def _is_read(key: str, config: DictConfig) -> bool:
    """Whether a setting of an evaluation that is not chosen gives another setting its value."""
    without = copy.deepcopy(config)
    parent, _, name = key.rpartition(".")
    with open_dict(without):
        del OmegaConf.select(without, parent)[name]
    try:
        settings.resolved(without)
    except OmegaConfBaseException:
        # An interpolation names the setting.
        return True
    return False


def _calls(known: Mapping[str, Any]) -> set[str]:
    """Returns the nodes of a config that are calls of a class or function."""
    called = set()
    for name, value in known.items():
        if isinstance(value, dict) and "_target_" in value:
            called.add(name)
    return called


def _parents(key: str) -> list[str]:
    """Returns the nodes that hold a setting, the outermost first: a and a.b for a.b.c."""
    parts = key.split(".")
    parents = []
    for depth in range(1, len(parts)):
        parents.append(".".join(parts[:depth]))
    return parents
