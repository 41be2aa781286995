"""What a report consists of: groups of tables, their rows and cells, for all output formats."""

import dataclasses

from relloc.reports.compare import ReportEntry
from relloc.reports.missing import MissingEvaluations
from relloc.reports.published import Published

MISSING = "—"  # the text of a cell of ours that is not measured


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
