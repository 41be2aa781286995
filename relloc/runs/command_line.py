"""Reads a command line before Hydra does: sorts flags from settings and explains mistakes.

Nothing here imports torch, so that a typing mistake is answered at once.
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
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import OverrideParseException

from relloc.errors import UsageError
from relloc.results import NO_FILES, REFERENCE_MODELS
from relloc.runs.renamed import usual_name

# The flags of Hydra: those without a value, those with one, and those that may have one
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
# Settings that name a file or folder. Hydra would read the names 2024_10_01 and 1e3 as numbers.
_PATHS = (
    "checkpoint",
    "watch",
    "data.root",
    "data.shards",
    "data.proposals",
    "out",
    "runs",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "sweep",
)
# Of these, names that look like numbers are taken if the number is written the same way again.
_TEXTS = ("runs", "hydra.run.dir", "hydra.sweep.dir", "sweep")
# Settings of launchers may have several values without -m: a launcher checks them itself.
_SWEEP_THEMSELVES = ("launcher", "hydra")
_KEY = re.compile(r"(?:\+\+?|~)?[A-Za-z_$][\w.$/@:-]*")
_OPENING = {"[": "]", "{": "}", "(": ")"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A command line: `flags` of Hydra, such as `-m`, and `words`, the settings `KEY=VALUE`."""

    flags: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def asks_for_help(self) -> bool:
        return not {"--help", "-h"}.isdisjoint(self.flags)

    @property
    def sweeps(self) -> bool:
        return not {"--multirun", "-m"}.isdisjoint(self.flags)


def read(arguments: Sequence[str]) -> CommandLine:
    """Separates flags from settings, in whatever order they stand.

    Hydra takes flags only before the settings.

    Raises:
        UsageError: a flag does not exist, or lacks its value.
    """
    flags: list[str] = []
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        # As usual, all words behind `--` are settings, even if they begin with a dash.
        if word == "--":
            words += left
            break
        if word.startswith("-") and len(word) > 1:
            flags += _flag(word, left)
        else:
            words.append(word)
    return CommandLine(flags=tuple(flags), words=tuple(words))


def _flag(word: str, left: list[str]) -> list[str]:
    """Returns a flag and its value, which is removed from the words that are `left`."""
    name, has_value, value = word.partition("=")
    known = (*_ALONE, *_WITH_VALUE, *_INFO)
    # As usual, a flag may be abbreviated if no other begins the same way.
    if name.startswith("--") and name not in known:
        meant = [flag for flag in known if flag.startswith(name)]
        if len(meant) == 1:
            name = meant[0]
    # From here on, the name is complete.
    if name in _ALONE and not has_value:
        return [name]
    if name in _INFO:
        # As a word of its own, the value would not be told from a setting.
        if not value and left and left[0] in _INFOS:
            value = left.pop(0)
        return [f"--info={value or 'all'}"]
    if name not in _WITH_VALUE:
        advice = _as_setting(word, left)
        raise UsageError(f"there is no flag {word}{advice}. See --help")
    if has_value:
        return [f"{name}={value}"]
    if not left:
        raise UsageError(f"{name} needs a value behind it")
    return [name, left.pop(0)]


def _as_setting(flag: str, left: Sequence[str]) -> str:
    """Returns how a setting with dashes, such as `--seed 0`, is to be written; "" for others."""
    without_dashes = flag.lstrip("-")
    name, _, value = without_dashes.partition("=")
    if not _KEY.fullmatch(name):
        return ""
    # The value may be the word behind the flag.
    if not value and left:
        following = left[0]
        is_value = not following.startswith("-") and "=" not in following
        if is_value:
            value = following
    setting = usual_name(name) or name
    word = _typed(setting, value or "VALUE")
    return f": settings are written without dashes, {word}"


