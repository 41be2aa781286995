"""Notes below tables: where the numbers of a cell, or of a whole line, come from."""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence

from relloc.reports.entries import Entry
from relloc.results import Result

_GAP = "…"


def cell_note(entry: Entry) -> str:
    """Run, seed, commit, protocol and how the layer was chosen."""
    return line_note([entry])


def line_note(entries: Sequence[Entry]) -> str:
    """As `cell_note` of all of them together: the protocol is what theirs have in common."""
    runs = [entry.measured.run for entry in entries]
    words = [
        f"run {_listed(run.name for run in runs)}",
        f"seed {_listed(str(entry.result.seed) for entry in entries)}",
        f"commit {_listed(short_commit(run.commit) for run in runs)}",
        shared_words([said(entry.result) for entry in entries]),
    ]
    return "; ".join([*words, *dict.fromkeys(entry.why for entry in entries if entry.why)])


def said(row: Result) -> str:
    """How a number was measured, in one sentence."""
    facts = (row.protocol, row.choice, *row.details, *(f"deviation: {one}" for one in row.deviations))
    return "; ".join(filter(None, (*facts, row.view, row.precision)))


def _listed(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def shared_words(texts: Sequence[str]) -> str:
    """The words that all texts have in the same order, with … for those that differ (and one or two between such)."""
    words = functools.reduce(_shared, (re.split(r"(; |, | )", text) for text in dict.fromkeys(texts)))
    joined = re.sub(rf"{_GAP}(?:(?:[ ,]*[^ ,;{_GAP}]+){{0,2}}[ ,]*{_GAP}|[ ,;]*{_GAP})+", _GAP, "".join(words))
    return re.sub(rf"{_GAP}(?=[^ ,;])", f"{_GAP} ", re.sub(rf"(?<=\S){_GAP}", f" {_GAP}", joined))


def _shared(one: Sequence[str], other: Sequence[str]) -> list[str]:
    shared: list[str] = []
    at, other_at = 0, 0
    for block in difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        shared += [_GAP] if (block.a, block.b) != (at, other_at) else []
        shared += one[block.a : block.a + block.size]
        at, other_at = block.a + block.size, block.b + block.size
    return shared


def short_commit(commit: str) -> str:
    """Ten digits of a commit, and whether files had been changed."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]+", r"\1", commit)
