"""Prints to the terminal: lines, progress bars, tables of results and the next command to type."""

import contextlib
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from relloc import terminal
from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.geometry import CHANCE_PERCENT
from relloc.results import LAYERS, NO_FILES, Result, known_interval
from relloc.runs.command_line import as_word
from relloc.terminal import escaped, quantity

T = TypeVar("T")
# A text beside a progress bar, or what makes it when it is shown
ProgressText = str | Callable[[], str]
# What a progress bar is called with: the number of items done, and the text.
Update = Callable[[int, ProgressText], None]
_LINE_EVERY_S = 30  # between progress lines where the output is not a terminal
_LONG_S = 3  # shorter work is finished before anyone looks for its progress
# Under "s", when any progress line was last printed, by the monotonic clock.
_last_line: dict[str, float] = {}

_HEADS = {layer: layer.replace("feature", "f") for layer in LAYERS} | {
    "avgpool": "pool",
    # What the pretext head gets of a patch, which is of no layer
    "embedding": "embedding",
    "": "value",
}
_STAGES = "f1 to f5: feature1 to feature5, stages from the image on"
_NAME_COLUMNS = ("evaluation", "weights", "batch norm")
# Widths in characters. Output to a file or pipe has no width of its own: this suffices for a table.
_WIDTH_OF_FILES = 120
# In a narrower terminal three columns of names beside the numbers of six layers fold too often.
_NARROW = 80
# The numbers of six layers beside a name of 14 characters need so much.
_NARROWEST = 56


def _width() -> int | None:
    """Returns the width in characters: COLUMNS if it is a number; None for the terminal's own."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    # There is no stdout where a program without a console started us.
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return None if is_terminal else _WIDTH_OF_FILES


# Names of files, classes and runs are printed as they are: rich would read [markup] and :emoji:.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, width=_width())


def print_message(*lines: str) -> None:
    """Prints lines. Characters that control a terminal are printed as their codes.

    A line end within a line is such a character too, unless two spaces follow it: the name of a
    file, which may contain a line end, must not be able to imitate another line.
    """
    for line in lines:
        for part in re.split(r"\n(?=  )", line):
            console.print(escaped(part))


def print_next(command: str, *words: str, **settings: object) -> None:
    """Prints the command to go on with, quoted for a shell.

    `print_next("evaluate", checkpoint="a")` prints `next: python -m relloc.evaluate checkpoint=a`.
    """
    # After a point of a sweep it is the sweep that goes on.
    if "RELLOC_SWEEP" in os.environ:
        return
    typed = ["python", "-m", f"relloc.{command}"]
    typed += [shlex.quote(word) for word in words]
    typed += [as_word(name, value) for name, value in settings.items()]
    terminal.print_next(" ".join(typed))


def from_here(folder: Path) -> str:
    """Returns the path to a folder from the current one if it lies below, or else its full path."""
    here = Path.cwd()
    if folder != here and folder.is_relative_to(here):
        return str(folder.relative_to(here))
    return str(folder)


@contextlib.contextmanager
def progress_bar(
    what: str, total: int, done: int = 0, *, end_after_s: float = 0
) -> Iterator[Update]:
    """Shows progress: a bar on a terminal, or else a plain line every half minute.

    The block gets a function to call with the number of items done and a text:

        with progress_bar("check", total=len(images)) as update:
            update(100, "images")

    A plain line tells the time left from the first call on, since what comes before is often spent
    on getting ready. The text may be a function, which is called only when the text is shown.

    The plain line at the end is left out if any was printed within `end_after_s` seconds before.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(escaped(what), total=total, completed=done, text="")

            def update(done: int, text: ProgressText) -> None:
                bar.update(task, completed=done, text=escaped(_made(text)))

            yield update
    else:
        yield _lines(what, total, end_after_s)


@contextlib.contextmanager
def progress_if_long(what: str, total: int, _done: int = 0) -> Iterator[Update]:
    """Shows progress as `progress_bar` does, but nothing of work that takes a few seconds only."""
    started = time.monotonic()
    shown: Update | None = None
    with contextlib.ExitStack() as at_end:

        def update(done: int, text: ProgressText) -> None:
            nonlocal shown
            if shown is None and time.monotonic() - started > _LONG_S:
                shown = at_end.enter_context(progress_bar(what, total, done))
            if shown is not None:
                shown(done, text)

        yield update


def _lines(what: str, total: int, end_after_s: float) -> Update:
    """Returns what prints progress as plain lines."""
    started = printed = time.monotonic()
    # Time and number of items at the first call, which is where the time left is counted from
    first: tuple[float, int] | None = None

    def update(done: int, text: ProgressText) -> None:
        nonlocal first, printed
        now = time.monotonic()
        left = ""
        if first is None:
            first = (now, done)
        else:
            first_s, first_done = first
            s_per_item = (now - first_s) / max(1, done - first_done)
            left = f", {s_per_item * (total - done):.0f} s left"
        # On the way a line comes every half minute. The last one comes at once, unless some other
        # progress was shown just before.
        previous = printed
        pause_s: float = _LINE_EVERY_S
        if done >= total:
            previous = _last_line.get("s", -math.inf)
            pause_s = end_after_s
            left = ", 0 s left"
        if now - previous < pause_s:
            return
        printed = now
        _last_line["s"] = now
        print_message(f"{what} {done}/{total} {_made(text)} {now - started:.0f} s{left}")

    return update


def _made(text: ProgressText) -> str:
    return text if isinstance(text, str) else text()


