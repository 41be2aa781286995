"""Finds out the status of a sweep's points, from their run folders and from the schedulers.

A run folder says what the run itself noted, such as RUNNING or DONE. A scheduler or the process
table says whether the job that has the point is alive. Neither suffices: a run that was killed
leaves RUNNING behind, and a job that ended may have failed.
"""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.errors import UsageError
from relloc.status import Status
from relloc.sweeps.points import Point, note_ending, read_note
from relloc.terminal import print_error
from relloc.tracking.journal import read_journal
from relloc.tracking.mlflow import sync
from relloc.tracking.process_identity import is_alive, is_elsewhere
from relloc.tracking.record import RunRecord, read_status, write_status
from relloc.tracking.run_lock import is_held
from relloc.tracking.store import StoreError

# A function from job numbers of one scheduler to the status of those jobs that it knows: WAITING or
# RUNNING, or CANCELLED by hand for as long as the scheduler remembers that. It raises `UsageError`
# where the scheduler does not answer. Schedulers register as entry points
Ask = Callable[[Sequence[str]], Mapping[str, Status]]
TRAINED = "train/epoch"
_DAMAGED = "damaged"  # in place of a scheduler's name, for points whose note can't be read
_AGAIN_S = 30.0
# A run that wrote nothing for longer is not alive: saves, reports and measurements of the machine
# are far more frequent
_HEARD_OF_S = 1800.0
_RATE_REPORTS = 20  # reports over which the rate of training is averaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointStatus:
    """The status of a point, with its progress.

    Attributes:
        point: The point.
        status: Its status.
        progress: The part of the training that is done, 0 to 1, or None where it is not known.
        left_s: An estimate of the seconds left, for a point that runs, or None.
    """

    point: Point
    status: Status
    progress: float | None = None
    left_s: float | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a job runs the point, or waits to run it."""
        return self.status in (Status.RUNNING, Status.WAITING)


def schedulers() -> dict[str, Any]:
    """Returns the modules that know jobs, by the name under which `note_job` notes the jobs.

    Launchers bring them as entry points of the group relloc.schedulers.
    """
    return {
        entry_point.name: entry_point.load()
        for entry_point in importlib.metadata.entry_points(group="relloc.schedulers")
    }


def point_statuses(
    points: Sequence[Point], asked: Mapping[str, Ask] | None = None
) -> list[PointStatus]:
    """Returns the status of each point.

    Args:
        points: The points of a sweep.
        asked: The schedulers to ask, each of them once; by default all.

    Raises:
        UsageError: A scheduler does not answer, or a note is damaged.
    """
    found, problems = known_point_statuses(points, asked)
    if problems:
        raise UsageError(problems[0])
    return found


def known_point_statuses(
    points: Sequence[Point], asked: Mapping[str, Ask] | None = None
) -> tuple[list[PointStatus], list[str]]:
    """Returns the status of each point as far as it is known, and messages on what is not known.

    A point is UNKNOWN if only a scheduler that does not answer could say how it stands.

    Args:
        points: The points of a sweep.
        asked: The schedulers to ask, each of them once; by default all.
    """
    if asked is None:
        asked = {name: scheduler.states for name, scheduler in schedulers().items()}
    problems = []
    # Which job has each point
    notes: list[Mapping[str, Any]] = []
    for point in points:
        try:
            notes.append(read_note(point.folder))
        except UsageError as error:
            # One damaged note hides no other point
            notes.append({"job": {_DAMAGED: ""}})
            problems.append(str(error))
    # How these jobs stand, by scheduler and number
    answers = {(_DAMAGED, ""): Status.UNKNOWN}
    for scheduler, ask in asked.items():
        jobs = [note.get("job", {}) for note in notes]
        numbers = [str(job[scheduler]) for job in jobs if scheduler in job]
        # A cluster is not bothered where no point has a job there
        if not numbers:
            continue
        try:
            answer = ask(numbers)
        except UsageError as error:
            answer = dict.fromkeys(numbers, Status.UNKNOWN)
            problems.append(str(error))
        for number, status in answer.items():
            answers[scheduler, number] = status
    found = []
    for point, note in zip(points, notes, strict=True):
        found.append(_point_status(point, note, answers))
    return found, problems


def point_statuses_in_time(
    points: Sequence[Point], asked: Mapping[str, Ask] | None = None
) -> list[PointStatus]:
    """Returns the status of each point, waiting for schedulers that do not answer.

    It is for commands that watch a sweep for hours: the first silence is reported on stderr, and
    the scheduler is asked again every 30 s until it answers.
    """
    is_reported = False
    while True:
        try:
            return point_statuses(points, asked)
        except UsageError as error:
            if not is_reported:
                print_error(f"{error}; asked again every {_AGAIN_S:.0f} s")
            is_reported = True
            time.sleep(_AGAIN_S)


def repair_status(found: Sequence[PointStatus]) -> list[str]:
    """Notes as stopped the runs that are noted as running though no job has them any more.

    MLflow is corrected too. A tracking store that does not answer is mentioned in the message; it
    is corrected when the point runs again, or by relloc.sync.

    Returns:
        A message for each run that was repaired.
    """
    note_cancelled(found)
    messages = []
    for now in found:
        folder = now.point.folder
        # What may still run is left alone
        if now.in_flight or now.status is Status.UNKNOWN:
            continue
        if status_of(folder) is not Status.RUNNING:
            continue
        # First the folder, which is the truth, then its mirror
        write_status(folder, Status.STOPPED)
        message = f"{now.point.name} was ended before it could say so: noted as stopped"
        try:
            uri = RunRecord.read(folder).tracking_uri
            if uri:
                sync(folder, uri)
        except (StoreError, OSError, ValueError) as error:
            message += f", but not in MLflow ({error})"
        messages.append(message)
    return messages


def note_cancelled(found: Sequence[PointStatus]) -> None:
    """Notes which jobs were cancelled, as a cluster remembers that for some minutes only."""
    for now in found:
        if now.status is Status.CANCELLED:
            note_ending(now.point.folder, Status.CANCELLED)


def status_of(folder: Path) -> Status | None:
    """Returns the status that a run noted in its folder, or None where it noted none."""
    try:
        noted = read_status(folder)
    except ValueError:
        # Damaged: as failed, so that the point runs again
        return Status.FAILED
    return noted.status if noted else None


def _point_status(
    point: Point,
    note: Mapping[str, Any],
    answers: Mapping[tuple[str, str], Status],
) -> PointStatus:
    """Returns how a point stands, given the note of its job and the schedulers' answers."""
    folder = point.folder
    own = status_of(folder)
    job = _job_status(folder, note.get("job", {}), answers)
    # Of a silent cluster's job, what it wrote lately is all that is known
    if job is Status.UNKNOWN and own is not Status.DONE and _was_heard_of(folder):
        job = Status.RUNNING
    status = _ended_status(own, note, job)
    # A living job says more than the folder: what failed may be about to run again
    if job is Status.RUNNING or job is Status.WAITING:
        status = job
    if status is Status.DONE:
        return PointStatus(point=point, status=status, progress=1.0)
    progress, left_s = _progress(folder)
    if status is not Status.RUNNING:
        left_s = None
    return PointStatus(point=point, status=status, progress=progress, left_s=left_s)