def check(words: Sequence[str], *, sweeps: bool) -> list[Override]:
    """Parses each word as Hydra does.

    With `sweeps` a word may list several values to sweep over, as it also may where a launcher is
    chosen.

    Raises:
        UsageError: Hydra can't read a word, or would read another value than the one written.
    """
    for word in words:
        if word.startswith(_SWEEP_THEMSELVES):
            sweeps = True
    overrides = []
    for index, word in enumerate(words):
        after = words[index + 1 : index + 2]
        overrides.append(_checked(word, after, sweeps))
    return overrides


def _checked(
    word: str,
    after: Sequence[str],
    sweeps: bool,
) -> Override:
    """Parses a word; `after` has the word behind it, if there is one."""
    key, equals, value = word.partition("=")
    # ~KEY removes a setting and needs no value.
    is_removal = word.startswith("~") and _KEY.fullmatch(word)
    if not equals and not is_removal:
        raise UsageError(_without_equals(word, after))
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"{shlex.quote(word)} does not begin with the name of a setting, such as seed=0. "
            "See --help"
        )
    override = parsed(word)
    if override is None:
        raise UsageError(_unread(key, value, sweeps))
    name = key.lstrip("+")
    may_sweep = sweeps or name.startswith(_SWEEP_THEMSELVES)
    if override.is_choice_sweep() and not may_sweep:
        raise UsageError(_several(key, value))
    if name in _PATHS:
        _check_path(key, value, override)
    return override


def parsed(word: str) -> Override | None:
    """Parses a word as Hydra does; None if Hydra can't."""
    parser = OverridesParser.create()
    try:
        [override] = parser.parse_overrides([word])
    except OverrideParseException:
        return None
    return override


def _without_equals(word: str, after: Sequence[str]) -> str:
    """Returns the message for a word without a value, such as `grid.gap_px`, `seed:0`, `seed 0`."""
    if not word:
        return "one of the words is empty: a setting is KEY=VALUE, such as seed=0"
    # As in YAML: seed:0
    key, colon, value = word.partition(":")
    if colon and value and _KEY.fullmatch(key):
        typed = _typed(key, value)
        return f"{shlex.quote(word)} sets nothing: it is written with =, {typed}"
    if not _KEY.fullmatch(word):
        return (
            f"{shlex.quote(word)} is no setting: "
            "these are written KEY=VALUE, such as seed=0. See --help"
        )
    # As for many other commands: seed 0
    if after:
        following = after[0]
        if "=" not in following and not _KEY.fullmatch(following):
            typed = _typed(word, following)
            return f"{word} {following} are two words: a setting is one, {typed}"
    return f"{word} is given no value: write {word}=VALUE; --help {word} tells what it is"


def _unread(
    key: str,
    value: str,
    sweeps: bool,
) -> str:
    """Returns the message for a word that Hydra's grammar can't read: how it is to be written."""
    # ~ of a home folder, which a shell does not expand behind `=`
    if value.startswith("~"):
        is_own_home = value == "~" or value.startswith("~/")
        home = f"$HOME{value[1:]}" if is_own_home else os.path.expanduser(value)
        # ~NAME of an unknown user stays as it is.
        proposed = "" if home.startswith("~") else f'"{key}={home}", or '
        return (
            f"{key}={value}: the shell expands ~ only where a word begins with it. "
            f"Write {proposed}the whole path"
        )
    typed = shlex.quote(f"{key}={value}")
    closed = f"{key}={_closed(value)}"
    # A bracket that a shell or a space has separated from its other half
    has_one_bracket = value.startswith("[") != value.endswith("]")
    if has_one_bracket and parsed(closed):
        return f"{typed} has a bracket without its other half: write {shlex.quote(closed)}"
    quoted = _with_quotes(key, value, sweeps)
    return (
        f"{typed} can't be read: a value with such characters stands in quotes, and these inside "
        f"of the shell's. Write {quoted}"
    )


