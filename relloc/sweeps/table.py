"""How a sweep stands, in words and as a table on the console."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relloc.sweeps.points import Point
from relloc.sweeps.standing import Standing
from relloc.sweeps.sweep import Sweep
from relloc.terminal import escaped

_LAST_LINES = 8
_WIDTH_OF_FILES = 160
_COLORS = {
    "done": "green",
    "running": "cyan",
    "waiting": "blue",
    "stopped": "yellow",
    "failed": "red",
    "missing": "dim",
}


def say(told: str | Table) -> None:
    """Print on the console. Names in it are printed as they are: no markup, nothing that acts on the terminal."""
    told = escaped(told, keep="\n") if isinstance(told, str) else told
    console = Console(soft_wrap=isinstance(told, str), markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(told, highlight=False)
    sys.stdout.flush()


def table(points: Sequence[Point], found: Sequence[Standing]) -> Table:
    """One row a point: how it stands, how far it is, how long it takes, its folder."""
    counts = {state: sum(now.state == state for now in found) for state in _COLORS}
    title = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    made = Table(title=title)
    for name in ("point", "state", "progress", "time left", "folder"):
        made.add_column(name, justify="right" if name in ("progress", "time left") else "left", overflow="fold")
    for point, now in zip(points, found, strict=True):
        progress = "" if now.progress is None else f"{100 * now.progress:.0f} %"
        left = "" if now.left_s is None or now.state != "running" else _duration(now.left_s)
        state, folder = Text(now.state, style=_COLORS[now.state]), os.path.relpath(point.folder)
        made.add_row(escaped(point.name), state, progress, left, escaped(folder))
    return made


def tell_failed(
    points: Sequence[Point], found: Sequence[Standing], sweep: Sweep, log_of: Callable[[Point], Path | None]
) -> None:
    """Of each point that failed: the last lines of its log, and the command that runs it alone."""
    for point, now in zip(points, found, strict=True):
        if now.state != "failed":
            continue
        log = log_of(point)
        say(f"\nfailed  {point.name}" + (f": {log}" if log else ""))
        if log and log.exists():
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]:
                say(f"        {line}")
        say(f"        again, alone: {shlex.join(['python', *point.arguments])}")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
