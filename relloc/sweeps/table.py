"""How a sweep stands, in words and as a table on the console."""

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relloc.errors import UsageError
from relloc.status import Status
from relloc.sweeps.points import Point, read_job
from relloc.sweeps.standing import Standing
from relloc.sweeps.sweep import Sweep, word_of
from relloc.terminal import escaped

_LAST_LINES = 8
_READ_BYTES = 1 << 16  # of a log's end
_WIDTH_OF_FILES = 160
_MESSAGE = "relloc: "  # what begins a message on stderr
_COLORS = {
    Status.DONE: "green",
    Status.RUNNING: "cyan",
    Status.WAITING: "blue",
    Status.STOPPED: "yellow",
    Status.CANCELLED: "yellow",
    Status.FAILED: "red",
    Status.MISSING: "dim",
    Status.UNKNOWN: "magenta",
}


def say(told: str | Table) -> None:
    """Print on the console. Names in it are printed as they are: no markup, nothing that acts on the terminal."""
    told = escaped(told, keep="\n") if isinstance(told, str) else told
    console = Console(soft_wrap=isinstance(told, str), markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(told, highlight=False)
    sys.stdout.flush()


def table(found: Sequence[Standing]) -> Table:
    """One row a point: how it stands, which job has or had it, how far it is, how long it takes, its folder."""
    counts = Counter(now.status for now in found)
    made = Table(
        title=", ".join(f"{counts[status]} {status.word}" for status in _COLORS if counts[status])
    )
    for name in ("point", "state", "job", "progress", "time left", "folder"):
        made.add_column(
            name, justify="right" if name in ("progress", "time left") else "left", overflow="fold"
        )
    for now in found:
        progress = "" if now.progress is None else f"{100 * now.progress:.0f} %"
        left = (
            "" if now.left_s is None or now.status is not Status.RUNNING else _duration(now.left_s)
        )
        made.add_row(
            Text(escaped(now.point.name)),
            Text(now.status.word, style=_COLORS[now.status]),
            Text(_job_of(now.point)),
            progress,
            left,
            Text(escaped(os.path.relpath(now.point.folder))),
        )
    return made


def tell_failed(found: Sequence[Standing], log_of: Callable[[Point], Path | None]) -> None:
    """Of each point that failed: why, the last lines of its log, and the command that runs it alone."""
    for point in [now.point for now in found if now.status is Status.FAILED]:
        log = log_of(point)
        say(f"\nfailed  {escaped(point.name)}" + (f": {log}" if log else ""))
        lines = _end_of(log) or ["it left no output: it ended before it began"]
        last = lines[-_LAST_LINES:]
        message = [line for line in lines if line.startswith(_MESSAGE)][-1:]
        for line in [*(one for one in message if one not in last), *last]:
            say(f"        {line}")
        say(f"        again, alone: {point.again}")


def tell_silent(found: Sequence[Standing], silent: Sequence[str]) -> None:
    """Who did not answer, and what is not known for that reason."""
    count = sum(now.status is Status.UNKNOWN for now in found)
    for words in dict.fromkeys(silent):
        say(f"unknown {escaped(words)}")
    if silent:
        say(
            f"        how {count} points stand is unknown here; the others are as their folders say"
        )


def reason_of(log: Path | None) -> str:
    """Why a point failed, in one line: its last message, or else the last line of its log."""
    lines = _end_of(log) or ["it left no output"]
    messages = [line for line in lines if line.startswith(_MESSAGE)]
    return (messages or lines)[-1].removeprefix(_MESSAGE)


def tell_next(sweep: Sweep) -> None:
    """What may come after a sweep."""
    word = shlex.quote(word_of(sweep.folder))
    say(f"next: python -m relloc.report sweep={word}")
    say(f"      python -m relloc.sweep status {word}")


def _end_of(log: Path | None) -> list[str]:
    if log is None:
        return []
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # A progress bar writes over its own line.
    return [escaped(line.rpartition("\r")[2]) for line in text.split("\n") if line.strip()]


def _job_of(point: Point) -> str:
    """Which job or process has the point, or had it last."""
    try:
        job = read_job(point.folder)
    except UsageError:  # damaged, which is told beside the table
        return "?"
    if "pid" in job:
        return f"pid {job['pid']} on {job.get('host', '?')}"
    return ", ".join(
        f"{name} {number}" for name, number in job.items() if isinstance(number, str | int)
    )


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{minutes:.0f} min"
        if minutes < 100
        else f"{hours:.1f} h"
    )
