"""What is said of a mistake on the command line: one message, which names the setting and what to write instead."""

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

# Groups whose settings others than relloc read, or where a word may stand for a number (launcher.processes=auto)
_FREE = ("launcher", "hydra", "tracking")
# Below these, others than relloc say which settings there are
_FREE_TO_ADD = ("hydra.", "hydra/", "launcher.additional_parameters", "launcher.submitit")


def explain(error: Exception, command: str) -> str | None:
    """One message for a user's mistake; None for an error inside a call that is none."""
    if isinstance(error, InstantiationException):
        return _explain_call(error)
    if (
        isinstance(error, MissingConfigException)
        and error.missing_cfg_file
        and "/" in error.missing_cfg_file
    ):
        group, _, member = error.missing_cfg_file.rpartition("/")
        return no_member(group, member)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=VALUE (see --help {error.full_key})"
    preset = re.match(r"In 'experiment/(.+?)': Could not override", str(error))
    if isinstance(error, ConfigCompositionException) and preset:
        return _preset_of_another(preset[1], command) or str(error)
    unknown = re.match(r"Could not override '(.+?)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return no_setting(unknown[1], command, sys.argv[1:])
    return str(error)


def _preset_of_another(preset: str, command: str) -> str | None:
    """Of `relloc.evaluate experiment=card2022`: whose preset that is; None where it is nobody's."""
    for other in settings.COMMANDS:
        if other != command:
            with contextlib.suppress(HydraException, OmegaConfBaseException):
                settings.compose(other, [f"experiment={preset}"])
                whole = f"python -m relloc.{other} experiment={preset}"
                return f"experiment={preset} is a preset of relloc.{other}, not of relloc.{command}: start {whole}"
    return None


def no_member(group: str, wrong: str) -> str:
    """Of `data=imagenet`: which member may have been meant, one that is called alike or that says the word."""
    if group == "eval" and wrong in ("none", "null"):
        return f"there is no eval={wrong}: write eval=[] for no evaluation"
    known = settings.members(group)
    meant = difflib.get_close_matches(wrong, known, n=1)
    for member in known if len(wrong) > 3 else ():
        if wrong.lower() in "".join(settings.about(f"{group}/{member}")[:1]).lower():
            meant.append(member)
    hint = f"Did you mean {' or '.join(sorted(set(meant)))}? " if meant else ""
    return f"there is no {group}={wrong}. {hint}There are {', '.join(known)}"


def check_members(overrides: Sequence[Override]) -> None:
    """Raises `UsageError` for `recipe=in1kk`, without which Hydra goes on, and for `eval=null`, which it can't read."""
    for one in overrides:
        group = one.key_or_group
        if group == "eval" and not one.is_delete() and None in values(one):
            raise UsageError(no_member(group, "null"))
        if group in settings.CHOSEN_BY_DATA and not one.is_delete():
            for value in values(one):
                if isinstance(value, str) and settings.file_of(f"{group}/{value}") is None:
                    raise UsageError(no_member(group, value))


def _explain_call(error: InstantiationException) -> str | None:
    cause = error.__cause__
    if isinstance(cause, ValueError):
        return str(cause)
    if not isinstance(cause, TypeError):
        return None
    made = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
    given = [word for word in sys.argv[1:] if made and word.startswith(f"{made[1]}.")]
    if made and given:
        reason = str(cause).splitlines()[0]
        return f"{made[1]} can't be made with {' '.join(given)}: {reason}. See --help {given[0].partition('=')[0]}"
    return str(error)


def no_setting(wrong: str, command: str, words: Sequence[str]) -> str:
    """Of `gap_px=10` and `grid.gab_px=10`: which setting may have been meant, or who has it."""
    if renamed := new_name(wrong):
        return f"{wrong} is now {renamed}"
    try:
        known = settings.compose(command, settings.chosen_groups(words)).names()
    except (HydraException, OmegaConfBaseException):  # a group that is misspelt as well
        known = settings.compose(command).names()
    # A setting of another command, such as grid.gap_px of relloc.evaluate
    if wrong.partition(".")[0] not in known:
        for other in settings.COMMANDS:
            if wrong in settings.compose(other).names():
                return f"relloc.{command} has no setting {wrong}: it belongs to python -m relloc.{other}"
    # One of another member of the group, such as data.root of data=photos
    group = wrong.partition(".")[0]
    if having := _having(wrong, command):
        swept = [word for word in words if word.startswith(f"{group}=") and "," in word]
        if swept:  # Hydra composes the default member first, with all that is not swept
            return f"{wrong} can't be given beside {swept[0]}: start one command for each {group}"
        return f"there is no setting {wrong} here. It belongs to {', '.join(having)}"
    if (usual := usual_name(wrong)) in known:
        return f"there is no setting {wrong}. Did you mean {usual}?"
    if old := nearest_old_name(wrong):
        return f"there is no setting {wrong}. Did you mean {new_name(old)}, which was {old} before?"
    return f"there is no setting {wrong}{_meant(wrong, known)}"


def _having(wrong: str, command: str) -> list[str]:
    """The members, as `data=folder`, that have a setting; of evaluations the one that it names, eval.linear.lr."""
    group, _, inner = wrong.partition(".")
    if group == "eval":
        named = inner.partition(".")[0]
        is_there = named in settings.members(group)
        return (
            [f"eval={named}"]
            if is_there and wrong in settings.compose(command, [f"eval={named}"]).names()
            else []
        )
    having = []
    for member in settings.members(group):
        content = settings.content_of(f"{group}/{member}")
        if inner in settings.flat(content.get(group, content)):
            having.append(f"{group}={member}")
    return having


def _meant(wrong: str, known: Sequence[str]) -> str:
    parent, _, name = wrong.rpartition(".")
    beside = [key for key in known if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(wrong, beside, n=1, cutoff=0.8) or difflib.get_close_matches(
        wrong, known, n=1
    )
    if parent and beside:
        near = [key for key in near if key in beside]
    elif not near or near[0] not in beside:
        # One of the same name elsewhere may be meant.
        elsewhere = [key for key in known if key.endswith(f".{name}")]
        near = elsewhere if 0 < len(elsewhere) < 5 else near
    if near:
        return f". Did you mean {' or '.join(near)}?"
    if parent and beside:
        return f": {parent} has {', '.join(key.rpartition('.')[2] for key in beside)}"
    return ". See --help for the settings there are"


def check_kinds(overrides: Sequence[Override], command: str) -> None:
    """Words where numbers belong are told before anything is composed, and with the setting's own name.

    Raises:
        UsageError: a setting that is a number, or true or false, is given a word.
    """
    worded: list[tuple[str, str]] = []
    for one in overrides:
        key = one.key_or_group
        is_free = settings.is_group(key) or key.partition(".")[0] in _FREE or key == "checkpoint"
        if not is_free and not one.is_delete():
            worded += [
                (key, value)
                for value in values(one)
                if isinstance(value, str) and "${" not in value
            ]
    if not worded:
        return
    try:
        composed = settings.compose(
            command, settings.chosen_groups([one.input_line or "" for one in overrides])
        )
    except (HydraException, OmegaConfBaseException):  # which Hydra tells itself in a moment
        return
    for key, value in worded:
        default = composed.default(key) if key in composed.unresolved else None
        if isinstance(default, bool | int | float):
            wrong = "neither true nor false" if isinstance(default, bool) else "not a number"
            raise UsageError(
                f"{key}={value} is {wrong}; {as_value(default)} by default. See --help {key}"
            )


def check_added(overrides: Sequence[Override], command: str) -> None:
    """Raises `UsageError` for `+recipe.epoch=2`: Hydra adds such a setting, and nothing reads it.

    What is added to a call is left to the call, which knows its arguments.
    """
    added = [one.key_or_group for one in overrides if one.is_add() or one.is_force_add()]
    swept = {
        one.key_or_group for one in overrides if one.is_sweep_override()
    }  # whose members may have it
    added = [
        key for key in added if not settings.is_group(key) and not key.startswith(_FREE_TO_ADD)
    ]
    words = [one.input_line or "" for one in overrides]
    try:
        known = settings.compose(command, settings.chosen_groups(words)).unresolved if added else {}
    except (HydraException, OmegaConfBaseException):  # which Hydra tells itself in a moment
        return
    called = {
        name for name, value in known.items() if isinstance(value, dict) and "_target_" in value
    }
    for key in added:
        parts = key.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        is_of_call = any(f"{one}._target_" in added or one in called for one in above)
        is_evaluation = above == ["eval"]
        if key not in known and not is_of_call and not is_evaluation and parts[0] not in swept:
            raise UsageError(no_setting(key, command, words))