def _job_status(
    folder: Path,
    job: Mapping[str, Any],
    answers: Mapping[tuple[str, str], Status],
) -> Status | None:
    """Returns the status of the job that has the point or had it last; None if it is gone."""
    # A lock on the run folder shows any command that runs it, also one that is not of this sweep
    if is_held(folder):
        return Status.RUNNING
    if "pid" in job:
        if is_alive(job):
            return Status.RUNNING
        # The process table of another machine can't be read: go by what the run writes
        if is_elsewhere(job) and _was_heard_of(folder):
            return Status.RUNNING
        return None
    for scheduler, number in job.items():
        answer = answers.get((scheduler, str(number)))
        if answer is not None:
            return answer
    return None


def _ended_status(
    own: Status | None,
    note: Mapping[str, Any],
    job: Status | None,
) -> Status:
    """Returns the status of a point that no job is known to run.

    Args:
        own: What its run noted last.
        note: The note of its job, empty where there is none.
        job: CANCELLED or UNKNOWN as the scheduler says, or None where the job is gone.
    """
    # A run that was done before it was cancelled has all its results
    if own is Status.DONE:
        return Status.DONE
    asked_to_end = note.get("ended")
    was_cancelled = job is Status.CANCELLED and own is not Status.FAILED
    if asked_to_end == Status.CANCELLED.word or was_cancelled:
        return Status.CANCELLED
    if job is Status.UNKNOWN:
        return Status.UNKNOWN
    if own is None and not note:
        return Status.MISSING
    # A job that ended without a word, and was not asked to, was refused or could not start
    if own is Status.FAILED or (own is None and not asked_to_end):
        return Status.FAILED
    return Status.STOPPED


def _was_heard_of(folder: Path) -> bool:
    """Returns whether a run noted as running wrote any file in the last 30 minutes.

    Of a run on another machine that is all that can be known.
    """
    if status_of(folder) is not Status.RUNNING:
        return False
    paths = (folder, *folder.glob("*"), *folder.glob("checkpoints/*"))
    try:
        written = max(path.stat().st_mtime for path in paths)
    except FileNotFoundError:
        # A file was removed between listing and looking, so somebody is at work here
        return True
    return time.time() - written < _HEARD_OF_S


def _progress(folder: Path) -> tuple[float | None, float | None]:
    """Returns the part of the training that is done, and an estimate of the seconds left.

    The estimate goes by the rate of the last 20 reports. Both are None where nothing is known.
    """
    try:
        epochs = float(RunRecord.read(folder).params["schedule.epochs"])
        reports = []
        for entry in read_journal(folder):
            if TRAINED in entry.metrics:
                reports.append((entry.time_ms, entry.metrics[TRAINED]))
    except (OSError, ValueError, KeyError):
        # Damaged: the run itself says so when it goes on
        return None, None
    if not reports or not epochs:
        return None, None
    first_ms, first_epoch = reports[-_RATE_REPORTS:][0]
    last_ms, last_epoch = reports[-1]
    left_s = None
    # A single report has no rate, and neither has a run that resumed at an earlier epoch
    if last_epoch > first_epoch:
        epochs_left = max(0.0, epochs - last_epoch)
        left_s = epochs_left * (last_ms - first_ms) / 1000 / (last_epoch - first_epoch)
    return min(1.0, last_epoch / epochs), left_s
