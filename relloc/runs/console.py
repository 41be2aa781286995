"""What a person sees: progress, tables, and where everything went."""

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

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.geometry import CHANCE_PERCENT
from relloc.results import LAYERS, NOT_OURS, Result
from relloc.runs.command_line import as_word
from relloc.terminal import escaped, tell_next

T = TypeVar("T")
Update = Callable[[int, str], None]
_LINE_EVERY_S = 30
_LONG_S = 3
_last_line: dict[str, float] = {}  # when there was one, of whatever

_HEADS = {layer: layer.replace("feature", "f") for layer in LAYERS} | {
    "avgpool": "pool",
    "": "value",
}
_LEGEND = "f1 to f5: feature1 to feature5, stages from the image on; pool: avgpool"
_NAMES = ("evaluation", "weights", "batch norm")
_WIDTH_OF_FILES = 120
# Columns of a terminal: below which three names beside the numbers of six layers are folded too often, and which the
# numbers need beside a name of 14
_NARROW = 80
_NARROWEST = 56


def _width() -> int | None:
    """COLUMNS, if it is a number; a terminal's own; of a file or pipe, which has none, enough for a table."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return None if sys.stdout is not None and sys.stdout.isatty() else _WIDTH_OF_FILES


# Names of files, classes and runs are printed as they are: markup and :emoji: in them mean nothing.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, width=_width())


def say(*lines: str) -> None:
    """Lines for the user. What acts on a terminal in them is printed as its code.

    So is a line end, unless two blanks follow it: a name with one in it can't pass for another line of ours.
    """
    for line in lines:
        for part in re.split(r"\n(?=  )", line):
            console.print(escaped(part))


def say_next(command: str, *words: str, **settings: object) -> None:
    """The command that one goes on with, as it is typed; a sweep's points leave that to the sweep."""
    if "RELLOC_SWEEP" in os.environ:
        return
    typed = [*map(shlex.quote, words), *(as_word(name, value) for name, value in settings.items())]
    tell_next(" ".join(["python", "-m", f"relloc.{command}", *typed]))


def from_here(folder: Path) -> str:
    """A folder's name from where we are, if it is below; else all of it."""
    here = Path.cwd()
    return (
        str(folder.relative_to(here))
        if folder.is_relative_to(here) and folder != here
        else str(folder)
    )


@contextlib.contextmanager
def progress_bar(
    what: str, total: int, done: int = 0, *, end_after_s: float = 0
) -> Iterator[Update]:
    """A bar on a terminal, a plain line every half minute elsewhere; call it with (done, text).

    The line of the end is left out where there was any within `end_after_s` before.
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
            yield lambda done, text: bar.update(task, completed=done, text=escaped(text))
    else:
        yield _lines(what, total, done, end_after_s)


@contextlib.contextmanager
def progress_if_long(what: str, total: int, _done: int = 0) -> Iterator[Update]:
    """As `progress_bar`, but nothing is shown of what is finished within a few seconds."""
    started = time.monotonic()
    shown: Update | None = None
    with contextlib.ExitStack() as at_end:

        def update(done: int, text: str) -> None:
            nonlocal shown
            if shown is None and time.monotonic() - started > _LONG_S:
                shown = at_end.enter_context(progress_bar(what, total, done))
            if shown is not None:
                shown(done, text)

        yield update


def _lines(what: str, total: int, first: int, end_after_s: float) -> Update:
    started = printed = time.monotonic()

    def update(done: int, text: str) -> None:
        nonlocal printed
        now = time.monotonic()
        since, pause = (
            (printed, _LINE_EVERY_S)
            if done < total
            else (_last_line.get("s", -math.inf), end_after_s)
        )
        if now - since >= pause:
            printed = _last_line["s"] = now
            left = (now - started) / max(1, done - first) * (total - done)
            say(f"{what} {done}/{total} {text} {now - started:.0f} s, {left:.0f} s left")

    return update


def counted(batches: Iterable[T], what: str, total: int) -> Iterator[T]:
    """`batches` with progress shown; passes that follow one another within seconds have no lines of their own."""
    with progress_bar(what, total, end_after_s=_LINE_EVERY_S) as update:
        for done, batch in enumerate(batches, start=1):
            yield batch
            update(done, "batches")


def show_results(rows: Sequence[Result]) -> None:
    """The table of results, and what its short heads mean."""
    console.print(results_table(rows, console.width))
    say(_LEGEND)


def results_table(rows: Sequence[Result], width: int) -> Table:
    """One line an evaluation, weights and batch norm; layers across, then the value of what has none.

    One number an evaluation, its headline; results.jsonl has all. Long names go on in further lines, and in a narrow
    terminal the three names stand below one another; numbers are never cut.
    """
    headlines = [row for row in rows if row.headline]
    layers = [layer for layer in _HEADS if any(row.layer == layer for row in headlines)]
    is_narrow = width < _NARROW
    table = Table(
        title="on images held out of the evaluation's training; % unless a unit is named",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        width=max(width, _NARROWEST) if is_narrow else None,
    )
    for name in ["\n".join(_NAMES)] if is_narrow else _NAMES:
        table.add_column(name, overflow="fold", vertical="top")
    for layer in layers:
        table.add_column(_HEADS[layer], justify="right", no_wrap=True)
    for evaluation, lines in _by_evaluation(headlines).items():
        table.add_section()
        for (weights, batch_norm), values in lines.items():
            names = (evaluation, weights, batch_norm)
            table.add_row(
                *(["\n".join(names)] if is_narrow else names),
                *(values.get(layer) for layer in layers),
            )
            if not is_narrow:
                evaluation = ""  # named once
    return table


def _by_evaluation(rows: Sequence[Result]) -> dict[str, dict[tuple[str, str], dict[str, str]]]:
    """Values by layer of each evaluation, and there of weights and batch norm."""
    files = {Path(row.checkpoint) for row in rows if row.checkpoint not in NOT_OURS}
    several = len({file.parent.name for file in files}) > 1  # told apart by their runs
    found: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        weights = Path(row.checkpoint).name  # of another project, or no file
        if weights == BACKBONE_FILE:
            weights = Path(row.checkpoint).parent.name if several else "pretrained"
        evaluation = f"{row.eval} {row.metric}" + ("" if row.unit == "%" else f" ({row.unit})")
        lines = found.setdefault(escaped(evaluation), {})
        line = lines.setdefault((escaped(weights), row.batch_norm.replace("_", " ")), {})
        line[row.layer] = f"{row.value:.1f}"
    return found


def say_measured(rows: Sequence[Result]) -> None:
    """A line for each layer of what was just measured: its headline, and what stands in its table beside it."""
    by_layer: dict[str, list[str]] = {}
    for row in rows:
        if row.headline or (row.table and row.variant in ("", row.layer)):
            by_layer.setdefault(row.layer, []).append(f"{row.metric} {row.value:.1f}")
    for layer, numbers in by_layer.items():
        what = f"{rows[0].eval} {layer}".strip()
        say(f"        {what}, {rows[0].batch_norm.replace('_', ' ')}: {', '.join(numbers)}")


def pretext_line(row: Result) -> str:
    """Held-out pretext accuracy beside chance."""
    return (
        f"pretext accuracy on {row.dataset} {row.split}: {row.value:.1f} % (95 % interval {row.low:.1f} to "
        f"{row.high:.1f}, {row.n} pairs); chance is {CHANCE_PERCENT} %"
    )
