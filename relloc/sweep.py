"""python -m relloc.sweep status|wait|cancel SWEEP...: shows, awaits or cancels a sweep.

It works for any launcher: SLURM, submitit or processes of this machine. SWEEP is the name of the
sweep, as NAME or sweep=NAME, or its folder.
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
from relloc.sweeps.point_status import (
    note_cancelled,
    point_statuses,
    point_statuses_and_problems,
    point_statuses_when_answered,
    repair_status,
    schedulers,
)
from relloc.sweeps.points import Point, note_ending, read_job
from relloc.sweeps.sweep import Sweep, find_sweep
from relloc.sweeps.table import (
    print_failed_points,
    print_message,
    print_next,
    print_silent_schedulers,
    table,
)
from relloc.terminal import quantity
from relloc.tracking.process_identity import is_elsewhere

_POLL_S = 10.0
_NOT_ENDED_WELL = (Status.FAILED, Status.STOPPED, Status.CANCELLED, Status.MISSING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Returns:
        0 if all points are done (after `status` also if they may still become so), 1 if some
        failed, were ended or are missing, 2 after a mistake, and 75 if the status can't be known as
        a cluster does not answer.
    """
    options = parser().parse_args(arguments)
    action = _ACTIONS[options.does]
    try:
        codes = [action(find_sweep(word)) for word in options.sweeps]
    except UsageError as error:
        terminal.print_error(error)
        return error.exit_code
    return max(codes)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    words = argparse.ArgumentParser(prog="python -m relloc.sweep", description=__doc__)
    words.add_argument(
        "does",
        choices=tuple(_ACTIONS),
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
    """Prints a sweep's table, why points failed and the next command; returns the exit code."""
    found, problems = point_statuses_and_problems(sweep.points())
    # Clusters forget soon which jobs were cancelled, so that is noted whenever somebody looks
    note_cancelled(found)
    found = sweep.with_cancelled(found)
    print_message(table(found))
    print_failed_points(found, lambda point: _log(sweep, point))
    print_silent_schedulers(found, problems)
    print_next(sweep)
    statuses = {one.status for one in found}
    if not statuses.isdisjoint(_NOT_ENDED_WELL):
        return 1
    # Something went wrong for certain, or else it is not known whether anything did
    return Interrupted.exit_code if Status.UNKNOWN in statuses else 0


def _wait(sweep: Sweep) -> int:
    """Waits until no job has a point of the sweep, then prints its status."""
    # The first look fails if a cluster does not answer; later ones wait for it
    found = point_statuses(sweep.points())
    while any(one.in_flight for one in found):
        time.sleep(_POLL_S)
        found = point_statuses_when_answered(sweep.points())
    # Jobs that were killed could not note that they ended
    for message in repair_status(found):
        print_message(f"repaired  {message}")
    return _status(sweep)


def _cancel(sweep: Sweep) -> int:
    """Ends all jobs of a sweep, and lets its commands start no others."""
    in_flight = [one.point for one in point_statuses(sweep.points()) if one.in_flight]
    # First the commands on this machine, which would start the next point where one ends
    sweep.cancel()
    # Noted before the jobs are asked: a point that has not begun can't say that it was cancelled
    reachable = [point for point in in_flight if not is_elsewhere(read_job(point.folder))]
    for point in reachable:
        note_ending(point.folder, Status.CANCELLED)
    jobs = [(point, read_job(point.folder)) for point in in_flight]
    # Jobs of clusters, by one request to each
    for name, scheduler in schedulers().items():
        numbers = [str(job[name]) for _, job in jobs if name in job]
        scheduler.cancel(numbers)
    # Processes of this machine, which save their state on SIGTERM
    for point, job in jobs:
        if is_elsewhere(job):
            print_message(
                f"{point.name} is run by process {job['pid']} of {job['host']}: end it there"
            )
        elif "pid" in job:
            # It may have ended meanwhile
            with contextlib.suppress(ProcessLookupError):
                os.kill(job["pid"], signal.SIGTERM)
    print_message(
        f"{quantity(len(reachable), 'point was', 'points were')} asked to end, "
        "and no other is started"
    )
    print_message("the same command as before goes on with all of them")
    print_next(sweep)
    return 0


def _log(sweep: Sweep, point: Point) -> Path | None:
    """Returns the file that has the output of a point, or None if its scheduler knows none."""
    job = read_job(point.folder)
    for name, scheduler in schedulers().items():
        if name in job:
            return scheduler.log_of(sweep.folder, str(job[name]))
    return sweep.log(point)


_ACTIONS = {"status": _status, "wait": _wait, "cancel": _cancel}

if __name__ == "__main__":
    terminal.run_command(main)
