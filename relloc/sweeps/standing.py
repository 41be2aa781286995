"""How the points of a sweep stand, from their run folders and from whoever runs their jobs."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.errors import UsageError
from relloc.status import Status
from relloc.sweeps.points import Point, note_ending, read_note
from relloc.terminal import complain
from relloc.tracking.holding import is_held
from relloc.tracking.journal import read_journal
from relloc.tracking.living import is_alive, is_elsewhere
from relloc.tracking.mlflow import sync
from relloc.tracking.record import RunRecord, read_status, write_status
from relloc.tracking.store import StoreError

# Of jobs by scheduler and number: which of them are WAITING or RUNNING, and which were CANCELLED by hand as far as that
# is remembered. Schedulers register one as an entry point.
Ask = Callable[[Sequence[str]], Mapping[str, Status]]
TRAINED = "train/epoch"
_DAMAGED = "damaged"
_AGAIN_S = 30.0
_HEARD_OF_S = 1800.0  # saves, reports and measurements of the machine are far more frequent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """How a point stands.

    `progress` is the part of the training done, 0 to 1; `left_s` an estimate, of a point that runs; both None where
    nothing is known.
    """

    point: Point
    status: Status
    progress: float | None = None
    left_s: float | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a job has the point, now or in a while."""
        return self.status in (Status.RUNNING, Status.WAITING)


def schedulers() -> dict[str, Any]:
    """Modules that know jobs, by the name under which `note_job` notes these; launchers bring them."""
    return {
        point.name: point.load()
        for point in importlib.metadata.entry_points(group="relloc.schedulers")
    }


def standings(points: Sequence[Point], asked: Mapping[str, Ask] | None = None) -> list[Standing]:
    """How each point stands; the schedulers `asked`, by default all, are asked once each.

    Raises:
        UsageError: one of them does not answer, or a note is damaged.
    """
    found, problems = known_standings(points, asked)
    if problems:
        raise UsageError(problems[0])
    return found


def known_standings(
    points: Sequence[Point], asked: Mapping[str, Ask] | None = None
) -> tuple[list[Standing], list[str]]:
    """How each point stands, as far as that is known here, and what is said by those who do not answer.

    Points that only these know are UNKNOWN, unless their folders say more.
    """
    if asked is None:
        asked = {name: scheduler.states for name, scheduler in schedulers().items()}
    notes: list[Mapping[str, Any]] = []
    problems = []
    for point in points:
        try:
            notes.append(read_note(point.folder))
        except UsageError as error:
            notes.append({"job": {_DAMAGED: ""}})
            problems.append(str(error))
    answers = {(_DAMAGED, ""): Status.UNKNOWN}
    for scheduler, ask in asked.items():
        numbers = [
            str(note["job"][scheduler]) for note in notes if scheduler in note.get("job", {})
        ]
        try:
            answer = ask(numbers) if numbers else {}
        except UsageError as error:
            answer = dict.fromkeys(numbers, Status.UNKNOWN)
            problems.append(str(error))
        answers |= {(scheduler, number): status for number, status in answer.items()}
    return [
        _standing(point, note, answers) for point, note in zip(points, notes, strict=True)
    ], problems


def standings_in_time(
    points: Sequence[Point], asked: Mapping[str, Ask] | None = None
) -> list[Standing]:
    """The same for who watches: a scheduler that does not answer is told once, and asked again until it does."""
    silent = False
    while True:
        try:
            return standings(points, asked)
        except UsageError as error:
            if not silent:
                complain(f"{error}; asked again every {_AGAIN_S:.0f} s")
            silent = True
            time.sleep(_AGAIN_S)


def repair_status(found: Sequence[Standing]) -> list[str]:
    """Note as stopped what is noted as running and has no job any more, and tell MLflow; what was repaired, in words.

    A store that does not answer is told, and hears of it when the point runs again or by relloc.sync.
    """
    note_cancelled(found)
    repaired = []
    for now in found:
        folder = now.point.folder
        if now.in_flight or now.status is Status.UNKNOWN or status_of(folder) is not Status.RUNNING:
            continue
        write_status(folder, Status.STOPPED)
        words = f"{now.point.name} was ended before it could say so: noted as stopped"
        try:
            if uri := RunRecord.read(folder).tracking_uri:
                sync(folder, uri)
        except (StoreError, OSError, ValueError) as error:
            words += f", but not in MLflow ({error})"
        repaired.append(words)
    return repaired


