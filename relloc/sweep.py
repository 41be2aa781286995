"""python -m relloc.sweep status|wait|cancel SWEEP...: how the points of a sweep stand, whoever runs them.

SWEEP is its name, as NAME or sweep=NAME, or its folder.
"""

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from relloc import terminal
from relloc.errors import Interrupted, UsageError
from relloc.status import Status
from relloc.sweeps.points import Point, note_ending, read_job
from relloc.sweeps.standing import (
    known_standings,
    note_cancelled,
    repair_status,
    schedulers,
    standings,
    standings_in_time,
)
from relloc.sweeps.sweep import Sweep, find_sweep
from relloc.sweeps.table import say, table, tell_failed, tell_next, tell_silent
from relloc.tracking.living import is_elsewhere

_POLL_S = 10.0
_NOT_ENDED_WELL = (Status.FAILED, Status.STOPPED, Status.CANCELLED, Status.MISSING)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all points are done (status: or may still become so), 1 if some failed, were ended or are missing.

    2 for a mistake; 75 if it can't be known, as a cluster does not answer.
    """
    options = parser().parse_args(arguments)
    try:
        codes = [_DOES[options.does](find_sweep(word)) for word in options.sweeps]
    except UsageError as error:
        terminal.complain(error)
        return error.exit_code
    return max(codes)


def parser() -> argparse.ArgumentParser:
    """The words that the command takes."""
    words = argparse.ArgumentParser(prog="python -m relloc.sweep", description=__doc__)
    words.add_argument(
        "does",
        choices=tuple(_DOES),
        help="print a table; wait for the last job, then print it; end all jobs",
    )
    words.add_argument(
        "sweeps",
        metavar="SWEEP",
        nargs="+",
        help="NAME or sweep=NAME of one in runs/sweeps, or the folder of one",
    )
    return words


def _status(sweep: Sweep) -> int:
    found, silent = known_standings(sweep.points())
    note_cancelled(found)
    found = sweep.with_cancelled(found)
    say(table(found))
    tell_failed(found, lambda point: _log(sweep, point))
    tell_silent(found, silent)
    tell_next(sweep)
    if any(now.status in _NOT_ENDED_WELL for now in found):
        return 1
    return Interrupted.exit_code if any(now.status is Status.UNKNOWN for now in found) else 0


def _wait(sweep: Sweep) -> int:
    found = standings(sweep.points())
    while any(now.in_flight for now in found):
        time.sleep(_POLL_S)
        found = standings_in_time(sweep.points())
    for words in repair_status(found):
        say(f"mended  {words}")
    return _status(sweep)


def _cancel(sweep: Sweep) -> int:
    in_flight = [now.point for now in standings(sweep.points()) if now.in_flight]
    sweep.cancel()
    here = [point for point in in_flight if not is_elsewhere(read_job(point.folder))]
    for point in here:  # before it is asked: what has not begun can't say that it was
        note_ending(point.folder, Status.CANCELLED)
    jobs = [(point, read_job(point.folder)) for point in in_flight]
    for name, scheduler in schedulers().items():
        scheduler.cancel([str(job[name]) for _, job in jobs if name in job])
    for point, job in jobs:
        if is_elsewhere(job):
            say(f"{point.name} is run by process {job['pid']} of {job['host']}: end it there")
        elif "pid" in job:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(job["pid"], signal.SIGTERM)
    say(f"{len(here)} points were asked to end, and no other is started")
    say("the same command as before goes on with all of them")
    tell_next(sweep)
    return 0


def _log(sweep: Sweep, point: Point) -> Path | None:
    job = read_job(point.folder)
    for name, scheduler in schedulers().items():
        if name in job:
            return scheduler.log_of(sweep.folder, str(job[name]))
    return sweep.log(point)


_DOES = {"status": _status, "wait": _wait, "cancel": _cancel}

if __name__ == "__main__":
    terminal.run_command(main)
