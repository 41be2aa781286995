"""Builds the tables of a report, which all output formats share.

A report has a group of tables for the published card, where ours have to do with it, one for each
study, and one for each other set of images. In each table the published rows stand first, then
ours.
"""

from collections.abc import Collection, Iterable, Sequence

from relloc.reports.compare import (
    ABOVE,
    BELOW,
    INSIDE,
    ReportEntry,
    make_entries,
    signed_value,
)
from relloc.reports.cost import COST_CAPTION, COST_COLUMNS, COST_TITLE, cost_lines
from relloc.reports.hours import hours_text
from relloc.reports.lines import image_words, natural_sort_key
from relloc.reports.load import Measured
from relloc.reports.missing import FILL_CARD, advice, missing_evaluations
from relloc.reports.notes import details, is_of_study, note, own_images, row_notes, shared_texts
from relloc.reports.parts import MISSING, Cell, Group, Report, Row, Table
from relloc.reports.published import (
    BEST_LAYER,
    CARD,
    CARD_GROUP,
    CARD_OSS,
    PUBLISHED_MODEL,
    RANDOM,
    SUPERVISED,
    CardPart,
    Published,
    card_parts,
    concerns_card,
    parts_of,
    published_numbers,
)
from relloc.results import LAYERS, Result, known_interval
from relloc.terminal import quantity

# The choices of --rows: published relative location and its controls, or other pretext tasks too
ROWS = ("card", "all")
_PERCENT = "%"
# Lines of other images whose numbers a caption gives: the tables of these images have all of them.
_MOST_LINES_NAMED = 3


def make_report(measured: Iterable[Measured], rows: str = "") -> Report:
    """Returns the report of our numbers, beside the published ones where these have to do with it.

    Args:
        measured: Our numbers, the oldest first, as `find_measured` returns them.
        rows: Which published rows to show, one of `ROWS`; "" for those of the card if any of our
            numbers is a reason to (`concerns_card`), and otherwise none.
    """
    entries = make_entries(measured)
    has_card = bool(rows) or any(concerns_card(entry.result) for entry in entries)
    published: tuple[Published, ...] = ()
    if has_card:
        published = published_numbers()
        if rows != "all":
            published = tuple(number for number in published if number.kind == "card")
    # The card stands first, and other sets of images follow by name
    other_titles = {each.group for each in entries} - {CARD_GROUP}
    titles = sorted(other_titles)
    if has_card:
        titles.insert(0, CARD_GROUP)
    groups = []
    for title in titles:
        ours = [each for each in entries if each.group == title and each.is_shown]
        elsewhere = [each for each in entries if each.group != title and each.is_shown]
        # Published numbers were measured on the images of the card, and compare with no others
        numbers = published if title == CARD_GROUP else ()
        # Tables in the order of the card, then those that it does not have
        on_card = [part.table for part in card_parts()]
        of_ours = {each.result.table for each in ours}
        names = dict.fromkeys([*on_card, *sorted(of_ours)])
        tables = [_table(name, ours, elsewhere, numbers) for name in names]
        # A table without any row says nothing
        shown = tuple(table for table in tables if table.rows)
        if shown:
            groups.append(Group(title=title, tables=shown))
    # Commands that would fill the dashes of the card
    missing = missing_evaluations(entries)
    return Report(
        title="Our numbers beside the published ones" if has_card else "Our numbers",
        groups=tuple(groups),
        legend=tuple(_legend(entries, has_card=has_card)),
        advice=advice(entries, missing) if has_card else "",
        missing=missing,
        cost=_cost(entries) if has_card else None,
        entries=tuple(entries),
        published=published,
    )


def _cost(entries: Sequence[ReportEntry]) -> Group:
    """Returns the table of what the card costs; `entries` are all our numbers."""
    rows = []
    for line in cost_lines(entries):
        cells = [Cell(text=text, details=line.details) if text else None for text in line.texts]
        rows.append(Row(label=line.label, is_published=False, cells=tuple(cells)))
    table = Table(
        title="Hours on one GPU",
        caption=COST_CAPTION,
        columns=COST_COLUMNS,
        rows=tuple(rows),
    )
    return Group(title=COST_TITLE, tables=(table,))


