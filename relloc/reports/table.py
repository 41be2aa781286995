"""Builds the tables of a report, which all output formats share.

A report has a group of tables for the published card, where ours have to do with it, one for each
study, and one for each other set of images. In each table the published rows stand first, then
ours.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from relloc.reports.compare import (
    ABOVE,
    BELOW,
    INSIDE,
    MARK_WORDS,
    ReportEntry,
    make_entries,
    signed_value,
)
from relloc.reports.cost import COST_CAPTION, COST_COLUMNS, COST_TITLE, cost_lines
from relloc.reports.hours import hours_text
from relloc.reports.lines import image_words, natural_sort_key
from relloc.reports.load import Measured
from relloc.reports.missing import FILL_CARD, MissingEvaluations, advice, missing_evaluations
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
from relloc.results import LAYERS, Result, folder_of_files, known_interval
from relloc.terminal import quantity

# The choices of --rows: published relative location and its controls, or other pretext tasks too
ROWS = ("card", "all")
MISSING = "—"  # the text of a cell of ours that is not measured
_PERCENT = "%"
# Lines of other images whose numbers a caption gives: the tables of these images have all of them.
_MOST_LINES_NAMED = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A number as a table shows it.

    `text` is the number. `spread` follows it, such as "± 0.8" or "(8.1 to 9.7)", and so does
    `mark`, which compares it with the published number. `note` becomes a numbered note, which
    cells of the same origin share; it is "" where the row has notes. `details` is all that is known
    of this number, which HTML shows on hovering.
    """

    text: str
    note: str = ""
    details: str = ""
    spread: str = ""
    mark: str = ""
    is_best: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table.

    `setting` says what differs from the published protocol. `cells` has one item for each column;
    None is shown as `empty`. `notes` are notes on all cells of the row.
    """

    label: str
    is_published: bool
    cells: tuple[Cell | None, ...]
    setting: str = ""
    empty: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its title, and a caption that stands below it."""

    title: str
    caption: str = ""
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def notes(self) -> dict[str, int]:
        """The notes of rows and cells, each once, with numbers from 1 in reading order."""
        numbers: dict[str, int] = {}
        for row in self.rows:
            # The row's own notes stand before those of its cells
            texts = list(row.notes)
            for cell in row.cells:
                if cell:
                    texts.append(cell.note)
            for text in texts:
                if text and text not in numbers:
                    numbers[text] = len(numbers) + 1
        return numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The tables of numbers that were measured on the same images, or by the same study."""

    title: str
    tables: tuple[Table, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a report shows.

    `legend` explains the tables. `advice` says what to do about missing cells ("" where none is
    missing), and `missing` has the commands. `cost` has the hours of the card's rows, and is None
    where the card is not shown. `entries` and `published` are the same numbers in long form, for
    CSV.
    """

    title: str
    groups: tuple[Group, ...]
    legend: tuple[str, ...]
    advice: str
    missing: tuple[MissingEvaluations, ...]
    cost: Group | None = None
    entries: tuple[ReportEntry, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def shown_groups(self) -> tuple[Group, ...]:
        """All groups in the order in which they are shown: that of the cost stands last."""
        return (*self.groups, self.cost) if self.cost else self.groups


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
            words += _own_images(entry, shared_images)
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
            notes = _row_notes(list(in_column.values()), same_label, shared_images)
        yield Row(
            label=label,
            is_published=False,
            cells=tuple(cells),
            setting=", ".join(filter(None, (setting, unit if unit != _PERCENT else ""))),
            empty=MISSING if is_to_be_filled else "",
            notes=notes,
        )


def _is_of_study(entry: ReportEntry) -> bool:
    return entry.result.kind == "study"


def _images_by_setting(entries: Sequence[ReportEntry]) -> dict[str, set[tuple[str, ...]]]:
    """Returns the sets of images that each setting was measured on; none outside of studies.

    The title of the group names the images elsewhere.
    """
    images: dict[str, set[tuple[str, ...]]] = {}
    for entry in entries:
        of_setting = images.setdefault(entry.setting, set())
        if _is_of_study(entry):
            of_setting.add(tuple(image_words(entry.measured)))
    return images


def _shared_images(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns the words on images that all numbers of a study's table share, else none."""
    if not entries or not all(map(_is_of_study, entries)):
        return []
    words_of_each = [image_words(entry.measured) for entry in entries]
    return _shared(words_of_each)


def _own_images(entry: ReportEntry, shared_images: Collection[str]) -> list[str]:
    """Returns the words on the images of a study's number that not all of its table share."""
    if not _is_of_study(entry):
        return []
    return [word for word in image_words(entry.measured) if word not in shared_images]


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
        details="\n".join(_details(entry)),
        spread=spread,
        mark=entry.mark,
        is_best=entry.is_best,
    )


def facts(row: Result) -> list[str]:
    """Returns phrases on how a number was measured, such as its protocol, view and precision."""
    phrases = []
    if row.protocol:
        phrases.append(f"protocol {row.protocol}")
    phrases += [row.choice, *row.details]
    for deviation in row.deviations:
        phrases.append(f"deviation: {deviation}")
    phrases += [row.view, row.precision]
    # Facts that are not given are empty texts
    return [phrase for phrase in phrases if phrase]


def note(entries: Sequence[ReportEntry]) -> str:
    """Returns the note on several numbers: their runs, seeds, commits and shared facts.

    An ellipsis stands for facts that hold for some of the numbers only.
    """
    shared_facts, has_more = _shared_facts(entries)
    phrases = [*_origins(entries), *shared_facts]
    if has_more:
        phrases.append("…")
    return "; ".join([*phrases, *_layer_reasons(entries)])


def _row_notes(
    in_row: Sequence[ReportEntry],
    same_label: Sequence[ReportEntry],
    shared_images: Collection[str],
) -> tuple[str, ...]:
    """Returns the notes of a row outside of the card: what holds for its line, then for it alone.

    An ellipsis stands for facts that hold for some of the row's numbers only.

    Args:
        in_row: The numbers of the row.
        same_label: Those of all rows of its line.
        shared_images: The words on images that a study's table has said.
    """
    facts_of_line, _ = _shared_facts(same_label)
    facts_of_row, has_more = _shared_facts(in_row)
    of_row = [fact for fact in facts_of_row if fact not in facts_of_line]
    own_images = _shared([_own_images(entry, shared_images) for entry in in_row])
    # The view is both a fact and a word on images
    of_row += [word for word in own_images if word not in (*facts_of_line, *of_row)]
    of_line = [*_origins(same_label), *facts_of_line]
    if has_more:
        (of_row or of_line).append("…")
    of_line += _layer_reasons(same_label)
    of_line += _files(same_label)
    notes = ["; ".join(of_line), "; ".join(of_row)]
    return tuple(filter(None, notes))


def _origins(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns phrases that name the runs, seeds and commits of some numbers."""
    runs = [entry.measured.run for entry in entries]
    origins: Mapping[str, list[str]] = {
        "run": [run.name for run in runs],
        "seed": [str(entry.result.seed) for entry in entries],
        "commit": [short_commit(run.commit) for run in runs],
    }
    phrases = []
    for name, values in origins.items():
        distinct = dict.fromkeys(values)
        listed = " and ".join(distinct)
        phrases.append(f"{name} {listed}")
    return phrases


def _shared_facts(entries: Sequence[ReportEntry]) -> tuple[list[str], bool]:
    """Returns the facts that all of some numbers share, and whether some have others beside."""
    facts_of_each = [facts(entry.result) for entry in entries]
    shared = _shared(facts_of_each)
    return shared, max(map(len, facts_of_each)) > len(shared)


def _shared(texts_of_each: Sequence[Sequence[str]]) -> list[str]:
    """Returns the texts that are in all lists, in the order of the first."""
    first = texts_of_each[0]
    return [text for text in first if all(text in others for others in texts_of_each)]


def _files(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns phrases that say where pictures and tables of the evaluations of some numbers are."""
    folders = []
    for entry in entries:
        row = entry.result
        folders.append(entry.measured.run.folder / folder_of_files(row.eval, row.fingerprint))
    there = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    return [f"pictures and tables: {', '.join(map(str, there))}"] if there else []


def _layer_reasons(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns why layers were chosen: each reason once, in the order of the numbers."""
    reasons = [entry.layer_reason for entry in entries if entry.layer_reason]
    return list(dict.fromkeys(reasons))


def short_commit(commit: str) -> str:
    """Returns ten digits of a commit, with the "-dirty" of changed files where it has one."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]+", r"\1", commit)


def _details(entry: ReportEntry) -> Iterable[str]:
    """Yields the lines that say all that is known of one of our numbers."""
    row = entry.result
    run = entry.measured.run
    # Where it comes from, and how it was measured.
    yield f"run {run.name} ({run.folder})"
    yield f"seed {row.seed}, commit {run.commit}"
    yield from facts(row)
    metric = row.metric if row.unit == "%" else f"{row.metric} in {row.unit}"
    phrases = (
        f"{row.dataset} {row.split}",
        f"n = {row.n:,}",
        row.layer,
        metric,
    )
    yield ", ".join(filter(None, phrases))
    if entry.measured.digest:
        yield f"images {entry.measured.digest}"
    # How certain it is
    if interval := known_interval(row.low, row.high, row.unit):
        low, high = interval
        yield f"95 % interval {low:.2f} to {high:.2f}"
    for name, value in entry.spread.items():
        yield f"{name} over draws: {value:.2f}"
    if entry.layer_reason:
        yield entry.layer_reason
    # How it compares with the published number, and with earlier measurements of ours
    if entry.mark:
        printed = " / ".join(each.printed for each in entry.compared_with)
        first = entry.compared_with[0]
        word = MARK_WORDS[entry.mark]
        yield f"{word}: {first.row} {printed}, tolerance {first.tolerance:g}"
    for old in entry.measured.older:
        yield f"replaces {old.result.value:.2f} of run {old.run.name}"


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
