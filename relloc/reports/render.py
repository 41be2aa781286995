"""Reports in Markdown, HTML and LaTeX: each has a template beside this file, and its own way to show text as it is."""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from relloc.reports.compare import BELOW, INSIDE, MARK_WORDS
from relloc.reports.table import MISSING, Report
from relloc.terminal import escaped

_MOST_COMMANDS = 9  # in Markdown, which is printed
# LaTeX is full of curly brackets
_LATEX_SYNTAX = {
    "block_start_string": "<%",
    "block_end_string": "%>",
    "variable_start_string": "<<",
    "variable_end_string": ">>",
}
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
    """Pipe tables, numbered notes below each, and at the end the commands that fill what is missing."""
    text = _render("report.md.jinja", report, escape_markdown)
    return re.sub(
        r"(?:^\|.*\n)+", lambda table: _aligned(table[0].splitlines()), text, flags=re.MULTILINE
    )


def as_html(report: Report) -> str:
    """A page readable on a phone and in the dark, without scripts or other files; a cell's title says its origin."""
    return _render("report.html.jinja", report, escape_html)


def as_latex(report: Report) -> str:
    r"""A fragment to \input, for the packages booktabs and inputenc (utf8): an environment for each table."""
    return _render("report.tex.jinja", report, escape_latex, **_LATEX_SYNTAX)


def _render(template: str, report: Report, escape: Callable[[str], str], **syntax: str) -> str:
    def finalize(value: object) -> Markup:
        # What a macro has made is not escaped again
        return value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        **syntax,  # type: ignore[arg-type]
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
    environment.filters["code"] = lambda text: Markup(escaped(text))
    return environment.get_template(template).render(
        report=report, mark_words=MARK_WORDS, most_commands=_MOST_COMMANDS
    )


def _aligned(lines: Sequence[str]) -> str:
    """A pipe table with columns as wide as their longest cell: names to the left, numbers to the right."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows[1] = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    form = "".join([f"| {{:<{widths[0]}}} |", *(f" {{:>{width}}} |" for width in widths[1:]), "\n"])
    return "".join(form.format(*row) for row in rows)


def escape_markdown(text: str) -> str:
    r"""Text as it is: what Markdown would read as markup gets a backslash, line ends become spaces."""
    return re.sub(r"([\\`*\[\]<>|$]|(?<!\w)_|_(?!\w))", r"\\\1", escaped(" ".join(text.split())))


def escape_html(text: str) -> str:
    """Text as it is: nothing in it is read as HTML, and what acts on a terminal or turns text around is a code."""
    return html.escape(escaped(text, keep="\n"))


def escape_latex(text: str) -> str:
    """Text as it is: what LaTeX would read as markup is written as its name, line ends become spaces."""
    pattern = f"[{re.escape(''.join(_LATEX))}]"
    return re.sub(pattern, lambda found: _LATEX[found[0]], escaped(" ".join(text.split())))
