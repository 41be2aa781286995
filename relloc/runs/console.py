"""What a person sees: progress, tables, and where everything went."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from relloc.backbone_files import BACKBONE_FILE
from relloc.geometry import CHANCE_PERCENT
from relloc.results import HEADLINES, LAYERS, NOT_OURS, Result, count_of, headlines

T = TypeVar("T")
Update = Callable[[int, str], None]
_LINE_EVERY_S = 30
_LONG_S = 3
_SAID = {"top1": "", "map": "", "rankme": "rankme"}  # what the table's head says of a metric
_last_line: dict[str, float] = {}  # when there was one, of whatever
_ORDER = {"linear": -2, "linear_fast": -1}

# A file has no width of its own: rich would squeeze tables into 80 columns.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
console = Console(soft_wrap=True, highlight=False, width=_WIDTH)


def say(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False)


@contextlib.contextmanager
def progress_bar(what: str, total: int, done: int = 0, *, end_after_s: float = 0) -> Iterator[Update]:
    """A bar on a terminal, a plain line every half minute elsewhere; call it with (done, text).

    The line of the end is left out where there was any within `end_after_s` before.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=total, completed=done, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)
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
        ends = done >= total
        since = _last_line.get("s", -end_after_s) if ends else printed
        is_due = now - since >= (end_after_s if ends else _LINE_EVERY_S)
        if not is_due:
            return
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


def results_table(rows: Sequence[Result]) -> Table:
    """One line an evaluation, weights and batch norm; layers across.

    One number an evaluation: of the numbers of neighbors, or of images, only the one closest to 20
    is shown; results.jsonl has all.
    """
    lines = _by_line([row for row in headlines(rows) if row.eval != "pretext"])
    table = Table(title="on images never trained on, in percent (RankMe: directions)", box=box.SIMPLE_HEAD)
    for name in ("evaluation", "weights", "batch norm"):
        table.add_column(name, no_wrap=True)
    shown = [layer for layer in LAYERS if any(layer in values for values in lines.values())]
    for layer in shown:
        table.add_column(layer, justify="right", no_wrap=True)
    before = None
    for (evaluation, weights, batch_norm), values in lines.items():
        if before not in (None, evaluation):
            table.add_section()
        name = "" if evaluation == before else evaluation
        numbers = (f"{values[layer]:.1f}" if layer in values else "" for layer in shown)
        table.add_row(name, weights, batch_norm.replace("_", " "), *numbers)
        before = evaluation
    return table


def _by_line(rows: Sequence[Result]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Values by layer of each evaluation, weights and batch norm; several checkpoints are told apart by their runs."""
    runs = {Path(row.checkpoint).parent.name for row in rows if row.checkpoint not in NOT_OURS}
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    order = list(dict.fromkeys(row.eval for row in rows))
    for row in sorted(rows, key=lambda row: (_ORDER.get(row.eval, 0), order.index(row.eval))):
        weights = row.checkpoint if row.checkpoint in NOT_OURS else _called(Path(row.checkpoint), len(runs) > 1)
        what = f"{row.eval} {_SAID.get(row.metric, f'k={count_of(row)}')}".strip()
        lines.setdefault((what, weights, row.batch_norm), {})[row.layer] = row.value
    return lines


def _called(weights: Path, several: bool) -> str:
    """The run of a backbone where there are several, or the file's name where another project wrote it."""
    if weights.name != BACKBONE_FILE:
        return weights.name
    return weights.parent.name if several else "pretrained"


def say_measured(rows: Sequence[Result]) -> None:
    """A line for each layer of what was just measured, its headline numbers."""
    by_layer: dict[str, list[str]] = {}
    for row in rows:
        if row.metric in HEADLINES or count_of(row) is not None:
            by_layer.setdefault(row.layer, []).append(f"{row.metric} {row.value:.1f}")
    for layer, numbers in by_layer.items():
        say(f"        {rows[0].eval} {layer}, {rows[0].batch_norm.replace('_', ' ')}: {', '.join(numbers)}")


def pretext_line(row: Result) -> str:
    """Held-out pretext accuracy beside chance."""
    return (
        f"pretext accuracy on {row.dataset} {row.split}: {row.value:.1f} % (95 % interval {row.low:.1f} to "
        f"{row.high:.1f}, {row.n} pairs); chance is {CHANCE_PERCENT} %"
    )
