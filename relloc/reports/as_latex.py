"""A report in LaTeX: a fragment to \\input, for the packages booktabs and inputenc (utf8)."""

import re
from collections.abc import Iterator, Mapping

from relloc.reports.compare import ABOVE, BELOW, INSIDE
from relloc.reports.table import MISSING, Cell, Report, Row, Table
from relloc.terminal import escaped

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    MISSING: "---",
    "…": r"\dots{}",
    "±": r"$\pm$",
    INSIDE: r"$\approx$",
    BELOW: r"$-$",
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
}
_MARKS = {INSIDE: r"$\approx$", ABOVE: "$+$", BELOW: "$-$", "": ""}


def as_latex(report: Report) -> str:
    """A table environment for each table, with its numbered notes below it."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield r"% Needs \usepackage{booktabs}"
    yield from (escape(line) + "\n" for line in report.legend)
    for group in report.groups:
        for table in group.tables:
            yield from _table(group.title, table)
    if report.advice:
        yield f"\\paragraph{{Missing cells}} {escape(report.advice)}\n"
    for fill in report.missing:
        yield escape(fill.label) + r":\\"
        yield from (f"\\texttt{{{escape(command)}}}\\\\" for command in fill.commands)


def _table(group: str, table: Table) -> Iterator[str]:
    yield from (r"\begin{table}[htbp]", r"\centering\small")
    yield f"\\caption{{{escape(f'{group}: {table.title}. {table.caption}'.strip())}}}"
    yield f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
    yield from (r"\toprule", " & ".join(["", *map(escape, table.columns)]) + r" \\", r"\midrule")
    for row, before in zip(table.rows, (None, *table.rows), strict=False):
        if before and before.is_published and not row.is_published:
            yield r"\midrule"
        yield _row(row, table.notes)
    yield from (r"\bottomrule", r"\end{tabular}")
    yield from _notes(table.notes)
    yield from (r"\end{table}", "")


def _notes(notes: Mapping[str, int]) -> Iterator[str]:
    if notes:
        yield from ("", r"\smallskip\raggedright\footnotesize")
    yield from (f"\\textsuperscript{{{number}}}~{escape(note)}\\par" for note, number in notes.items())


def _row(row: Row, notes: Mapping[str, int]) -> str:
    cells = (_cell(cell, notes) if cell else escape(row.empty) for cell in row.cells)
    label = ", ".join(filter(None, (row.label, row.setting)))
    return " & ".join([escape(label) + _number(row.note, notes), *cells]) + r" \\"


def _cell(cell: Cell, notes: Mapping[str, int]) -> str:
    text = f"\\textbf{{{escape(cell.text)}}}" if cell.is_best else escape(cell.text)
    text += f" {escape(cell.spread)}" if cell.spread else ""
    return f"{text}{_MARKS[cell.mark]}{_number(cell.note, notes)}"


def _number(note: str, notes: Mapping[str, int]) -> str:
    return f"\\textsuperscript{{{notes[note]}}}" if note else ""


def escape(text: str) -> str:
    """Text as it is: what LaTeX would read as markup is written as its name, line ends become spaces."""
    pattern = f"[{re.escape(''.join(_SPECIAL))}]"
    return re.sub(pattern, lambda found: _SPECIAL[found[0]], escaped(" ".join(text.split())))
