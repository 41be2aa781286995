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
from typing import Any, Protocol, runtime_checkable

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

# The `states` of a `Scheduler`, or a function that does the same
StatesFunction = Callable[[Sequence[str]], Mapping[str, Status]]
TRAINED = "train/epoch"
_DAMAGED = "damaged"  # in place of a scheduler's name, for points whose note can't be read
_AGAIN_S = 30.0
# A run that wrote nothing for longer is not alive: saves, reports and measurements of the machine
# are far more frequent
_ALIVE_IF_WRITTEN_WITHIN_S = 1800.0
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


@runtime_checkable
class Scheduler(Protocol):
    """What sweeps ask of a scheduler that runs jobs, such as SLURM.

    A launcher brings one as an entry point of the group relloc.schedulers, in its pyproject.toml. A
    module that has these three functions is one, such as `hydra_plugins.relloc_launchers.slurm`.

    The name of the entry point is that under which the launcher notes a job in the folder of its
    point, by `relloc.sweeps.points.note_job(point, {name: job})`. A job is any text by which the
    scheduler finds it again, also from another process and on another day.
    """

    def states(self, jobs: Sequence[str], /) -> Mapping[str, Status]:
        """Returns the states of those of the jobs that the scheduler knows.

        A state is WAITING or RUNNING, or CANCELLED for a job that a person ended, for as long as
        the scheduler remembers that. Jobs that have ended otherwise are left out: the run folder
        says how they ended.

        Raises:
            UsageError: The scheduler does not answer. Nothing may be returned then, as a job that
                is left out counts as ended, and its point would be run a second time.
        """
        ...

    def cancel(self, jobs: Sequence[str], /) -> None:
        """Ends jobs, also those that wait; does nothing where there are none.

        A job that runs should get SIGTERM first and time to save.

        Raises:
            UsageError: The scheduler does not say that it ended them.
        """
        ...

    def log_of(self, sweep: Path, job: str, /) -> Path | None:
        """Returns the file with the output of a job, or None if there is none yet.

        Args:
            sweep: The folder of the sweep whose command submitted the job.
            job: The job as the launcher noted it.
        """
        ...


def schedulers() -> dict[str, Scheduler]:
    """Returns all schedulers that installed launchers bring, by name."""
    return {
        entry_point.name: entry_point.load()
        for entry_point in importlib.metadata.entry_points(group="relloc.schedulers")
    }


def states_functions() -> dict[str, StatesFunction]:
    """Returns the functions that ask for the states of jobs, by the name of their scheduler."""
    return {name: scheduler.states for name, scheduler in schedulers().items()}


def point_statuses(
    points: Sequence[Point], to_ask: Mapping[str, StatesFunction] | None = None
) -> list[PointStatus]:
    """Returns the status of each point.

    Args:
        points: The points of a sweep.
        to_ask: The schedulers to ask, each of them once, by name; by default all.

    Raises:
        UsageError: A scheduler does not answer, or a note is damaged.
    """
    statuses, problems = point_statuses_and_problems(points, to_ask)
    if problems:
        raise UsageError(problems[0])
    return statuses


def point_statuses_and_problems(
    points: Sequence[Point], to_ask: Mapping[str, StatesFunction] | None = None
) -> tuple[list[PointStatus], list[str]]:
    """Returns the status of each point as far as it is known, and messages on what is not known.

    A point is UNKNOWN if only a scheduler that does not answer could say how it stands.

    Args:
        points: The points of a sweep.
        to_ask: The schedulers to ask, each of them once, by name; by default all.
    """
    if to_ask is None:
        to_ask = states_functions()
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
    for scheduler, states_of in to_ask.items():
        jobs = [note.get("job", {}) for note in notes]
        numbers = [str(job[scheduler]) for job in jobs if scheduler in job]
        # A cluster is not bothered where no point has a job there
        if not numbers:
            continue
        try:
            answer = states_of(numbers)
        except UsageError as error:
            answer = dict.fromkeys(numbers, Status.UNKNOWN)
            problems.append(str(error))
        for number, status in answer.items():
            answers[scheduler, number] = status
    statuses = []
    for point, note in zip(points, notes, strict=True):
        statuses.append(_point_status(point, note, answers))
    return statuses, problems


