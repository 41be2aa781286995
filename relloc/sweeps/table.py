"""Prints the status of a sweep on the console: a table of its points, and why points failed."""

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
from relloc.sweeps.point_status import PointStatus
from relloc.sweeps.points import Point, read_job
from relloc.sweeps.sweep import Sweep, word_of
from relloc.terminal import escaped, quantity

_LAST_LINES = 8  # of the log of a point that failed
_READ_BYTES = 1 << 16  # of a log's end
_WIDTH_OF_FILES = 160  # columns where the output is no terminal, which has a width of its own
_MESSAGE = "relloc: "  # the beginning of our error messages on stderr
# The color of each status, in the order in which the title counts them
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


def print_message(message: str | Table) -> None:
    """Prints a message or a table on the console.

    Names in it are printed as they are: they can't act as markup or on the terminal.
    """
    if isinstance(message, str):
        message = escaped(message, keep="\n")
    # The terminal wraps a text, as line ends of ours would be copied with it
    console = Console(soft_wrap=isinstance(message, str), markup=False, emoji=False)
    # Written to a file, a table is not to be folded at the usual 80 columns
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(message, highlight=False)
    # Whoever reads the output through a pipe sees each message at once
    sys.stdout.flush()


def table(found: Sequence[PointStatus]) -> Table:
    """Returns a table with a row per point: its status, job, progress, time left and folder."""
    counts = Counter(one.status for one in found)
    title = [f"{counts[status]} {status.word}" for status in _COLORS if counts[status]]
    made = Table(title=", ".join(title))
    for name in ("point", "state", "job", "progress", "time left", "folder"):
        is_number = name in ("progress", "time left")
        # Long names go on in the next line of their cell, as a shortened folder is of no use
        made.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for one in found:
        progress = "" if one.progress is None else f"{100 * one.progress:.0f} %"
        time_left = ""
        if one.left_s is not None and one.status is Status.RUNNING:
            time_left = _duration(one.left_s)
        # Texts, as a string would be read as markup
        made.add_row(
            Text(escaped(one.point.name)),
            Text(one.status.word, style=_COLORS[one.status]),
            Text(_job_of(one.point)),
            progress,
            time_left,
            Text(escaped(os.path.relpath(one.point.folder))),
        )
    return made


def print_failed_points(
    found: Sequence[PointStatus], log_of: Callable[[Point], Path | None]
) -> None:
    """Prints for each point that failed why it did, and the command that runs it alone.

    Args:
        found: The status of all points.
        log_of: Returns the file that has the output of a point, or None if there is none.
    """
    for one in found:
        if one.status is not Status.FAILED:
            continue
        point = one.point
        log = log_of(point)
        where = f": {log}" if log else ""
        print_message(f"\nfailed  {escaped(point.name)}{where}")
        lines = _end_of(log) or ["it left no output: it ended before it began"]
        last = lines[-_LAST_LINES:]
        # Our own message says the cause. Later output may have pushed it out of the last lines
        messages = [line for line in lines if line.startswith(_MESSAGE)]
        if messages and messages[-1] not in last:
            print_message(f"        {messages[-1]}")
        for line in last:
            print_message(f"        {line}")
        print_message(f"        again, alone: {point.again}")


def print_silent_schedulers(found: Sequence[PointStatus], silent: Sequence[str]) -> None:
    """Prints the messages about schedulers that did not answer, and how many points that concerns.

    Args:
        found: The status of all points.
        silent: The messages, as `point_statuses_and_problems` returns them.
    """
    for message in dict.fromkeys(silent):
        print_message(f"unknown {escaped(message)}")
    if silent:
        count = sum(one.status is Status.UNKNOWN for one in found)
        print_message(
            f"        the state of {quantity(count, 'point')} is unknown here; "
            "that of the others is as their folders say"
        )


def reason_of(log: Path | None) -> str:
    """Returns why a point failed, in one line: our last message, or else its log's last line."""
    lines = _end_of(log) or ["it left no output"]
    messages = [line for line in lines if line.startswith(_MESSAGE)]
    return (messages or lines)[-1].removeprefix(_MESSAGE)


def print_next(sweep: Sweep) -> None:
    """Prints the commands that may come after a sweep: its report, and its status."""
    word = shlex.quote(word_of(sweep.folder))
    print_message(f"next: python -m relloc.report sweep={word}")
    print_message(f"      python -m relloc.sweep status {word}")


def _end_of(log: Path | None) -> list[str]:
    """Returns the lines at the end of a log that are not blank, or none if it can't be read."""
    if log is None:
        return []
    # A log may be large: only its last 64 KiB are read
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.split("\n"):
        if line.strip():
            # A progress bar writes over its own line: what stands last is what was seen
            seen = line.rpartition("\r")[2]
            lines.append(escaped(seen))
    return lines


def _job_of(point: Point) -> str:
    """Returns which job or process has the point, or had it last."""
    try:
        job = read_job(point.folder)
    except UsageError:
        # The note is damaged, which is printed beside the table
        return "?"
    if "pid" in job:
        return f"pid {job['pid']} on {job.get('host', '?')}"
    # Notes may hold more than names and numbers
    numbers = {name: number for name, number in job.items() if isinstance(number, str | int)}
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _duration(seconds: float) -> str:
    """Returns a time in the unit in which it has two digits or so."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h"
