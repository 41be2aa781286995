"""Settings of the launcher on the command line: a comma in one of them is part of its value, not a sweep."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.types import ChoiceSweep

from relloc.runs.command_line import parsed

# partition=a,b and exclude=n[1-3],n7 are how SLURM itself has them
_SETTING = re.compile(r"(\+{0,2}(?:hydra\.)?launcher\.[\w.@-]+)=(.+)", re.DOTALL)
# Of hydra-submitit-launcher these are text: a list, as launcher.partition takes one, is written as SLURM has it
_LIST = re.compile(r"(hydra\.launcher\.(?:partition|exclude))=\[([\w.-]+(?: *, *[\w.-]+)*)\]")


def with_one_value_each(words: Sequence[str]) -> list[str]:
    """The words with values of launcher.* and hydra.launcher.* quoted where Hydra would sweep or not read them.

    Lists (but where hydra.launcher takes text), mappings and what is quoted already stay, and so does choice(...):
    that is a sweep on purpose, which the launcher refuses.
    """
    return [_with_one_value(word) for word in words]


def _with_one_value(word: str) -> str:
    if (listed := _LIST.fullmatch(word)) is not None:
        word = f"{listed[1]}={listed[2].replace(' ', '')}"
    found = _SETTING.fullmatch(word)
    if found is None or not _needs_quotes(word):
        return word
    value = re.sub(
        r"(\\*)'", r"\1\1\\'", found[2]
    )  # in quotes, a backslash counts only before a quote
    ending = re.search(r"\\*$", value)
    return f"{found[1]}='{value}{ending[0] if ending else ''}'"


def _needs_quotes(word: str) -> bool:
    override = parsed(word)
    if override is None:
        return True
    value = override.value()
    if isinstance(value, list):  # [rack1|rack2] is one word of SLURM's
        return word.partition("=")[0].endswith("launcher.constraint")
    return isinstance(value, ChoiceSweep) and value.simple_form
