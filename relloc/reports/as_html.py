"""A report as one HTML page that needs nothing else: no script, no other file."""

import html
import importlib.resources
from collections.abc import Iterator, Mapping

from relloc.reports.compare import MARK_WORDS
from relloc.reports.missing import Fill
from relloc.reports.table import Cell, Report, Row, Table
from relloc.terminal import escaped

_HOW_TO_FILL = "missing: the commands below fill it"


def as_html(report: Report) -> str:
    """A page readable on a phone and in the dark; each cell says its origin in its title, and by a numbered note."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    style = importlib.resources.files("relloc.reports").joinpath("page.css").read_text(encoding="utf-8")
    yield from ("<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">')
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield from (f"<title>{escape(report.title)}</title>", f"<style>\n{style}</style>", "</head>", "<body>", "<main>")
    yield from (f"<h1>{escape(report.title)}</h1>", '<ul class="legend">')
    yield from (*(f"<li>{escape(line)}</li>" for line in report.legend), "</ul>")
    numbered = 0
    for group in report.groups:
        yield f"<h2>{escape(group.title)}</h2>"
        for table in group.tables:
            numbered += 1
            yield from _table(table, f"table{numbered}")
    if report.advice:
        yield from ("<h2>Missing cells</h2>", f"<p>{escape(report.advice)}</p>")
    for fill in report.missing:
        yield from _fill(fill)
    yield from ("</main>", "</body>", "</html>")


def _table(table: Table, name: str) -> Iterator[str]:
    yield from ("<section>", f"<h3>{escape(table.title)}</h3>", '<div class="wide" tabindex="0">', "<table>", "<thead>")
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    yield from (f"<tr><td></td>{heads}</tr>", "</thead>", "<tbody>")
    yield from (_row(row, table.notes, name) for row in table.rows)
    yield from ("</tbody>", "</table>", "</div>")
    if table.caption:
        yield f"<p>{escape(table.caption)}</p>"
    if table.notes:
        yield "<details><summary>Where the numbers come from</summary><ol>"
    yield from (f'<li id="{name}-{number}">{escape(note)}</li>' for note, number in table.notes.items())
    if table.notes:
        yield "</ol></details>"
    yield "</section>"


def _row(row: Row, notes: Mapping[str, int], name: str) -> str:
    kind = "published" if row.is_published else "ours"
    empty = f'<td class="missing" title="{_HOW_TO_FILL}">{row.empty}</td>' if row.empty else "<td></td>"
    cells = "".join(_cell(cell, notes, name) if cell else empty for cell in row.cells)
    label = escape(row.label) + (f" <small>{escape(row.setting)}</small>" if row.setting else "")
    link = _link(row.note, notes, name)
    return f'<tr class="{kind}"><th scope="row">{label}{link}</th>{cells}</tr>'


def _cell(cell: Cell, notes: Mapping[str, int], name: str) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.is_best else escape(cell.text)
    link = _link(cell.note, notes, name) or "<sup></sup>"
    spread = f"<small>{escape(cell.spread)}</small>" if cell.spread else ""
    return f'<td title="{escape(cell.details)}">{text}{_mark(cell)}{link}{spread}</td>'


def _link(note: str, notes: Mapping[str, int], name: str) -> str:
    if not note:
        return ""
    return f'<sup><a href="#{name}-{notes[note]}">[{notes[note]}]</a></sup>'


def _mark(cell: Cell) -> str:
    if not cell.mark:
        return '<span class="mark"></span>'
    word = MARK_WORDS[cell.mark]
    return f'<span class="mark {word}" role="img" aria-label="{word} tolerance">{cell.mark}</span>'


def escape(text: str) -> str:
    """Text as it is: nothing in it is read as HTML, and what acts on a terminal or turns text around is a code."""
    return html.escape(escaped(text, keep="\n"))


def _fill(fill: Fill) -> Iterator[str]:
    yield f"<details><summary>{escape(fill.label)}</summary>"
    yield f"<pre><code>{escape(chr(10).join(fill.commands))}</code></pre></details>"