def note_cancelled(found: Sequence[Standing]) -> None:
    """Note which jobs were cancelled, as the cluster remembers it for some minutes only."""
    for now in found:
        if now.status is Status.CANCELLED:
            note_ending(now.point.folder, Status.CANCELLED)


def status_of(folder: Path) -> Status | None:
    """What the run says of itself; None where it says nothing."""
    try:
        found = read_status(folder)
    except ValueError:  # damaged: it runs again
        return Status.FAILED
    return found.status if found else None


def _standing(
    point: Point, note: Mapping[str, Any], answers: Mapping[tuple[str, str], Status]
) -> Standing:
    folder = point.folder
    own, job = status_of(folder), _job_status(folder, note.get("job", {}), answers)
    if job is Status.UNKNOWN and own is not Status.DONE and _was_heard_of(folder):
        job = Status.RUNNING  # what it wrote lately is all that is known of it
    status = (
        job if job is Status.RUNNING or job is Status.WAITING else _ended_status(own, note, job)
    )
    progress, left_s = (1.0, None) if status is Status.DONE else _progress(folder)
    left_s = left_s if status is Status.RUNNING else None
    return Standing(point=point, status=status, progress=progress, left_s=left_s)


def _job_status(
    folder: Path, job: Mapping[str, Any], answers: Mapping[tuple[str, str], Status]
) -> Status | None:
    """How the job stands that has the point, or had it last; None where it is no more."""
    if is_held(folder):  # by whatever command, also one that is not of this sweep
        return Status.RUNNING
    if "pid" in job:
        return (
            Status.RUNNING
            if is_alive(job) or (is_elsewhere(job) and _was_heard_of(folder))
            else None
        )
    asked = ((name, str(number)) for name, number in job.items())
    return next((answers[one] for one in asked if one in answers), None)


def _ended_status(own: Status | None, note: Mapping[str, Any], job: Status | None) -> Status:
    """How a point ended whose job is no more, or may be for all that is known; `own` is what its run said last."""
    if own is Status.DONE:
        return Status.DONE
    asked = note.get("ended")
    if asked == Status.CANCELLED.word or (job is Status.CANCELLED and own is not Status.FAILED):
        return Status.CANCELLED
    if job is Status.UNKNOWN:
        return Status.UNKNOWN
    if own is None and not note:
        return Status.MISSING
    # A run that says nothing had not begun, or was refused
    return Status.FAILED if own is Status.FAILED or (own is None and not asked) else Status.STOPPED


def _was_heard_of(folder: Path) -> bool:
    """Whether a run that another machine has wrote anything lately, which is all that can be known of it here."""
    if status_of(folder) is not Status.RUNNING:
        return False
    try:
        written = max(
            path.stat().st_mtime
            for path in (folder, *folder.glob("*"), *folder.glob("checkpoints/*"))
        )
    except FileNotFoundError:  # removed while it was looked at
        return True
    return time.time() - written < _HEARD_OF_S


def _progress(folder: Path) -> tuple[float | None, float | None]:
    """The part of the training that is done, and the seconds that the rest takes at the rate of the last reports."""
    try:
        epochs = float(RunRecord.read(folder).params["schedule.epochs"])
        told = [
            (entry.time_ms, entry.metrics[TRAINED])
            for entry in read_journal(folder)
            if TRAINED in entry.metrics
        ]
    except (OSError, ValueError, KeyError):  # damaged: the run itself says so when it goes on
        return None, None
    if not told or not epochs:
        return None, None
    (before_ms, before), (now_ms, now) = told[-20:][0], told[-1]
    left_s = (
        max(0.0, epochs - now) * (now_ms - before_ms) / 1000 / (now - before)
        if now > before
        else None
    )
    return min(1.0, now / epochs), left_s