def _table(
    title: str,
    ours: Sequence[ReportEntry],
    elsewhere: Sequence[ReportEntry],
    published: Sequence[Published],
) -> Table:
    """Returns one table of a group.

    `ours` and `published` are all numbers of the group, `elsewhere` those of ours in other groups.
    """
    numbers = [each for each in published if each.table == title]
    entries = [each for each in ours if each.result.table == title]
    on_other_images = [each for each in elsewhere if each.result.table == title]
    card_columns: list[str] = []
    for part in parts_of(title):
        card_columns += part.columns
    columns = {each.column for each in numbers}
    columns |= {each.result.column for each in entries}
    # Beside published numbers the card's columns stay though nothing fills them yet
    if published:
        columns |= set(card_columns)
    ordered = column_order(columns, card_columns)
    caption = ""
    # The caption names gaps of the card, which numbers on other images do not fill
    if published:
        sentences = _caption(title, entries, on_other_images, numbers)
        caption = " ".join(sentences)
    shared_images = _shared_images(entries)
    if shared_images:
        caption = f"Images: {', '.join(shared_images)}."
    rows = list(_published_rows(numbers, ordered))
    rows += _our_rows(entries, ordered, shared_images)
    return Table(
        title=title,
        caption=caption,
        columns=tuple(ordered),
        rows=tuple(rows),
    )


def column_order(columns: Iterable[str], card_columns: Iterable[str]) -> list[str]:
    """Returns columns in reading order: as on the card, then by layer, then others.

    Columns that differ by a number are sorted by its size: `k=5` stands before `k=20`.
    """

    def stem(column: str) -> str:
        return column.rstrip("0123456789")

    # Columns of one stem stay together, though the card has only some of them
    stems = [stem(column) for column in (*card_columns, *LAYERS)]

    def rank(column: str) -> tuple[int, list[tuple[int, str]]]:
        own = stem(column)
        # Columns that are on neither list stand last
        position = stems.index(own) if own in stems else len(stems)
        return position, natural_sort_key(column)

    return sorted(columns, key=rank)


def _caption(
    title: str,
    entries: Sequence[ReportEntry],
    on_other_images: Sequence[ReportEntry],
    numbers: Sequence[Published],
) -> Iterable[str]:
    """Yields the sentences below a table of the card.

    They give the tolerance of its published numbers, and the evaluations that are not built or not
    measured yet, with the command that measures them. What was measured on other images alone is
    named with its numbers.
    """
    rounded = [f"{number.tolerance:.1f}" for number in numbers]
    tolerances = dict.fromkeys(rounded)
    if tolerances:
        listed = " or ".join(tolerances)
        yield f"Tolerance: ± {listed} points."
    measured_columns = {entry.result.column for entry in entries}
    # A part is what one evaluation fills: some columns of the table
    for part in parts_of(title):
        if not part.evaluation:
            yield "Not built: relloc has no such evaluation yet."
        elif measured_columns.isdisjoint(part.columns):
            words = [f"python -m relloc.evaluate checkpoint=RUN eval={part.evaluation}"]
            words.append(hours_text(part.evaluation, part.hours))
            command = ", ".join(filter(None, words))
            found = list(_numbers_by_images(on_other_images, part))
            if found:
                listed = "; ".join(found)
                yield f"Measured on other images alone: {listed}. On those of the card: {command}."
            else:
                yield f"Not measured: {command}."