def _closed(value: str) -> str:
    """Returns the value with the brackets that it lacks, at its end or at its beginning."""
    # The closing brackets that are still to come, the innermost last
    missing: list[str] = []
    for char in value:
        if char in _OPENING:
            missing.append(_OPENING[char])
        elif char in _OPENING.values():
            expected = missing.pop() if missing else None
            # It closes what was never opened: the opening one has been lost.
            if char != expected:
                return f"[{value}"
    missing.reverse()
    return value + "".join(missing)


def _with_quotes(key: str, value: str, sweeps: bool, *, as_text: bool = False) -> str:
    """Returns the word, for a shell, with quotes around the parts that need them.

    These are elements of a list, values of a sweep, or the whole value. A part needs quotes if
    Hydra can't read it or, with `as_text`, if Hydra would read it as anything but text.
    """
    is_list = value.startswith("[") and value.endswith("]")
    inner = value[1:-1] if is_list else value
    # The parts between commas that are not within quotes
    elements = re.findall(r"""(?:"[^"]*"|'[^']*'|[^,"']+|["'])+""", inner)
    is_sweep = sweeps and len(elements) > 1
    parts = [value]
    if is_list or is_sweep:
        parts = [part.strip() for part in elements]
    for index, part in enumerate(parts):
        override = parsed(f"key={part}")
        if override is None:
            needs_quotes = True
        else:
            needs_quotes = as_text and not isinstance(override.value(), str)
        if needs_quotes:
            parts[index] = _in_quotes(part)
    quoted = ",".join(parts)
    word = f"{key}=[{quoted}]" if is_list else f"{key}={quoted}"
    # If even that can't be read, the whole value is quoted.
    if parsed(word) is None:
        word = f"{key}={_in_quotes(value)}"
    return shlex.quote(word)


def _in_quotes(value: str) -> str:
    """Returns a text in quotes of Hydra's grammar, if possible without escapes."""
    quote = Quote.double
    if '"' in value and "'" not in value:
        quote = Quote.single
    quoted = QuotedString(text=value, quote=quote)
    return quoted.with_quotes()


def _several(key: str, value: str) -> str:
    """Returns the message for several values where one is expected, such as `seed=0,1`."""
    in_quotes = _in_quotes(value)
    whole = shlex.quote(f"{key}={in_quotes}")
    if Path(value).exists():
        # A file or folder whose name has a comma
        return f"{key}={value} is read as several values: write {whole} for what is called that"
    listed = shlex.quote(f"{key}=[{value}]")
    return (
        f"{key}={value} names several values: write {listed} for a list of them, -m before it for "
        f"a run of each, or {whole} if that is one value"
    )


def _check_path(key: str, value: str, word: Override) -> None:
    """Raises `UsageError` for a path that Hydra would read as a number or as true or false."""
    if word.is_sweep_override() or word.is_delete():
        return
    read = word.value()
    if key in _TEXTS and str(read) == value:
        return
    elements = read if isinstance(read, list) else [read]
    for element in elements:
        if isinstance(element, bool | int | float):
            quoted = _with_quotes(key, value, sweeps=False, as_text=True)
            raise UsageError(f"{key}={value} is read as a number, not as a name: write {quoted}")


def values(word: Override) -> list[Any]:
    """Returns the value that a word sets, or all values that a sweep lists.

    For a sweep over a range there are none, and for one over members that match a pattern, which
    Hydra lists when it composes the sweep.
    """
    if not word.is_sweep_override():
        return [word.value()]
    if not word.is_choice_sweep() or word.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    # Hydra gives the values of a sweep as texts, which are parsed once more.
    found = []
    for text in word.sweep_string_iterator():
        override = parsed(f"key={text}")
        if override is not None:
            found.append(override.value())
    return found


def checkpoints(words: Sequence[Override]) -> list[list[str]]:
    """Returns the checkpoints that are named, a list for each point of a sweep.

    Where the setting is not given, there are none.
    """
    return _named("checkpoint", words)