def counted(batches: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields the batches and shows progress; short passes after one another print few lines."""
    with progress_bar(what, total, end_after_s=_LINE_EVERY_S) as update:
        for done, batch in enumerate(batches, start=1):
            yield batch
            update(done, "batches")


def show_results(rows: Sequence[Result]) -> None:
    """Prints the table of results, and what its short column heads mean."""
    console.print(results_table(rows, console.width))
    shown = {row.layer for row in rows if row.headline}
    meanings = []
    if any(layer.startswith("feature") for layer in shown):
        meanings.append(_STAGES)
    if "avgpool" in shown:
        meanings.append("pool: avgpool")
    if meanings:
        print_message("; ".join(meanings))


def results_table(rows: Sequence[Result], width: int) -> Table:
    """Returns the table of results for a terminal of `width` characters.

    It has a line for each evaluation, weights and batch norm, a column for each layer, and one for
    values without a layer. Only the headline metric of an evaluation is shown; `results.jsonl` has
    all. Long names are folded, in a narrow terminal the three names stand in one column, and
    numbers are never cut.
    """
    headlines = [row for row in rows if row.headline]
    measured_layers = {_layer_in_table(row) for row in headlines}
    layers = [layer for layer in _HEADS if layer in measured_layers]
    is_narrow = width < _NARROW
    table = Table(
        title=f"{_images_in_words(headlines)}; % unless a unit is named",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        width=max(width, _NARROWEST) if is_narrow else None,
    )
    name_columns = ["\n".join(_NAME_COLUMNS)] if is_narrow else _NAME_COLUMNS
    for name in name_columns:
        table.add_column(name, overflow="fold", vertical="top")
    for layer in layers:
        table.add_column(_HEADS[layer], justify="right", no_wrap=True)
    for evaluation, lines in _by_evaluation(headlines).items():
        table.add_section()
        for (weights, batch_norm), values in lines.items():
            names: tuple[str, ...] = (evaluation, weights, batch_norm)
            if is_narrow:
                names = ("\n".join(names),)
            cells = [values.get(layer) for layer in layers]
            table.add_row(*names, *cells)
            # In columns of their own, names of evaluations stand only in their first line.
            if not is_narrow:
                evaluation = ""
    return table


def _images_in_words(rows: Sequence[Result]) -> str:
    """Returns which images the numbers of a table are of; studies may look at training images."""
    of_training = [row.eval for row in rows if row.split == "train"]
    if not of_training:
        return "on images held out of the evaluation's training"
    if len(of_training) == len(rows):
        return "on training images"
    names = ", ".join(dict.fromkeys(of_training))
    return f"on held-out images, {escaped(names)} on training images"


def _by_evaluation(rows: Sequence[Result]) -> dict[str, dict[tuple[str, str], dict[str, str]]]:
    """Groups values: evaluation -> (weights, batch norm) -> layer -> value as it is printed."""
    files = {Path(row.checkpoint) for row in rows if row.checkpoint not in NO_FILES}
    run_names = {file.parent.name for file in files}
    table: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        evaluation = f"{row.eval} {row.metric}"
        if row.unit != "%":
            evaluation += f" ({row.unit})"
        checkpoint = Path(row.checkpoint)
        weights = checkpoint.name
        # All our backbones have the same file name: of several, their runs are named.
        if weights == BACKBONE_FILE:
            weights = checkpoint.parent.name if len(run_names) > 1 else "pretrained"
        if row.strides:
            weights += f", strides {row.strides.replace('_', ' ')}"
        if row.decoder:
            weights += f", {row.decoder}"
        batch_norm = row.batch_norm.replace("_", " ")
        lines = table.setdefault(escaped(evaluation), {})
        values = lines.setdefault((escaped(weights), batch_norm), {})
        values[_layer_in_table(row)] = _in_digits(row)
    return table


def _layer_in_table(row: Result) -> str:
    """Returns the layer in whose column a number is printed, one of `_HEADS`."""
    # Studies of patches name the embedding where they name layers in reports
    if not row.layer and "embedding" in (row.column, row.variant):
        return "embedding"
    return row.layer


def _in_digits(row: Result) -> str:
    """Returns the value as it is printed: percent with one digit, small other numbers with more."""
    is_share = row.unit.startswith(("%", "points"))
    # Correlations and exponents differ in their third digit
    digits = 1 if is_share or abs(row.value) >= 10 else 3
    return f"{row.value:.{digits}f}"


def print_measured(rows: Sequence[Result]) -> None:
    """Prints a line for each layer and batch norm that was just measured.

    It has the headline metric and the other numbers of the evaluation's table.
    """
    tables = {row.table for row in rows if row.headline and row.table}
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        # Rows of another variant are of another line of the table.
        is_in_table = row.table in tables and row.variant in ("", row.layer)
        if row.headline or is_in_table:
            statistics = row.batch_norm.replace("_", " ")
            strides = f", strides {row.strides.replace('_', ' ')}" if row.strides else ""
            decoder = f", {row.decoder}" if row.decoder else ""
            key = (row.layer, statistics + strides + decoder)
            lines.setdefault(key, []).append(f"{row.metric} {_in_digits(row)}")
    for (layer, batch_norm), numbers in lines.items():
        evaluation = f"{rows[0].eval} {layer}".strip()
        print_message(f"        {evaluation}, {batch_norm}: {', '.join(numbers)}")


def pretext_line(row: Result) -> str:
    """Returns the line that tells a held-out pretext accuracy beside that of chance."""
    what = "pretext accuracy"
    chance = f"chance is {CHANCE_PERCENT} %"
    if row.metric != "top1":
        what = "accuracy of the questions as trained"
        # The first detail of such a row.
        chance = row.details[0]
    how_certain = quantity(row.n, "pair")
    if interval := known_interval(row.low, row.high):
        low, high = interval
        how_certain = f"95 % interval {low:.1f} to {high:.1f}, {how_certain}"
    return f"{what} on {row.dataset} {row.split}: {row.value:.1f} % ({how_certain}); {chance}"
