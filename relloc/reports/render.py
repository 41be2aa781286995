"""Renders reports as Markdown, HTML and LaTeX.

Each format has a Jinja template beside this file, and a function that escapes text, so that names
of runs and files can't act as markup.
"""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from relloc.reports.compare import BELOW, INSIDE, MARK_WORDS
from relloc.reports.parts import MISSING, Report
from relloc.terminal import escaped

_MOST_COMMANDS = 9  # of a line, in Markdown: it is printed, and is to fit a screen
# Jinja's usual signs are curly brackets, of which LaTeX is full
_LATEX_SYNTAX = {
    "block_start_string": "<%",
    "block_end_string": "%>",
    "variable_start_string": "<<",
    "variable_end_string": ">>",
}
# What each special sign is written as in LaTeX
_LATEX = {
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


def as_markdown(report: Report) -> str:
    """Returns the report as Markdown: tables with notes, and commands for what is missing."""
    text = _render("report.md.jinja", report, escape_markdown)
    # Align the columns of each table, which is a block of lines that begin with a pipe
    tables = re.compile(r"(?:^\|.*\n)+", flags=re.MULTILINE)
    return tables.sub(lambda table: _aligned(table[0].splitlines()), text)


def as_html(report: Report) -> str:
    """Returns the report as one HTML page without scripts or other files.

    It is readable on a phone and in dark mode. Hovering over a cell shows where it comes from.
    """
    return _render("report.html.jinja", report, escape_html)


def as_latex(report: Report) -> str:
    r"""Returns the report as LaTeX to \input: a table environment for each table.

    The document needs the packages booktabs and inputenc (utf8).
    """
    return _render("report.tex.jinja", report, escape_latex, **_LATEX_SYNTAX)


def _render(template: str, report: Report, escape: Callable[[str], str], **syntax: str) -> str:
    """Returns a template filled with a report, all of whose texts pass through `escape`."""

    def finalize(value: object) -> Markup:
        # What a macro has made is not escaped again
        return value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        **syntax,  # type: ignore[arg-type]
        # A misspelt name in a template is an error, and "#" is no comment, as Markdown has headings
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=True,
        finalize=finalize,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    # Commands stand in code blocks, where markup does nothing, but a terminal's codes might
    environment.filters["code"] = lambda text: Markup(escaped(text))
    return environment.get_template(template).render(
        report=report, mark_words=MARK_WORDS, most_commands=_MOST_COMMANDS
    )


def _aligned(lines: Sequence[str]) -> str:
    """Returns a Markdown table with its columns aligned, given its lines.

    Columns are as wide as their longest cell: names to the left, numbers to the right.
    """
    rows = []
    for line in lines:
        # Before the first pipe and after the last is nothing; a pipe after a backslash is text
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        rows.append([cell.strip() for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first_width, *other_widths = widths
    # The second line of a Markdown table is its rule: dashes, with a colon where numbers end
    rows[1] = ["-" * first_width]
    rows[1] += ["-" * (width - 1) + ":" for width in other_widths]
    aligned = []
    for name, *numbers in rows:
        cells = [f"{name:<{first_width}}"]
        for number, width in zip(numbers, other_widths, strict=True):
            cells.append(f"{number:>{width}}")
        aligned.append(f"| {' | '.join(cells)} |\n")
    return "".join(aligned)


def escape_markdown(text: str) -> str:
    r"""Returns text that Markdown shows as it is: special signs get a backslash.

    Line ends become spaces.

    Example:
        >>> escape_markdown("a|b *c* f_g")
        'a\\|b \\*c\\* f_g'
    """
    line = escaped(" ".join(text.split()))
    # An underscore within a word is no markup
    return re.sub(r"([\\`*\[\]<>|$]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def escape_html(text: str) -> str:
    """Returns text that HTML shows as it is.

    Signs that act on a terminal or turn the direction of text around are written as codes.
    """
    return html.escape(escaped(text, keep="\n"))


def escape_latex(text: str) -> str:
    r"""Returns text that LaTeX shows as it is: special signs are written by name.

    Line ends become spaces.

    Example:
        >>> escape_latex("a_b 5%")
        'a\\_b 5\\%'
    """
    line = escaped(" ".join(text.split()))
    # One pass over the text, as the names of signs have special signs themselves
    signs = f"[{re.escape(''.join(_LATEX))}]"
    return re.sub(signs, lambda match: _LATEX[match[0]], line)
