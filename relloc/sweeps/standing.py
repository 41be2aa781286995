"""How the points of a sweep stand, from their run folders and from whoever runs their jobs."""

import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from relloc.errors import UsageError
from relloc.sweeps.points import Point, is_alive, is_elsewhere, read_job
from relloc.tracking.holding import is_held
from relloc.tracking.journal import read_journal
from relloc.tracking.record import read_status

State = Literal["done", "running", "waiting", "stopped", "failed", "missing"]
JobState = Literal["running", "waiting"] | None  # None: it is no more
ENDED: tuple[State, ...] = ("done", "stopped", "failed", "missing")
# Of jobs by scheduler and number: how those that are alive stand. Schedulers register one as an entry point.
Ask = Callable[[Sequence[str]], Mapping[str, Literal["running", "waiting"]]]
TRAINED = "train/epoch"
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
    """How each point stands; the schedulers `asked`, by default all, are asked once each. Raises what they raise."""
    if asked is None:
        asked = {name: scheduler.states for name, scheduler in schedulers().items()}
    jobs = [read_job(point.folder) or {} for point in points]
    alive: dict[tuple[str, str], JobState] = {}
    for scheduler, ask in asked.items():
        numbers = [str(job[scheduler]) for job in jobs if scheduler in job]
        alive |= {(scheduler, number): state for number, state in (ask(numbers) if numbers else {}).items()}
    return [
        _standing(point.folder, _job_state(point.folder, job, alive)) for point, job in zip(points, jobs, strict=True)
    ]


def standings_in_time(points: Sequence[Point], asked: Mapping[str, Ask] | None = None) -> list[Standing]:
    """The same for who watches: a scheduler that does not answer is told once, and asked again until it does."""
    silent = False
    while True:
        try:
            return standings(points, asked)
        except UsageError as error:
            if not silent:
                print(f"{error}; asked again every {_AGAIN_S:.0f} s", file=sys.stderr, flush=True)
            silent = True
            time.sleep(_AGAIN_S)


def _job_state(folder: Path, job: Mapping[str, Any], alive: Mapping[tuple[str, str], JobState]) -> JobState:
    if is_held(folder):  # by whatever command, also one that is not of this sweep
        return "running"
    if "pid" in job:
        return "running" if is_alive(job) or (is_elsewhere(job) and _was_heard_of(folder)) else None
    return next((alive[name, str(number)] for name, number in job.items() if (name, str(number)) in alive), None)


def _was_heard_of(folder: Path) -> bool:
    """Whether a run that another machine has wrote anything lately, which is all that can be known of it here."""
    if status_of(folder) != "RUNNING":
        return False
    try:
        written = max(path.stat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob("checkpoints/*")))
    except FileNotFoundError:  # removed while it was looked at
        return True
    return time.time() - written < _HEARD_OF_S


def status_of(folder: Path) -> str | None:
    """What the run says of itself; None where it says nothing."""
    try:
        return (read_status(folder) or {}).get("status")
    except ValueError:  # damaged: it runs again
        return "FAILED"


def _standing(folder: Path, job: JobState) -> Standing:
    status = status_of(folder)
    if job == "waiting":
        return Standing(state="waiting", progress=_progress(folder)[0])
    if job == "running":
        progress, left_s = _progress(folder)
        return Standing(state="running", progress=progress, left_s=left_s)
    if status is None:
        return Standing(state="failed" if read_job(folder) else "missing")
    state: State = {"FINISHED": "done", "FAILED": "failed"}.get(status, "stopped")  # pyright: ignore[reportAssignmentType]
    return Standing(state=state, progress=1.0 if state == "done" else _progress(folder)[0])


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
        return float(json.loads((folder / "run.json").read_text(encoding="utf-8"))["params"]["data.epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
