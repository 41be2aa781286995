"""Cells: what a number looks like, and what is said of where it comes from."""

from collections.abc import Iterable, Mapping, Sequence

from relloc.reports.entries import MARK_WORDS, Entry
from relloc.reports.groups import CARD_GROUP, view_of
from relloc.reports.notes import cell_note, said
from relloc.reports.places import BEST_LAYER
from relloc.reports.published import Published
from relloc.reports.table import Cell

Spreads = Mapping[tuple[object, ...], Mapping[str, float]]


def published_cell(numbers: Sequence[Published]) -> Cell:
    """A cell of one row's number, or of its several editions."""
    text = " / ".join(number.printed for number in numbers)
    if numbers[0].metric == "map_best" and numbers[0].layer:
        text += f" ({numbers[0].layer})"
    if len(numbers) == 1:
        note = f"published: {numbers[0].source}"
    else:
        note = "published: " + "; ".join(f"{each.printed} in {each.edition} ({each.source})" for each in numbers)
    return Cell(text=text, note=note, details=note)


def our_cell(entry: Entry, spreads: Spreads) -> Cell:
    """A cell of ours; only on the card it has a note of its own."""
    result = entry.result
    spread = spreads.get(_key(entry, result.metric), {})
    text = f"{result.value:.2f}"
    if entry.place and entry.place.column == BEST_LAYER:
        text += f" ({result.layer})"
    return Cell(
        text=text,
        note=cell_note(entry) if entry.group == CARD_GROUP else "",
        details=_details(entry, spread),
        spread=f"± {spread['std']:.2f}" if "std" in spread else "",
        mark=entry.mark,
        best=entry.best,
    )


def spreads_of(entries: Iterable[Entry]) -> Spreads:
    """For each metric whose std, min or max over draws an evaluation gave beside it, these."""
    spreads: dict[tuple[object, ...], dict[str, float]] = {}
    for entry in entries:
        metric, _, ending = entry.result.metric.rpartition("_")
        if ending in ("std", "min", "max"):
            spreads.setdefault(_key(entry, metric), {})[ending] = entry.result.value
    return spreads


def _key(entry: Entry, metric: str) -> tuple[object, ...]:
    row = entry.result
    return entry.measured.line, entry.group, view_of(row), row.eval, row.layer, metric


def _details(entry: Entry, spread: Mapping[str, float]) -> str:
    row, run = entry.result, entry.measured.run
    lines = [f"run {run.name} ({run.folder})", f"seed {row.seed}, commit {run.commit}", f"protocol: {said(row)}"]
    lines.append(f"{row.dataset} {row.split}, n = {row.n:,}, {row.layer}, {row.metric}")
    if entry.measured.digest:
        lines.append(f"images {entry.measured.digest}")
    if row.low is not None and row.high is not None:
        lines.append(f"95 % interval {row.low:.2f} to {row.high:.2f}")
    if spread:
        lines.append("over draws: " + ", ".join(f"{name} {value:.2f}" for name, value in spread.items()))
    if entry.why:
        lines.append(entry.why)
    if entry.mark:
        numbers = " / ".join(each.printed for each in entry.beside)
        beside = entry.beside[0]
        lines.append(f"{MARK_WORDS[entry.mark]}: {beside.row} {numbers}, tolerance {beside.tolerance:g}")
    lines += [f"replaces {old.result.value:.2f} of run {old.run.name}" for old in entry.measured.older]
    return "\n".join(lines)
