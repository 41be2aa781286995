"""What a person sees: progress, tables, and where everything went."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from relloc.geometry import CHANCE_PERCENT
from relloc.results import LAYERS, NOT_OURS, Result

T = TypeVar("T")
Update = Callable[[int, str], None]
_LINE_EVERY_S = 30

console = Console(soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False)


@contextlib.contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Update]:
    """A bar on a terminal, a plain line every half minute elsewhere; call it with (done, text)."""
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
        yield _lines(what, total, done)


def _lines(what: str, total: int, first: int) -> Update:
    started = printed = time.monotonic()

    def update(done: int, text: str) -> None:
        nonlocal printed
        now = time.monotonic()
        if done < total and now - printed < _LINE_EVERY_S:
            return
        printed = now
        left = (now - started) / max(1, done - first) * (total - done)
        say(f"{what} {done}/{total} {text} {now - started:.0f} s, {left:.0f} s left")

    return update


def counted(batches: Iterable[T], what: str, total: int) -> Iterator[T]:
    """`batches` with progress shown."""
    with progress_bar(what, total) as update:
        for done, batch in enumerate(batches, start=1):
            yield batch
            update(done, "batches")


def results_table(rows: Sequence[Result]) -> Table:
    """Layers down; evaluations across, each beside random initialization where that was run.

    Of the numbers of neighbors only the one closest to 20 is shown; results.jsonl has all.
    """
    columns = _columns([row for row in rows if row.eval != "pretext" and _is_shown(row, rows)])
    table = Table(title="top-1 in percent, on images never trained on; batch norm as trained where not said")
    table.add_column("layer", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for layer in LAYERS:
        values = [column.get(layer) for column in columns.values()]
        if any(value is not None for value in values):
            table.add_row(layer, *("" if value is None else f"{value:.1f}" for value in values))
    return table


def _neighbors(row: Result) -> int | None:
    _, found, k = row.metric.rpartition("_k")
    return int(k) if found else None


def _is_shown(row: Result, rows: Sequence[Result]) -> bool:
    every_k = {_neighbors(other) for other in rows if other.eval == row.eval} - {None}
    return not every_k or _neighbors(row) == min(every_k, key=lambda k: abs((k or 0) - 20))


def _columns(rows: Sequence[Result]) -> dict[str, dict[str, float]]:
    columns: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: (row.eval != "linear", row.batch_norm, row.checkpoint in NOT_OURS)):
        who = row.checkpoint if row.checkpoint in NOT_OURS else "pretrained"
        k = _neighbors(row)
        what = row.eval if k is None else f"{row.eval} k={k}"
        how = "\nrecalibrated" if row.batch_norm == "recalibrated" else ""
        columns.setdefault(f"{what}\n{who}{how}", {})[row.layer] = row.value
    return columns


def pretext_line(row: Result) -> str:
    """Held-out pretext accuracy beside chance."""
    return (
        f"pretext accuracy on {row.dataset} {row.split}: {row.value:.1f} % (95 % interval {row.low:.1f} to "
        f"{row.high:.1f}, {row.n} pairs); chance is {CHANCE_PERCENT} %"
    )