def watched(words: Sequence[Override]) -> list[list[str]]:
    """Returns the runs and sweeps that `watch=` names, a list for each point of a sweep."""
    return _named("watch", words)


def _named(setting: str, words: Sequence[Override]) -> list[list[str]]:
    """Returns the texts that a setting of one or several has, a list for each point of a sweep."""
    last = None
    for word in words:
        # Of a setting that is given twice, the last one counts.
        if word.key_or_group == setting and not word.is_delete():
            last = word
    if last is None:
        return []
    points = []
    for value in values(last):
        names = value if isinstance(value, list) else [value]
        # null and numbers are refused later, by the check of the setting.
        points.append([name for name in names if isinstance(name, str)])
    return points


def check_bare_checkpoint(words: Sequence[str]) -> None:
    """Raises `UsageError` for a checkpoint without its setting, such as `runs/one` or `random`."""
    for word in words:
        if "=" in word:
            continue
        if word in NO_FILES or os.path.exists(word):
            typed = as_word("checkpoint", word)
            raise UsageError(f"{word} is given without its setting: write {typed}")


def check_checkpoints(words: Sequence[Override]) -> None:
    """Raises `UsageError` for a checkpoint that does not exist, and proposes a similar name."""
    for names in checkpoints(words):
        for name in names:
            # A name with $ is an interpolation, which is not resolved yet.
            is_no_path = name in NO_FILES or not name or "$" in name
            # lexists: a link whose target is missing has its own message when it is read.
            if not is_no_path and not os.path.lexists(name):
                raise UsageError(f"checkpoint={name} does not exist{_hint(name)}")


def _hint(name: str) -> str:
    """Returns the end of the message for a checkpoint that does not exist."""
    folder = Path(name).parent
    # A misspelt name such as Random, then a misspelt file or folder
    near = difflib.get_close_matches(
        name.lower(),
        REFERENCE_MODELS,
        n=1,
        cutoff=0.75,
    )
    if not near:
        siblings = sorted(file.name for file in folder.glob("*"))
        last_part = Path(name).name
        similar = difflib.get_close_matches(
            last_part,
            siblings,
            n=1,
            cutoff=0.75,
        )
        near = [str(folder / sibling) for sibling in similar]
    if near:
        typed = as_word("checkpoint", near[0])
        return f": did you mean {typed}?"
    if not folder.is_dir():
        return f", nor is there a folder {folder}; we are in {Path.cwd()}"
    others = " or ".join(REFERENCE_MODELS)
    return f" in {folder.absolute()}: give a run folder, a file of weights, {others}"


def as_value(value: Any) -> str:
    """Returns a plain value as it is written in Hydra's grammar, in quotes where it needs them."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        elements = map(as_value, value)
        return f"[{','.join(elements)}]"
    if isinstance(value, dict):
        entries = []
        for name, entry in value.items():
            entries.append(f"{name}:{as_value(entry)}")
        joined = ",".join(entries)
        return f"{{{joined}}}"
    if not isinstance(value, str):
        return repr(value)
    # An empty text needs quotes, and so does a backslash, which would escape what follows.
    if not value or "\\" in value:
        return _in_quotes(value)
    # Any other text needs quotes unless Hydra reads it as itself.
    override = parsed(f"key={value}")
    if override is None or override.is_sweep_override():
        return _in_quotes(value)
    return value if override.value() == value else _in_quotes(value)


def as_word(key: str, value: Any) -> str:
    """Returns `key=value` as it is typed in a shell."""
    in_grammar = as_value(value)
    return shlex.quote(f"{key}={in_grammar}")


def _typed(key: str, value: str) -> str:
    """Returns `key=value` for a shell, with Hydra's quotes only if Hydra can't read it without."""
    word = f"{key}={value}"
    if parsed(word) is None:
        word = f"{key}={_in_quotes(value)}"
    return shlex.quote(word)