def point_statuses_when_answered(
    points: Sequence[Point], to_ask: Mapping[str, StatesFunction] | None = None
) -> list[PointStatus]:
    """Returns the status of each point once all schedulers have answered.

    It is for commands that watch a sweep for hours: the first silence is reported on stderr, and
    the scheduler is asked again every 30 s until it answers.
    """
    is_reported = False
    while True:
        try:
            return point_statuses(points, to_ask)
        except UsageError as error:
            if not is_reported:
                print_error(f"{error}; asked again every {_AGAIN_S:.0f} s")
            is_reported = True
            time.sleep(_AGAIN_S)


def repair_status(statuses: Sequence[PointStatus]) -> list[str]:
    """Marks as stopped the runs that are marked as running though no job has them any more.

    MLflow is corrected too. A tracking store that does not answer is mentioned in the message; it
    is corrected when the point runs again, or by relloc.sync.

    Returns:
        A message for each run that was repaired.
    """
    note_cancelled(statuses)
    messages = []
    for point_status in statuses:
        folder = point_status.point.folder
        # What may still run is left alone
        if point_status.in_flight or point_status.status is Status.UNKNOWN:
            continue
        if status_of(folder) is not Status.RUNNING:
            continue
        # First the folder, which is the truth, then its mirror
        write_status(folder, Status.STOPPED)
        message = f"{point_status.point.name} ended without writing its status: marked as stopped"
        try:
            uri = RunRecord.read(folder).tracking_uri
            if uri:
                sync(folder, uri)
        except (StoreError, OSError, ValueError) as error:
            message += f", but not in MLflow ({error})"
        messages.append(message)
    return messages


def note_cancelled(statuses: Sequence[PointStatus]) -> None:
    """Notes which jobs were cancelled, as a cluster remembers that for some minutes only."""
    for point_status in statuses:
        if point_status.status is Status.CANCELLED:
            note_ending(point_status.point.folder, Status.CANCELLED)


def status_of(folder: Path) -> Status | None:
    """Returns the status that a run noted in its folder, or None where it noted none."""
    try:
        written = read_status(folder)
    except ValueError:
        # Damaged: as failed, so that the point runs again
        return Status.FAILED
    return written.status if written else None


def _point_status(
    point: Point,
    note: Mapping[str, Any],
    answers: Mapping[tuple[str, str], Status],
) -> PointStatus:
    """Returns how a point stands, given the note of its job and the schedulers' answers."""
    folder = point.folder
    noted = status_of(folder)
    job = _job_status(folder, note.get("job", {}), answers)
    # If the cluster does not answer, the files that the run wrote are all that is known
    if job is Status.UNKNOWN and noted is not Status.DONE and _wrote_recently(folder):
        job = Status.RUNNING
    status = _ended_status(noted, note, job)
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
        if is_elsewhere(job) and _wrote_recently(folder):
            return Status.RUNNING
        return None
    for scheduler, number in job.items():
        answer = answers.get((scheduler, str(number)))
        if answer is not None:
            return answer
    return None


def _ended_status(
    noted: Status | None,
    note: Mapping[str, Any],
    job: Status | None,
) -> Status:
    """Returns the status of a point that no job is known to run.

    Args:
        noted: What its run noted last.
        note: The note of its job, empty where there is none.
        job: CANCELLED or UNKNOWN as the scheduler says, or None where the job is gone.
    """
    # A run that was done before it was cancelled has all its results
    if noted is Status.DONE:
        return Status.DONE
    asked_to_end = note.get("ended")
    was_cancelled = job is Status.CANCELLED and noted is not Status.FAILED
    if asked_to_end == Status.CANCELLED.word or was_cancelled:
        return Status.CANCELLED
    if job is Status.UNKNOWN:
        return Status.UNKNOWN
    if noted is None and not note:
        return Status.MISSING
    # A job that ended without a word, and was not asked to, was refused or could not start
    if noted is Status.FAILED or (noted is None and not asked_to_end):
        return Status.FAILED
    return Status.STOPPED


def _wrote_recently(folder: Path) -> bool:
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
    return time.time() - written < _ALIVE_IF_WRITTEN_WITHIN_S


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
