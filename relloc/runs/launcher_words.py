"""Quotes the launcher's settings on a command line.

A comma in one of them is part of its value and does not start a sweep.
"""

import re
from collections.abc import Sequence

from hydra.core.override_parser.types import ChoiceSweep

from relloc.runs.command_line import parsed

# SLURM itself writes partition=a,b and exclude=n[1-3],n7.
_SETTING = re.compile(
    r"(\+{0,2}(?:hydra\.)?launcher\.[\w.@-]+)=(.+)",
    re.DOTALL,
)
# For hydra-submitit-launcher these are texts: a list is turned into what SLURM writes, a,b.
_LIST = re.compile(r"(hydra\.launcher\.(?:partition|exclude))=\[([\w.-]+(?: *, *[\w.-]+)*)\]")


def with_one_value_each(words: Sequence[str]) -> list[str]:
    """Returns the words with values of launcher.* and hydra.launcher.* quoted where necessary.

    That is where Hydra would sweep over them or could not read them. Lists (except where
    hydra.launcher takes text), mappings and quoted values are left as they are, and so is
    choice(...): that is a sweep on purpose, which the launcher refuses.
    """
    quoted = []
    for word in words:
        quoted.append(_with_one_value(word))
    return quoted


def _with_one_value(word: str) -> str:
    """Quotes the value of one word if it is a setting of the launcher and needs quotes."""
    listed = _LIST.fullmatch(word)
    if listed is not None:
        key, elements = listed.groups()
        without_spaces = elements.replace(" ", "")
        word = f"{key}={without_spaces}"
    setting = _SETTING.fullmatch(word)
    if setting is None or not _needs_quotes(word):
        return word
    key, value = setting.groups()
    # Within quotes, a backslash escapes only before a quote: double those before one, and those
    # at the end, before the closing quote.
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)
    without_backslashes = value.rstrip("\\")
    backslashes = value[len(without_backslashes) :]
    return f"{key}='{value}{backslashes}'"


def _needs_quotes(word: str) -> bool:
    """Whether Hydra can't read the word, or would take its value for a sweep or a list."""
    override = parsed(word)
    if override is None:
        return True
    value = override.value()
    # [rack1|rack2] looks like a list and is one constraint of SLURM's.
    if isinstance(value, list):
        key, _, _ = word.partition("=")
        return key.endswith("launcher.constraint")
    # The simple form is a,b; the other one, choice(a,b), is a sweep on purpose.
    return isinstance(value, ChoiceSweep) and value.simple_form
