"""The words of a command line before Hydra reads them: flags come first, and a word it can't read is explained.

Nothing here imports torch: a typing mistake is answered at once.
"""

import dataclasses
import difflib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import OverrideParseException

from relloc.errors import UsageError
from relloc.results import NOT_OURS
from relloc.runs.renamed import usual_name

_ALONE = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--resolve",
    "--run",
    "-r",
    "--multirun",
    "-m",
)
_ALONE += ("--shell-completion", "-sc")
_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn")
_WITH_VALUE += ("--config-dir", "-cd", "--experimental-rerun")
_INFO = ("--info", "-i")
_INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# Settings that name something on disk. Hydra reads 2024_10_01 as a number and 1e3 as another one.
_PATHS = (
    "checkpoint",
    "data.root",
    "data.shards",
    "out",
    "runs",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "sweep",
)
# Names that may look like numbers, as long as they are the same when written again
_TEXTS = ("runs", "hydra.run.dir", "hydra.sweep.dir", "sweep")
# A launcher may make a sweep of a command without -m, and says itself what its settings take
_SWEEP_THEMSELVES = ("launcher", "hydra")
_KEY = re.compile(r"(?:\+\+?|~)?[A-Za-z_$][\w.$/@:-]*")
_OPENING = {"[": "]", "{": "}", "(": ")"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What was asked: `flags` of Hydra, such as -m, and `words`, the settings."""

    flags: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def asks_for_help(self) -> bool:
        return not {"--help", "-h"}.isdisjoint(self.flags)

    @property
    def sweeps(self) -> bool:
        return not {"--multirun", "-m"}.isdisjoint(self.flags)


def read(arguments: Sequence[str]) -> CommandLine:
    """Flags and settings told apart, wherever the flags stand: Hydra takes them only before the settings.

    Raises:
        UsageError: a flag that there is not.
    """
    flags: list[str] = []
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "--":
            words += left
            break
        if word.startswith("-") and len(word) > 1:
            flags += _flag(word, left)
        else:
            words.append(word)
    return CommandLine(flags=tuple(flags), words=tuple(words))


def _flag(word: str, left: list[str]) -> list[str]:
    """A flag, together with its value, which is taken from what is `left`."""
    name, has_value, value = word.partition("=")
    known = (*_ALONE, *_WITH_VALUE, *_INFO)
    # As usual, the beginning of a flag's name stands for it if no other begins so.
    meant = [flag for flag in known if flag.startswith(name)] if name.startswith("--") else []
    if name not in known and len(meant) == 1:
        name = meant[0]
    if name in _ALONE and not has_value:
        return [name]
    if name in _INFO:
        asked = value or (left.pop(0) if left and left[0] in _INFOS else "all")
        return [f"--info={asked}"]
    if name not in _WITH_VALUE:
        raise UsageError(f"there is no flag {word}{_as_setting(word, left)}. See --help")
    if has_value:
        return [f"{name}={value}"]
    if not left:
        raise UsageError(f"{name} needs a value behind it")
    return [name, left.pop(0)]


def _as_setting(word: str, left: Sequence[str]) -> str:
    """Of a setting with dashes, `--seed 0`: how it is written."""
    name, _, value = word.lstrip("-").partition("=")
    if not _KEY.fullmatch(name):
        return ""
    behind = left[0] if left and not left[0].startswith("-") and "=" not in left[0] else "VALUE"
    return f": settings are written without dashes, {_typed(usual_name(name) or name, value or behind)}"


def check(words: Sequence[str], *, sweeps: bool) -> list[Override]:
    """Each word as Hydra reads it; `sweeps`: one may name several values, as it may where a launcher is chosen.

    Raises:
        UsageError: Hydra can't read one of them, or would read another value than what stands there.
    """
    sweeps = sweeps or any(word.startswith(_SWEEP_THEMSELVES) for word in words)
    return [
        _checked(word, words[place + 1 : place + 2], sweeps) for place, word in enumerate(words)
    ]


def _checked(word: str, after: Sequence[str], sweeps: bool) -> Override:
    key, equals, value = word.partition("=")
    if not equals and not (word.startswith("~") and _KEY.fullmatch(word)):
        raise UsageError(_without_equals(word, after))
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"{shlex.quote(word)} does not begin with the name of a setting, such as seed=0. See --help"
        )
    read_word = parsed(word)
    if read_word is None:
        raise UsageError(_unread(key, value, sweeps))
    if (
        read_word.is_choice_sweep()
        and not sweeps
        and not key.lstrip("+").startswith(_SWEEP_THEMSELVES)
    ):
        raise UsageError(_several(key, value))
    if key.lstrip("+") in _PATHS:
        _check_path(key, value, read_word)
    return read_word


def parsed(word: str) -> Override | None:
    """A word as Hydra reads it; None where it can't."""
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException:
        return None


def _without_equals(word: str, after: Sequence[str]) -> str:
    """Of a word that sets nothing: `seed 0`, `grid.gap_px`, `seed:0`."""
    if not word:
        return "one of the words is empty: a setting is KEY=VALUE, such as seed=0"
    key, colon, value = word.partition(":")
    if colon and value and _KEY.fullmatch(key):
        return f"{shlex.quote(word)} sets nothing: it is written with =, {_typed(key, value)}"
    if not _KEY.fullmatch(word):
        return f"{shlex.quote(word)} is no setting: these are written KEY=VALUE, such as seed=0. See --help"
    if after and "=" not in after[0] and not _KEY.fullmatch(after[0]):
        return f"{word} {after[0]} are two words: a setting is one, {_typed(word, after[0])}"
    return f"{word} is given no value: write {word}=VALUE; --help {word} tells what it is"


def _unread(key: str, value: str, sweeps: bool) -> str:
    """Of a word that Hydra's grammar can't read: how it is written."""
    if value.startswith("~"):
        home = f"$HOME{value[1:]}" if value[1:2] in ("", "/") else os.path.expanduser(value)
        meant = "" if home.startswith("~") else f'"{key}={home}", or '
        return f"{key}={value}: the shell expands ~ only where a word begins with it. Write {meant}the whole path"
    told = shlex.quote(f"{key}={value}")
    closed = f"{key}={_closed(value)}"
    if value.startswith("[") != value.endswith("]") and parsed(closed):
        return f"{told} has a bracket without its other half: write {shlex.quote(closed)}"
    return (
        f"{told} can't be read: a value with such characters stands in quotes, and these inside of the shell's. "
        f"Write {_with_quotes(key, value, sweeps)}"
    )


def _closed(value: str) -> str:
    """The value with the brackets that it lacks at its end, or the one at its beginning."""
    missing: list[str] = []
    for char in value:
        if char in _OPENING:
            missing.append(_OPENING[char])
        elif char in _OPENING.values() and (not missing or missing.pop() != char):
            return f"[{value}"
    return value + "".join(reversed(missing))


def _with_quotes(key: str, value: str, sweeps: bool, *, as_text: bool = False) -> str:
    """The word with quotes around what needs them: elements of a list, values of a sweep, or all of it.

    They are needed by what can't be read, and if it is to be read `as_text` by what would be something else.
    """
    is_list = value.startswith("[") and value.endswith("]")
    # What stands between commas that are in no quotes
    elements = re.findall(
        r"""(?:"[^"]*"|'[^']*'|[^,"']+|["'])+""", value[1:-1] if is_list else value
    )
    parts = (
        [part.strip() for part in elements]
        if is_list or (sweeps and len(elements) > 1)
        else [value]
    )
    for place, part in enumerate(parts):
        read_part = parsed(f"key={part}")
        if read_part is None or (as_text and not isinstance(read_part.value(), str)):
            parts[place] = _in_quotes(part)
    quoted = ",".join(parts)
    word = f"{key}=[{quoted}]" if is_list else f"{key}={quoted}"
    return shlex.quote(word if parsed(word) else f"{key}={_in_quotes(value)}")


def _in_quotes(value: str) -> str:
    quote = Quote.single if '"' in value and "'" not in value else Quote.double
    return QuotedString(text=value, quote=quote).with_quotes()


def _several(key: str, value: str) -> str:
    whole = shlex.quote(f"{key}={_in_quotes(value)}")
    if Path(value).exists():
        return f"{key}={value} is read as several values: write {whole} for what is called that"
    listed = shlex.quote(f"{key}=[{value}]")
    return (
        f"{key}={value} names several values: write {listed} for a list of them, -m before it for a run of each, or "
        f"{whole} if that is one value"
    )


def _check_path(key: str, value: str, word: Override) -> None:
    """A name that Hydra reads as a number or a yes is asked for in quotes; null is none."""
    if word.is_sweep_override() or word.is_delete():
        return
    found = word.value()
    if key in _TEXTS and str(found) == value:
        return
    if any(
        isinstance(one, bool | int | float)
        for one in (found if isinstance(found, list) else [found])
    ):
        meant = _with_quotes(key, value, sweeps=False, as_text=True)
        raise UsageError(f"{key}={value} is read as a number, not as a name: write {meant}")


def values(word: Override) -> list[Any]:
    """What a word sets: one value, or each that a sweep lists."""
    if not word.is_sweep_override():
        return [word.value()]
    if not word.is_choice_sweep():
        return []
    points = [parsed(f"key={text}") for text in word.sweep_string_iterator()]
    return [point.value() for point in points if point is not None]


def checkpoints(words: Sequence[Override]) -> list[list[str]]:
    """The checkpoints that are named, a list for each point of a sweep; none where the setting is not given."""
    named = [word for word in words if word.key_or_group == "checkpoint" and not word.is_delete()]
    points = [
        value if isinstance(value, list) else [value]
        for word in named[-1:]
        for value in values(word)
    ]
    return [[name for name in point if isinstance(name, str)] for point in points]


def check_bare_checkpoint(words: Sequence[str]) -> None:
    """Raises `UsageError` for a checkpoint that stands there without its setting: `runs/one`, `random`."""
    for word in words:
        if "=" not in word and (word in NOT_OURS or os.path.exists(word)):
            raise UsageError(
                f"{word} is given without its setting: write {as_word('checkpoint', word)}"
            )


def check_checkpoints(words: Sequence[Override]) -> None:
    """Raises `UsageError` for a checkpoint that is misspelt: Random, or a folder that there is not beside its like."""
    for name in (name for names in checkpoints(words) for name in names):
        if name in NOT_OURS or not name or os.path.lexists(name) or "$" in name:
            continue
        raise UsageError(f"checkpoint={name} does not exist{_hint(name)}")


def _hint(name: str) -> str:
    folder = Path(name).parent
    near = difflib.get_close_matches(name.lower(), NOT_OURS, n=1, cutoff=0.75)
    if not near:
        beside = sorted(file.name for file in folder.glob("*"))
        near = [
            str(folder / one)
            for one in difflib.get_close_matches(Path(name).name, beside, n=1, cutoff=0.75)
        ]
    if near:
        return f": did you mean {as_word('checkpoint', near[0])}?"
    if not folder.is_dir():
        return f", nor is there a folder {folder}; we are in {Path.cwd()}"
    return f" in {folder.absolute()}: give a run folder, a file of weights, {' or '.join(NOT_OURS)}"


def as_value(value: Any) -> str:
    """A plain value as Hydra's grammar has it, in quotes where it needs them."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_value, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{as_value(one)}" for name, one in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    read_word = (
        parsed(f"key={value}") if value and "\\" not in value else None
    )  # one would escape what follows
    plain = (
        read_word is not None and not read_word.is_sweep_override() and read_word.value() == value
    )
    return value if plain else _in_quotes(value)


def as_word(key: str, value: Any) -> str:
    """`key=value` as it is typed in a shell."""
    return shlex.quote(f"{key}={as_value(value)}")


def _typed(key: str, value: str) -> str:
    """`key=value` as a person meant it, with quotes only where Hydra can't read it without."""
    return shlex.quote(f"{key}={value if parsed(f'{key}={value}') else _in_quotes(value)}")