def _numbers_by_images(entries: Sequence[ReportEntry], part: CardPart) -> Iterable[str]:
    """Yields for each other set of images what the evaluation of a part measured there.

    Of each line it gives one number: the headline, or the best where several are or none is.
    """
    by_images: dict[str, dict[str, list[ReportEntry]]] = {}
    for entry in entries:
        row = entry.result
        if row.eval != part.evaluation or row.column not in part.columns:
            continue
        images = f"{row.dataset} {row.split}, {quantity(row.n, 'image', commas=True)}"
        line = ", ".join(filter(None, (entry.label, entry.setting)))
        by_images.setdefault(images, {}).setdefault(line, []).append(entry)
    for images, lines in sorted(by_images.items()):
        phrases = []
        for line, of_line in list(lines.items())[:_MOST_LINES_NAMED]:
            headlines = [each for each in of_line if each.result.headline]
            best = max(headlines or of_line, key=lambda each: signed_value(each.result)).result
            phrases.append(f"{best.column} {best.value:.2f} ({line})")
        if len(lines) > len(phrases):
            phrases.append(f"{len(lines) - len(phrases)} more below")
        yield f"{images}: {', '.join(phrases)}"


def _published_rows(numbers: Sequence[Published], columns: Sequence[str]) -> Iterable[Row]:
    # A cell has several numbers where editions of one source disagree
    rows: dict[tuple[str, str], dict[str, list[Published]]] = {}
    for number in numbers:
        in_column = rows.setdefault((number.row, number.variant), {})
        editions = in_column.setdefault(number.column, [])
        editions.append(number)
    for (name, variant), in_column in rows.items():
        cells = []
        for column in columns:
            editions = in_column.get(column)
            cells.append(_published_cell(editions) if editions else None)
        yield Row(label=name, is_published=True, cells=tuple(cells), setting=variant)


def _published_cell(numbers: Sequence[Published]) -> Cell:
    """Returns the cell of one row's number, or of its several editions."""
    # As printed in the source, with its own number of digits
    first = numbers[0]
    text = " / ".join(number.printed for number in numbers)
    # As in our own cells of such a column, the layer is a part of the answer
    if first.column == BEST_LAYER and first.layer:
        text += f" ({first.layer})"
    if len(numbers) == 1:
        note = f"published: {first.source}"
    else:
        editions = []
        for number in numbers:
            editions.append(f"{number.printed} in {number.edition} ({number.source})")
        note = "published: " + "; ".join(editions)
    return Cell(text=text, note=note, details=note)


def _our_rows(
    entries: Sequence[ReportEntry], columns: Sequence[str], shared_images: Collection[str]
) -> Iterable[Row]:
    """Yields the rows of our numbers; the table itself says `shared_images` of a study."""
    # A row is a model with a setting: numbers by other settings have rows of their own
    rows: dict[tuple[str, str], dict[str, ReportEntry]] = {}
    images_of = _images_by_setting(entries)
    for entry in entries:
        words = [entry.setting]
        # Where one setting was measured on several sets of images, each of them has a row
        if len(images_of[entry.setting]) > 1:
            words += own_images(entry, shared_images)
        setting = ", ".join(filter(None, words))
        in_column = rows.setdefault((entry.label, setting), {})
        in_column[entry.result.column] = entry
    for (label, setting), in_column in rows.items():
        same_label = [entry for entry in entries if entry.label == label]
        # A dash promises a command below the tables that fills the cell. There is none for rows
        # that fill no cell of the card, or that hold repeated measurements
        is_to_be_filled = False
        for entry in in_column.values():
            if entry.fills_card and not entry.measured.variant:
                is_to_be_filled = True
        units = {entry.result.unit for entry in in_column.values()}
        # A unit that all numbers of a row have is said once, and percent not at all
        unit = units.pop() if len(units) == 1 else _PERCENT
        cells = []
        for column in columns:
            entry = in_column.get(column)
            cells.append(_our_cell(entry, unit) if entry else None)
        # On the card each cell has a note of its own instead
        is_on_card = same_label[0].group == CARD_GROUP
        notes = ()
        if not is_on_card:
            notes = row_notes(list(in_column.values()), same_label, shared_images)
        yield Row(
            label=label,
            is_published=False,
            cells=tuple(cells),
            setting=", ".join(filter(None, (setting, unit if unit != _PERCENT else ""))),
            empty=MISSING if is_to_be_filled else "",
            notes=notes,
        )


