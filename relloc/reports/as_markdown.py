"""A report in Markdown."""

import re
from collections.abc import Iterator, Mapping

from relloc.reports.table import Cell, Report, Row, Table
from relloc.terminal import escaped


def as_markdown(report: Report) -> str:
    """Pipe tables, numbered notes below each, and at the end the commands that fill what is missing."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield from ("# Our numbers beside the published ones", "")
    yield from (f"- {escape(line)}" for line in report.legend)
    for group in report.groups:
        yield from ("", f"## {escape(group.title)}")
        for table in group.tables:
            yield from _table(table)
    if report.advice:
        yield from ("", "## Missing cells", "", escape(report.advice))
    for fill in report.missing:
        yield from ("", f"{escape(fill.label)}:", "", *(f"    {escaped(command)}" for command in fill.commands))


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"### {escape(table.title)}", "")
    yield f"| | {' | '.join(map(escape, table.columns))} |"
    yield "|---|" + "---:|" * len(table.columns)
    yield from (_row(row, table.notes) for row in table.rows)
    if table.caption:
        yield from ("", escape(table.caption))
    if table.notes:
        yield ""
    yield from (f"{number}. {escape(note)}" for note, number in table.notes.items())


def _row(row: Row, notes: Mapping[str, int]) -> str:
    cells = (_cell(cell, notes) if cell else row.empty for cell in row.cells)
    label = ", ".join(filter(None, (row.label, row.setting)))
    return f"| {_joined(escape(label), _number(row.note, notes))} | {' | '.join(cells)} |"


def _cell(cell: Cell, notes: Mapping[str, int]) -> str:
    text = f"**{escape(cell.text)}**" if cell.is_best else escape(cell.text)
    return _joined(text, cell.spread, cell.mark, _number(cell.note, notes))


def _number(note: str, notes: Mapping[str, int]) -> str:
    return f"[{notes[note]}]" if note else ""


def _joined(*words: str) -> str:
    return " ".join(filter(None, words))


def escape(text: str) -> str:
    r"""Text as it is: what Markdown would read as markup gets a backslash, line ends become spaces."""
    return re.sub(r"([\\`*\[\]<>|$]|(?<!\w)_|_(?!\w))", r"\\\1", escaped(" ".join(text.split())))
