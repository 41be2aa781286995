"""Making a report: published rows, then ours, in the tables of the card and of each other set of images."""

from collections.abc import Iterable, Sequence

from relloc.reports.cells import Spreads, our_cell, published_cell, spreads_of
from relloc.reports.entries import ABOVE, BELOW, INSIDE, Entry, make_entries
from relloc.reports.groups import CARD_GROUP
from relloc.reports.measured import Measured
from relloc.reports.missing import advice, commands, is_cell_of_card
from relloc.reports.notes import line_note
from relloc.reports.places import SECTIONS, Place, column_order, place
from relloc.reports.published import CARD, CARD_OSS, PUBLISHED_MODEL, RANDOM, SUPERVISED, Published, published_numbers
from relloc.reports.table import MISSING, Group, Report, Row, Table

ROWS = ("card", "all")
_TITLE = "Our numbers beside the published ones"


def make_report(measured: Iterable[Measured], rows: str = "card") -> Report:
    """Our numbers beside the published ones: the "card" rows, or "all" of published.csv."""
    entries = make_entries(measured)
    published = tuple(each for each in published_numbers() if rows == "all" or each.kind == "card")
    groups = [_group(CARD_GROUP, entries, published, show_all=rows == "all")]
    for title in sorted({each.group for each in entries} - {CARD_GROUP}):
        groups.append(_group(title, entries, (), show_all=False))
    return Report(
        title=_TITLE,
        groups=tuple(group for group in groups if group.tables),
        legend=_legend(entries),
        advice=advice(entries),
        missing=commands(entries),
        entries=tuple(entries),
        published=published,
    )


def _group(title: str, entries: Sequence[Entry], published: Sequence[Published], *, show_all: bool) -> Group:
    ours = [each for each in entries if each.group == title and each.place]
    hidden = {section.title for section in SECTIONS if not section.built and not show_all}
    sections = {each.place.section: None for each in ours if each.place}
    if published:
        sections = {section.title: None for section in SECTIONS if section.title not in hidden} | sections
    order = [section.title for section in SECTIONS]
    ranked = sorted(sections, key=lambda name: (order.index(name) if name in order else len(order), name))
    elsewhere = {} if title == CARD_GROUP else {section.title: section.elsewhere for section in SECTIONS}
    spreads = spreads_of(entries)
    tables = (_table(name, elsewhere.get(name, name), ours, published, spreads) for name in ranked)
    return Group(title=title, tables=tuple(table for table in tables if table.rows))


def _table(section: str, title: str, ours: Sequence[Entry], published: Sequence[Published], spreads: Spreads) -> Table:
    numbers = [(each, where) for each in published if (where := _place_of(each)).section == section]
    here = [(each, each.place) for each in ours if each.place and each.place.section == section]
    columns = column_order(
        {where.column for _, where in (*numbers, *here)} | _card_columns(section, published), section
    )
    rows = (*_published_rows(numbers, columns), *_our_rows(here, columns, spreads))
    tolerances = dict.fromkeys(f"{number.tolerance:g}" for entry, _ in here for number in entry.beside)
    caption = f"Tolerance: ± {' or '.join(tolerances)} points." if tolerances else ""
    return Table(title=title, caption=caption, columns=tuple(columns), rows=rows)


def _card_columns(section: str, published: Sequence[Published]) -> set[str]:
    """Columns that stay though nothing fills them yet."""
    if not published:
        return set()
    return {column for each in SECTIONS if each.title == section for column in each.all_columns}


def _place_of(number: Published) -> Place:
    where = place(number.evaluation, number.layer, number.metric)
    if where is None:
        raise ValueError(f"published.csv has {number.evaluation} {number.metric}, which has no place in a table")
    return where


def _published_rows(numbers: Sequence[tuple[Published, Place]], columns: Sequence[str]) -> tuple[Row, ...]:
    rows: dict[str, dict[str, list[Published]]] = {}
    for number, where in numbers:
        rows.setdefault(number.row, {}).setdefault(where.column, []).append(number)
    return tuple(
        Row(
            label=name,
            is_published=True,
            cells=tuple(published_cell(cells[column]) if column in cells else None for column in columns),
        )
        for name, cells in rows.items()
    )


def _our_rows(here: Sequence[tuple[Entry, Place]], columns: Sequence[str], spreads: Spreads) -> tuple[Row, ...]:
    rows: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry, where in here:
        rows.setdefault((entry.label, where.words), {})[where.column] = entry
    of_label: dict[str, list[Entry]] = {}
    for entry, _ in here:
        of_label.setdefault(entry.label, []).append(entry)
    return tuple(
        Row(
            label=label,
            is_published=False,
            cells=tuple(our_cell(cells[column], spreads) if column in cells else None for column in columns),
            setting=setting,
            empty=MISSING if any(map(_is_to_be_filled, cells.values())) else "",
            note="" if of_label[label][0].group == CARD_GROUP else line_note(of_label[label]),
        )
        for (label, setting), cells in rows.items()
    )


def _is_to_be_filled(entry: Entry) -> bool:
    """Whether there are commands for what else the row lacks."""
    return is_cell_of_card(entry) and not entry.measured.apart


def _legend(entries: Sequence[Entry]) -> tuple[str, ...]:
    replaced = sum(len(each.measured.older) for each in entries)
    lines = [
        "Numbers are percent unless a line says otherwise. A line is a checkpoint, a way of batch norm and a seed; "
        "batch-norm statistics are as trained, as in all published rows, where nothing is said.",
        f"{INSIDE} inside the tolerance of the published number, {ABOVE} above it, {BELOW} below it (where a row gives "
        f"several values: of their range). Compared are {PUBLISHED_MODEL} lines: random with {RANDOM}, torchvision "
        f"with {SUPERVISED}, all others with {CARD}, or {CARD_OSS} where that has no number. Recalibrated lines and "
        "those with a setting of their own are marked as well, though they follow another protocol; not so other views "
        "of the images and other layers of nearest neighbors.",
        "Bold: the highest of several rows of ours in a column with the same setting, supervised weights aside; the "
        "layers of nearest neighbors are rows that compete.",
    ]
    if any("_std" in each.result.metric for each in entries):
        lines.append("± is the standard deviation over the draws of low-shot examples.")
    if replaced:
        lines.append(f"Of numbers measured alike (by fingerprint) the newest stands: {replaced} older left out.")
    if any(each.measured.images for each in entries):
        lines.append(
            "Where images are named by a digest, several sets of them have the same name, split and number: numbers of "
            "different digests do not compare. The data sets in run.json have the digests in full; packed images have "
            "another than the originals, from which they differ by their size and compression."
        )
    if any(each.measured.apart for each in entries):
        lines.append(
            "Lines that end in a run were measured otherwise than the others of their name: on other images, by other "
            "settings or of other weights. Do not take them for repeats of each other."
        )
    return tuple(lines)