def _images_by_setting(entries: Sequence[ReportEntry]) -> dict[str, set[tuple[str, ...]]]:
    """Returns the sets of images that each setting was measured on; none outside of studies.

    The title of the group names the images elsewhere.
    """
    images: dict[str, set[tuple[str, ...]]] = {}
    for entry in entries:
        of_setting = images.setdefault(entry.setting, set())
        if is_of_study(entry):
            of_setting.add(tuple(image_words(entry.measured)))
    return images


def _shared_images(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns the words on images that all numbers of a study's table share, else none."""
    if not entries or not all(map(is_of_study, entries)):
        return []
    words_of_each = [image_words(entry.measured) for entry in entries]
    return shared_texts(words_of_each)


def _our_cell(entry: ReportEntry, unit: str) -> Cell:
    """Returns the cell of one of our numbers; only on the card it has a note of its own.

    `unit` is said by the row already.
    """
    result = entry.result
    std = entry.spread.get("std")
    text = f"{result.value:.2f}"
    if result.unit not in (unit, _PERCENT):
        text += f" {result.unit}"
    # In such a column the layer is a part of the answer
    if result.column == BEST_LAYER:
        text += f" ({result.layer})"
    spread = ""
    if std is not None:
        spread = f"± {std:.2f}"
    elif interval := known_interval(result.low, result.high, result.unit):
        low, high = interval
        spread = f"({low:.2f} to {high:.2f})"
    return Cell(
        text=text,
        note=note([entry]) if entry.group == CARD_GROUP else "",
        details="\n".join(details(entry)),
        spread=spread,
        mark=entry.mark,
        is_best=entry.is_best,
    )


def _has_interval(row: Result) -> bool:
    return known_interval(row.low, row.high, row.unit) is not None


def _legend(entries: Sequence[ReportEntry], *, has_card: bool) -> Iterable[str]:
    """Yields the sentences above the tables; those on special cases only where there are such.

    `has_card`: whether the published card is shown.
    """
    as_published = ", as in all published rows," if has_card else ""
    yield (
        "Numbers are percent unless a line says otherwise. A line is one checkpoint, batch-norm "
        f"mode and seed; batch-norm statistics are as trained{as_published} where nothing is said."
    )
    if has_card:
        yield (
            f"{INSIDE} inside the tolerance of the published number, {ABOVE} above it, {BELOW} "
            "below it (where a row gives several values: of their range). Compared are "
            f"{PUBLISHED_MODEL} lines: random with {RANDOM}, torchvision with {SUPERVISED}, all "
            f"others with {CARD}, or {CARD_OSS} where that has no number. Recalibrated lines and "
            "those with a setting of their own are marked as well, though they follow another "
            "protocol; not so other views of the images and other layers of nearest neighbors. "
            "Lines with the setting detectron2 are compared with published ones of that setting, "
            "and all others with those without it."
        )
    else:
        yield (
            "The published card is left out, since none of these numbers is of its protocols: "
            f"--rows card shows it, and {FILL_CARD} measures it."
        )
    yield (
        "Bold: the highest of several rows of ours in a column with the same setting, supervised "
        "weights aside; the layers of nearest neighbors are rows that compete."
    )
    if any(entry.is_shown and _has_interval(entry.result) for entry in entries):
        yield "In parentheses after a number: its 95 % interval."
    if any(entry.result.spread for entry in entries):
        yield "± is the standard deviation over the draws of low-shot examples."
    replaced = sum(len(entry.measured.older) for entry in entries)
    if replaced:
        yield (
            "Of numbers measured alike (by fingerprint) the newest stands: "
            f"{replaced} older left out."
        )
    if any(entry.measured.images for entry in entries):
        yield (
            "Where images are named by a digest, several sets of them have the same name, split "
            "and number: numbers of different digests do not compare. The data sets in run.json "
            "have the digests in full; packed images have another than the originals, from which "
            "they differ by their size and compression."
        )
    if any(entry.measured.variant for entry in entries):
        yield (
            "Lines that end in a run were measured otherwise than the others of their name: on "
            "other images, by other settings or of other weights. Do not take them for repeats of "
            "each other."
        )
