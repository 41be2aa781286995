"""Tables as every format shows them: rows of cells, each cell with its text, its marks and its origin."""

import dataclasses

from relloc.reports.entries import Entry
from relloc.reports.missing import Fill
from relloc.reports.published import Published

MISSING = "—"  # what stands in a cell of ours that is not measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """`note` is what cells of one origin share ("": the row has it), `details` all there is to say of this one.

    `spread` is like "± 0.8".
    """

    text: str
    note: str
    details: str
    spread: str = ""
    mark: str = ""
    best: bool = False


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
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def notes(self) -> dict[str, int]:
        texts = (text for row in self.rows for text in (row.note, *(cell.note for cell in row.cells if cell)))
        return {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)), start=1)}


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
    entries: tuple[Entry, ...]
    published: tuple[Published, ...]
