"""What is said of a mistake on the command line: one message, which names the setting and what to write instead."""

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from relloc.errors import UsageError
from relloc.runs import settings
from relloc.runs.renamed import new_name

# Groups whose settings others than relloc read, or where a word may stand for a number (launcher.processes=auto)
_FREE = ("launcher", "hydra", "tracking")


def explain(error: Exception, command: str) -> str | None:
    """One message for a user's mistake; None for an error inside a call that is none."""
    if isinstance(error, InstantiationException):
        return _explain_call(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, member = error.missing_cfg_file.rpartition("/")
        return no_member(group, member)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=VALUE (see --help {error.full_key})"
    unknown = re.match(r"Could not override '(.+?)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return no_setting(unknown[1], command, sys.argv[1:])
    return str(error)


def no_member(group: str, wrong: str) -> str:
    """Of `data=imagenet`."""
    near = settings.nearest_members(group, wrong)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"there is no {group}={wrong}. {hint}There are {', '.join(settings.members(group))}"


def check_members(overrides: Sequence[Override]) -> None:
    """Raises `UsageError` for `recipe=in1kk`: Hydra goes on without a member of a group that data sets choose from."""
    for one in overrides:
        group = one.key_or_group
        if group in settings.CHOSEN_BY_DATA and not one.is_delete():
            for value in _values(one):
                if isinstance(value, str) and settings.file_of(f"{group}/{value}") is None:
                    raise UsageError(no_member(group, value))


def _explain_call(error: InstantiationException) -> str | None:
    cause = error.__cause__
    if isinstance(cause, ValueError | UsageError):
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
    parent, _, name = wrong.rpartition(".")
    if wrong.partition(".")[0] not in known and (elsewhere := _elsewhere(wrong, command)):
        return elsewhere
    if parent and settings.is_group(parent):
        having = [member for member in settings.members(parent) if name in _load(parent, member)]
        swept = [word for word in words if word.startswith(f"{parent}=") and "," in word]
        if having and swept:  # Hydra composes the default member first, with all that is not swept
            return f"{wrong} can't be given beside {swept[0]}: start one command for each {parent}"
        if having:
            owners = ", ".join(f"{parent}={member}" for member in having)
            return f"there is no setting {wrong} here. It belongs to {owners}"
    return _nearest_setting(wrong, known) or _siblings(wrong, known)


def _load(group: str, member: str) -> Any:
    file = settings.file_of(f"{group}/{member}")
    return OmegaConf.load(file) if file else {}


def _nearest_setting(wrong: str, known: Sequence[str]) -> str:
    parent, _, name = wrong.rpartition(".")
    ending = [key for key in known if key.endswith(f".{wrong}") or (parent and key.endswith(f".{name}"))]
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.8)
    if not near and len(ending) in range(1, 5) and not (parent and siblings):
        return f"there is no setting {wrong}. Did you mean {' or '.join(ending)}?"
    near = near or difflib.get_close_matches(wrong, known, n=1)
    if near and (near[0] in siblings or not siblings or not parent):
        return f"there is no setting {wrong}. Did you mean {near[0]}?"
    return ""


def _elsewhere(wrong: str, command: str) -> str:
    """A setting of another command, such as grid.gap_px of relloc.evaluate."""
    for other in settings.COMMANDS:
        if other != command and wrong in settings.compose(other).names():
            return f"relloc.{command} has no setting {wrong}: it belongs to python -m relloc.{other}"
    return ""


def _siblings(wrong: str, known: Sequence[str]) -> str:
    parent = wrong.rpartition(".")[0]
    names = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    if names and parent:
        return f"there is no setting {wrong}: {parent} has {', '.join(names)}"
    return f"there is no setting {wrong}. See --help for the settings there are"


def check_kinds(overrides: Sequence[Override], command: str) -> None:
    """Words where numbers belong are told before anything is composed, and with the setting's own name.

    Raises:
        UsageError: a setting that is a number, or true or false, is given a word.
    """
    worded = [one for one in overrides if _may_be_checked(one) and any(map(_is_word, _values(one)))]
    if not worded:
        return
    groups = [one.input_line or "" for one in overrides if settings.is_group(one.key_or_group)]
    try:
        composed = settings.compose(command, settings.chosen_groups(groups))
    except (HydraException, OmegaConfBaseException):  # which Hydra tells itself in a moment
        return
    for override in worded:
        try:
            default = composed.default(override.key_or_group)
        except KeyError:
            continue
        for value in filter(_is_word, _values(override)):
            _check_kind(override.key_or_group, value, default)


def _may_be_checked(override: Override) -> bool:
    key = override.key_or_group
    plain = not override.is_delete() and not override.is_hydra_override() and not settings.is_group(key)
    return plain and key.partition(".")[0] not in _FREE and key != "checkpoint"


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_choice_sweep() else []


def _is_word(value: Any) -> bool:
    text = getattr(value, "text", value)
    return isinstance(text, str) and "${" not in text


def _check_kind(key: str, value: Any, default: Any) -> None:
    text = getattr(value, "text", value)
    more = f"See --help {key}"
    if isinstance(default, bool):
        raise UsageError(f"{key}={text} is neither true nor false; {str(default).lower()} by default. {more}")
    if isinstance(default, int | float):
        raise UsageError(f"{key}={text} is not a number; {default} by default. {more}")
