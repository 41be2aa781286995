"""Tables as every format shows them: published rows, then ours, for the card and for each other set of images."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from relloc.reports.compare import ABOVE, BELOW, INSIDE, MARK_WORDS, Entry, make_entries
from relloc.reports.lines import natural
from relloc.reports.load import Measured
from relloc.reports.missing import Fill, advice, fills
from relloc.reports.published import (
    BEST_LAYER,
    CARD,
    CARD_GROUP,
    CARD_OSS,
    PUBLISHED_MODEL,
    RANDOM,
    SUPERVISED,
    Published,
    card_parts,
    parts_of,
    published_numbers,
)
from relloc.results import LAYERS, Result

ROWS = ("card", "all")
MISSING = "—"  # what stands in a cell of ours that is not measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """`note` is what cells of one origin share ("": the row has it), `details` all there is to say of this one.

    `spread` is like "± 0.8".
    """

    text: str
    note: str = ""
    details: str = ""
    spread: str = ""
    mark: str = ""
    is_best: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line, of which `setting` says what is not as published; in place of a cell that is None stands `empty`.

    `note` is that of all its cells.
    """

    label: str
    is_published: bool
    cells: tuple[Cell | None, ...]
    setting: str = ""
    empty: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The notes of its rows and cells are numbered from 1, equal ones once."""

    title: str
    caption: str = ""
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def notes(self) -> dict[str, int]:
        texts = (
            text
            for row in self.rows
            for text in (row.note, *(cell.note for cell in row.cells if cell))
        )
        return {
            text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)), start=1)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The tables of the same images."""

    title: str
    tables: tuple[Table, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is printed; `entries` and `published` are the long form of the tables.

    `advice` says what to do about missing cells, `missing` has the commands; "" where none is missing.
    """

    title: str
    groups: tuple[Group, ...]
    legend: tuple[str, ...]
    advice: str
    missing: tuple[Fill, ...]
    entries: tuple[Entry, ...] = ()
    published: tuple[Published, ...] = ()


def make_report(measured: Iterable[Measured], rows: str = "card") -> Report:
    """Our numbers beside the published ones: the "card" rows, or "all" of published.csv."""
    entries = make_entries(measured)
    published = tuple(each for each in published_numbers() if rows == "all" or each.kind == "card")
    groups = []
    for title in (CARD_GROUP, *sorted({each.group for each in entries} - {CARD_GROUP})):
        ours = [each for each in entries if each.group == title and each.is_shown]
        numbers = published if title == CARD_GROUP else ()
        # In the order of the card, then those that it does not have
        names = dict.fromkeys(part.table for part in card_parts())
        names |= dict.fromkeys(sorted({each.result.table for each in ours}))
        tables = [_table(name, ours, numbers) for name in names]
        if shown := tuple(table for table in tables if table.rows):
            groups.append(Group(title=title, tables=shown))
    missing = fills(entries)
    return Report(
        title="Our numbers beside the published ones",
        groups=tuple(groups),
        legend=tuple(_legend(entries)),
        advice=advice(entries, missing),
        missing=missing,
        entries=tuple(entries),
        published=published,
    )


def _table(title: str, ours: Sequence[Entry], published: Sequence[Published]) -> Table:
    numbers = [each for each in published if each.table == title]
    here = [each for each in ours if each.result.table == title]
    of_card = [column for part in parts_of(title) for column in part.columns]
    # Beside published numbers the card's columns stay though nothing fills them yet
    columns = (
        [each.column for each in numbers]
        + [each.result.column for each in here]
        + (of_card if published else [])
    )
    ordered = column_order(set(columns), of_card)
    return Table(
        title=title,
        caption=" ".join(_caption(title, here, numbers)) if published else "",
        columns=tuple(ordered),
        rows=(*_published_rows(numbers, ordered), *_our_rows(here, ordered)),
    )


def column_order(columns: Iterable[str], of_card: Iterable[str]) -> list[str]:
    """Columns as the card has them, then others; those that differ by a number, as `k=5` and `k=20`, by its size."""

    def head(column: str) -> str:
        return column.rstrip("0123456789")

    heads = [head(column) for column in (*of_card, *LAYERS)]
    return sorted(
        columns,
        key=lambda column: ([*heads, head(column)].index(head(column)), natural(column)),
    )


def _caption(title: str, here: Sequence[Entry], numbers: Sequence[Published]) -> Iterable[str]:
    """Tolerance of the published numbers, what is not built, and what is not measured with the command for it."""
    tolerances = dict.fromkeys(f"{number.tolerance:.1f}" for number in numbers)
    if tolerances:
        yield f"Tolerance: ± {' or '.join(tolerances)} points."
    there = {each.result.column for each in here}
    for part in parts_of(title):
        if not part.evaluation:
            yield "Not built: relloc has no such evaluation yet."
        elif not there & set(part.columns):
            yield (
                f"Not measured: python -m relloc.evaluate checkpoint=RUN eval={part.evaluation}, about {part.hours} h "
                "on one GPU (an estimate)."
            )


def _published_rows(numbers: Sequence[Published], columns: Sequence[str]) -> Iterable[Row]:
    rows: dict[str, dict[str, list[Published]]] = {}
    for number in numbers:
        rows.setdefault(number.row, {}).setdefault(number.column, []).append(number)
    for name, cells in rows.items():
        shown = tuple(
            _published_cell(cells[column]) if column in cells else None for column in columns
        )
        yield Row(label=name, is_published=True, cells=shown)


def _published_cell(numbers: Sequence[Published]) -> Cell:
    """A cell of one row's number, or of its several editions."""
    text = " / ".join(number.printed for number in numbers)
    if numbers[0].column == BEST_LAYER and numbers[0].layer:
        text += f" ({numbers[0].layer})"
    if len(numbers) == 1:
        note = f"published: {numbers[0].source}"
    else:
        note = "published: " + "; ".join(
            f"{each.printed} in {each.edition} ({each.source})" for each in numbers
        )
    return Cell(text=text, note=note, details=note)


def _our_rows(here: Sequence[Entry], columns: Sequence[str]) -> Iterable[Row]:
    rows: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in here:
        rows.setdefault((entry.label, entry.setting), {})[entry.result.column] = entry
    for (label, setting), cells in rows.items():
        of_label = [entry for entry in here if entry.label == label]
        # Whether there are commands for what else the row lacks
        is_to_be_filled = any(
            each.fills_card and not each.measured.variant for each in cells.values()
        )
        yield Row(
            label=label,
            is_published=False,
            cells=tuple(
                _our_cell(cells[column]) if column in cells else None for column in columns
            ),
            setting=setting,
            empty=MISSING if is_to_be_filled else "",
            note="" if of_label[0].group == CARD_GROUP else note(of_label),
        )


def _our_cell(entry: Entry) -> Cell:
    """A cell of ours; only on the card it has a note of its own."""
    result, std = entry.result, entry.spread.get("std")
    return Cell(
        text=f"{result.value:.2f}" + (f" ({result.layer})" if result.column == BEST_LAYER else ""),
        note=note([entry]) if entry.group == CARD_GROUP else "",
        details="\n".join(_details(entry)),
        spread="" if std is None else f"± {std:.2f}",
        mark=entry.mark,
        is_best=entry.is_best,
    )


def facts(row: Result) -> list[str]:
    """How a number was measured, a few words each."""
    protocol = [f"protocol {row.protocol}"] if row.protocol else []
    deviations = (f"deviation: {one}" for one in row.deviations)
    return [
        one
        for one in (*protocol, row.choice, *row.details, *deviations, row.view, row.precision)
        if one
    ]


def note(entries: Sequence[Entry]) -> str:
    """Runs, seeds and commits of numbers, and what is said of all of them; … for what is said of some only."""
    runs = [entry.measured.run for entry in entries]
    of_each = [facts(entry.result) for entry in entries]
    shared = [one for one in of_each[0] if all(one in said for said in of_each)]
    gap = ["…"] if max(map(len, of_each)) > len(shared) else []
    told = {
        "run": [run.name for run in runs],
        "seed": [str(entry.result.seed) for entry in entries],
        "commit": [short_commit(run.commit) for run in runs],
    }
    words = [f"{name} {' and '.join(dict.fromkeys(of_all))}" for name, of_all in told.items()]
    return "; ".join(
        [*words, *shared, *gap, *dict.fromkeys(entry.why for entry in entries if entry.why)]
    )


def short_commit(commit: str) -> str:
    """Ten digits of a commit, and whether files had been changed."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]+", r"\1", commit)


def _details(entry: Entry) -> Iterable[str]:
    row, run = entry.result, entry.measured.run
    yield f"run {run.name} ({run.folder})"
    yield f"seed {row.seed}, commit {run.commit}"
    yield from facts(row)
    metric = row.metric if row.unit == "%" else f"{row.metric} in {row.unit}"
    yield ", ".join(
        filter(None, (f"{row.dataset} {row.split}", f"n = {row.n:,}", row.layer, metric))
    )
    if entry.measured.digest:
        yield f"images {entry.measured.digest}"
    if row.low is not None and row.high is not None:
        yield f"95 % interval {row.low:.2f} to {row.high:.2f}"
    yield from (f"{name} over draws: {value:.2f}" for name, value in entry.spread.items())
    if entry.why:
        yield entry.why
    if entry.mark:
        numbers = " / ".join(each.printed for each in entry.beside)
        beside = entry.beside[0]
        yield f"{MARK_WORDS[entry.mark]}: {beside.row} {numbers}, tolerance {beside.tolerance:g}"
    yield from (
        f"replaces {old.result.value:.2f} of run {old.run.name}" for old in entry.measured.older
    )


def _legend(entries: Sequence[Entry]) -> Iterable[str]:
    yield (
        "Numbers are percent unless a line says otherwise. A line is a checkpoint, a way of batch norm and a seed; "
        "batch-norm statistics are as trained, as in all published rows, where nothing is said."
    )
    yield (
        f"{INSIDE} inside the tolerance of the published number, {ABOVE} above it, {BELOW} below it (where a row gives "
        f"several values: of their range). Compared are {PUBLISHED_MODEL} lines: random with {RANDOM}, torchvision "
        f"with {SUPERVISED}, all others with {CARD}, or {CARD_OSS} where that has no number. Recalibrated lines and "
        "those with a setting of their own are marked as well, though they follow another protocol; not so other views "
        "of the images and other layers of nearest neighbors."
    )
    yield (
        "Bold: the highest of several rows of ours in a column with the same setting, supervised weights aside; the "
        "layers of nearest neighbors are rows that compete."
    )
    if any(each.result.spread for each in entries):
        yield "± is the standard deviation over the draws of low-shot examples."
    if replaced := sum(len(each.measured.older) for each in entries):
        yield f"Of numbers measured alike (by fingerprint) the newest stands: {replaced} older left out."
    if any(each.measured.images for each in entries):
        yield (
            "Where images are named by a digest, several sets of them have the same name, split and number: numbers of "
            "different digests do not compare. The data sets in run.json have the digests in full; packed images have "
            "another than the originals, from which they differ by their size and compression."
        )
    if any(each.measured.variant for each in entries):
        yield (
            "Lines that end in a run were measured otherwise than the others of their name: on other images, by other "
            "settings or of other weights. Do not take them for repeats of each other."
        )
