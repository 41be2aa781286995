"""How the points of a sweep stand, from their run folders and from whoever runs their jobs."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from relloc.errors import UsageError
from relloc.status import Status
from relloc.sweeps.points import Point, read_note, was_asked_to_end
from relloc.terminal import complain
from relloc.tracking.holding import is_held
from relloc.tracking.journal import read_journal
from relloc.tracking.living import is_alive, is_elsewhere
from relloc.tracking.record import RunRecord, read_status

State = Literal["done", "running", "waiting", "stopped", "cancelled", "failed", "missing", "unknown"]
JobState = Literal["running", "waiting", "cancelled", "unknown"] | None  # None: it is no more
# Of jobs by scheduler and number: how those that are alive stand, and which were ended by hand as far as that is
# remembered. Schedulers register one as an entry point.
Ask = Callable[[Sequence[str]], Mapping[str, Literal["running", "waiting", "cancelled"]]]
TRAINED = "train/epoch"
_DAMAGED = "damaged"
_AGAIN_S = 30.0
_HEARD_OF_S = 1800.0  # saves, reports and measurements of the machine are far more frequent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """`progress` is the part of the training done, 0 to 1; `left_s` an estimate; both None where nothing is known."""

    state: State
    progress: float | None = None
    left_s: float | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a job has the point, now or in a while."""
        return self.state in ("running", "waiting")


def schedulers() -> dict[str, Any]:
    """Modules that know jobs, by the name under which `note_job` notes these; launchers bring them."""
    return {point.name: point.load() for point in importlib.metadata.entry_points(group="relloc.schedulers")}


def standings(points: Sequence[Point], asked: Mapping[str, Ask] | None = None) -> list[Standing]:
    """How each point stands; the schedulers `asked`, by default all, are asked once each.

    Raises:
        UsageError: one of them does not answer, or a note is damaged.
    """
    found, silent = known_standings(points, asked)
    if silent:
        raise UsageError(silent[0])
    return found


def known_standings(
    points: Sequence[Point], asked: Mapping[str, Ask] | None = None
) -> tuple[list[Standing], list[str]]:
    """How each point stands, as far as that is known here, and what is said by those who do not answer.

    Points that only these know are "unknown", unless their folders say more.
    """
    if asked is None:
        asked = {name: scheduler.states for name, scheduler in schedulers().items()}
    notes, silent = _notes(points)
    jobs = [note.get("job", {}) for note in notes]
    states: dict[tuple[str, str], JobState] = {}
    for scheduler, ask in asked.items():
        numbers = [str(job[scheduler]) for job in jobs if scheduler in job]
        try:
            states |= {(scheduler, number): state for number, state in (ask(numbers) if numbers else {}).items()}
        except UsageError as error:
            silent.append(str(error))
            states |= dict.fromkeys(((scheduler, number) for number in numbers), "unknown")
    found = [
        _standing(point.folder, note, _job_state(point.folder, note.get("job", {}), states))
        for point, note in zip(points, notes, strict=True)
    ]
    return found, silent


def _notes(points: Sequence[Point]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The note of each point; one that is damaged counts as a job of which nothing is known."""
    notes: list[Mapping[str, Any]] = []
    silent = []
    for point in points:
        try:
            notes.append(read_note(point.folder))
        except UsageError as error:
            notes.append({"job": {_DAMAGED: ""}})
            silent.append(str(error))
    return notes, silent


def standings_in_time(points: Sequence[Point], asked: Mapping[str, Ask] | None = None) -> list[Standing]:
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


def _job_state(folder: Path, job: Mapping[str, Any], states: Mapping[tuple[str, str], JobState]) -> JobState:
    if is_held(folder):  # by whatever command, also one that is not of this sweep
        return "running"
    if "pid" in job:
        return "running" if is_alive(job) or (is_elsewhere(job) and _was_heard_of(folder)) else None
    if _DAMAGED in job:
        return "unknown"
    return next((states[name, str(number)] for name, number in job.items() if (name, str(number)) in states), None)


def _was_heard_of(folder: Path) -> bool:
    """Whether a run that another machine has wrote anything lately, which is all that can be known of it here."""
    if status_of(folder) != "RUNNING":
        return False
    try:
        written = max(path.stat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob("checkpoints/*")))
    except FileNotFoundError:  # removed while it was looked at
        return True
    return time.time() - written < _HEARD_OF_S


def status_of(folder: Path) -> Status | None:
    """What the run says of itself; None where it says nothing."""
    try:
        found = read_status(folder)
    except ValueError:  # damaged: it runs again
        return Status.FAILED
    return found.status if found else None


def _standing(folder: Path, note: Mapping[str, Any], job: JobState) -> Standing:
    status = status_of(folder)
    if job == "unknown" and status != "FINISHED":
        # What it wrote lately is all that is known of it.
        job = "running" if _was_heard_of(folder) else job
    if job == "waiting":
        return Standing(state="waiting", progress=_progress(folder)[0])
    if job == "running":
        progress, left_s = _progress(folder)
        return Standing(state="running", progress=progress, left_s=left_s)
    state = _ended_state(status, note, job)
    return Standing(state=state, progress=1.0 if state == "done" else _progress(folder)[0])


def _ended_state(status: str | None, note: Mapping[str, Any], job: JobState) -> State:
    """How a point ended whose job is no more, or may be for all that is known."""
    if status == "FINISHED":
        return "done"
    asked = was_asked_to_end(note)
    if asked == "cancelled" or (job == "cancelled" and status != "FAILED"):
        return "cancelled"
    if job == "unknown":
        return "unknown"
    if status is None:  # the run said nothing of itself: it had not begun, or was refused
        return "missing" if not note else "stopped" if asked else "failed"
    return "failed" if status == "FAILED" else "stopped"


def _progress(folder: Path) -> tuple[float | None, float | None]:
    """The part of the training that is done, and the seconds that the rest takes at the rate of the last reports."""
    try:
        told = [entry for entry in read_journal(folder) if TRAINED in entry.metrics]
    except ValueError:  # damaged: the run itself says so when it goes on
        return None, None
    epochs = _epochs(folder)
    if not told or not epochs:
        return None, None
    last, before = told[-1], told[max(0, len(told) - 20)]
    passed = last.metrics[TRAINED] - before.metrics[TRAINED]
    rest = max(0.0, epochs - last.metrics[TRAINED])
    left_s = rest * (last.time_ms - before.time_ms) / 1000 / passed if passed > 0 else None
    return min(1.0, last.metrics[TRAINED] / epochs), left_s


def _epochs(folder: Path) -> float | None:
    try:
        return float(RunRecord.read(folder).params["schedule.epochs"])
    except (OSError, ValueError, KeyError):
        return None
