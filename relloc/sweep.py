"""python -m relloc.sweep status|wait|cancel SWEEP...: how the points of a sweep stand, whoever runs them."""

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from relloc import terminal
from relloc.errors import UsageError
from relloc.sweeps.mend import mend
from relloc.sweeps.points import Point, is_elsewhere, read_job
from relloc.sweeps.standing import schedulers, standings, standings_in_time
from relloc.sweeps.sweep import Sweep
from relloc.sweeps.table import say, table, tell_failed

_POLL_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all points are done (status: or may still become so), 1 if some failed or are missing, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    try:
        codes = [_DOES[options.does](Sweep(folder.absolute())) for folder in options.sweeps]
    except UsageError as error:
        terminal.complain(error)
        return 2
    return max(codes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relloc.sweep", description=__doc__)
    parser.add_argument(
        "does", choices=tuple(_DOES), help="print a table; wait for the last job, then print it; end all jobs"
    )
    parser.add_argument(
        "sweeps", metavar="SWEEP", nargs="+", type=Path, help="folder of a sweep, such as runs/sweeps/NAME"
    )
    return parser


def _status(sweep: Sweep) -> int:
    points = sweep.points()
    found = standings(points)
    say(table(points, found))
    tell_failed(points, found, sweep, lambda point: _log(sweep, point))
    return int(any(now.state != "done" and not now.in_flight for now in found))


def _wait(sweep: Sweep) -> int:
    found = standings(sweep.points())
    while any(now.in_flight for now in found):
        time.sleep(_POLL_S)
        found = standings_in_time(sweep.points())
    for words in mend(sweep.points(), found):
        say(f"mended  {words}")
    return _status(sweep)


def _cancel(sweep: Sweep) -> int:
    points = sweep.points()
    in_flight = [point for point, now in zip(points, standings(points), strict=True) if now.in_flight]
    sweep.cancel()
    for name, scheduler in schedulers().items():
        scheduler.cancel([str(job[name]) for point in in_flight if name in (job := read_job(point.folder) or {})])
    asked = len(in_flight)
    for point in in_flight:
        job = read_job(point.folder) or {}
        if "pid" in job and is_elsewhere(job):
            asked -= 1
            say(f"{point.name} is run by process {job['pid']} of {job['host']}: end it there")
        elif "pid" in job:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(job["pid"], signal.SIGTERM)
    say(f"{asked} points were asked to end, and no other is started")
    say("the same command as before goes on with all of them")
    return 0


def _log(sweep: Sweep, point: Point) -> Path | None:
    job = read_job(point.folder) or {}
    for name, scheduler in schedulers().items():
        if name in job:
            return scheduler.log_of(sweep.folder, str(job[name]))
    return sweep.log(point)


_DOES = {"status": _status, "wait": _wait, "cancel": _cancel}

if __name__ == "__main__":
    terminal.run_command(main)
