"""Spares evaluations work: rows that other runs measured are used again, and a stopped evaluation goes on."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relloc import ranks
from relloc.checkpoints.states import delete_state, load_state, save_state
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.evaluation.contract import EvaluatedModel
from relloc.evaluation.run import EvalPart
from relloc.files import path_as_text
from relloc.pretext.stopping import Stopped, StopRequest
from relloc.results import RESULTS_FILE, Result, append_results, read_results
from relloc.runs import console
from relloc.runs.folder import UNREADABLE_FILE, RunFolder
from relloc.runs.refusing import STATES

PATIENCE_S = (
    5  # between two states; a cluster gives half a minute or more from its signal to `kill -9`
)
_RUN_FOLDERS = ("*", "*/*", "sweeps/*/*")

_Key = tuple[str, str, str]  # name of an evaluation, batch norm, fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
    """The run that evaluations are part of, and what they may use again.

    `folder` is None on all ranks but the first, which alone writes and prints. States are written `save_every_s` apart.
    `reused_runs` is the folder of runs whose rows and states of the same weights are used again; None for no other's.
    """

    run_dir: Path
    folder: RunFolder | None
    stop: StopRequest
    save_every_s: float
    reused_runs: Path | None


def not_measured(parts: Sequence[EvalPart], model: EvaluatedModel, run: EvalRun) -> list[int]:
    """Which of the parts have no rows in the run folder yet. Rows of the same weights elsewhere are copied there."""
    here = _rows_of(run.run_dir)
    known: dict[_Key, list[Result]] = {}
    for path in (
        _of_other_runs(run.reused_runs, RESULTS_FILE, run.run_dir) if run.reused_runs else ()
    ):
        # A file of another version, or an unreadable one: then it is measured again.
        with contextlib.suppress(ValueError, OSError):
            known |= _rows_of(path.parent)  # the newest run's count
    known |= here
    missing: list[int] = []
    named: set[tuple[str, str]] = set()
    for number, part in enumerate(parts):
        name, batch_norm, fingerprint = key = (part.named.name, part.batch_norm, part.fingerprint)
        if key not in known:
            missing.append(number)
            continue
        delete_state(
            state_file(run.run_dir, fingerprint)
        )  # another run may have finished what this one began
        if any(row.checkpoint == model.checkpoint for row in here.get(key, [])):
            continue
        # Of one checkpoint: the same weights may have been measured by several paths.
        first = known[key][0]
        of_one = [row for row in known[key] if row.checkpoint == first.checkpoint]
        append_results(
            run.run_dir, [dataclasses.replace(row, checkpoint=model.checkpoint) for row in of_one]
        )
        if (name, batch_norm) not in named:
            named.add((name, batch_norm))
            place = first.measured_in
            console.say(
                f"found   {name} ({batch_norm}) of the same weights in {place}; reuse=false measures it again"
            )
    return missing


def _rows_of(run_dir: Path) -> dict[_Key, list[Result]]:
    """The rows of a run folder; each says where it was measured."""
    found: dict[_Key, list[Result]] = {}
    for row in read_results(run_dir):
        told = dataclasses.replace(row, measured_in=row.measured_in or path_as_text(run_dir))
        found.setdefault((row.eval, row.batch_norm, row.fingerprint), []).append(told)
    return found


def _of_other_runs(runs: Path, name: str, but: Path) -> list[Path]:
    """Files of that name in run folders below `runs`, oldest first; of none that met broken images.

    An image may have been mended since.
    """
    found = []
    for pattern in _RUN_FOLDERS:
        for path in runs.absolute().glob(f"{pattern}/{name}"):
            run = path.parents[name.count("/")]
            if run != but and not (run / UNREADABLE_FILE).exists():
                with contextlib.suppress(
                    FileNotFoundError
                ):  # its run has just finished, and removed it
                    found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def state_file(run_dir: Path, fingerprint: str) -> Path:
    """Where a stopped evaluation is kept until it is finished."""
    return run_dir / STATES / f"{fingerprint}.pt"


class ResumableState:
    """An `EvaluationState` in a file of the run folder; else the newest that a run below `reused_runs` left is loaded.

    It is written `save_every_s` seconds apart at most, and wherever more than `PATIENCE_S` went by. So what
    was saved last is in the file, or the next call comes within seconds: then a stop waits for that,
    which writes and leaves. Rank 0 reads and writes for all ranks. A full disk is told, and ends nothing.
    """

    def __init__(self, run: EvalRun, fingerprint: str) -> None:
        self.run = run
        self.path = state_file(run.run_dir, fingerprint)
        self._written = self._called = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        return ranks.from_first(self._newest() if ranks.rank() == 0 else None)

    def _newest(self) -> dict[str, Any] | None:
        run, paths = self.run, [self.path] if self.path.exists() else []
        if run.reused_runs:
            paths += reversed(
                _of_other_runs(
                    run.reused_runs, str(self.path.relative_to(run.run_dir)), run.run_dir
                )
            )
        for path in paths:
            try:
                state = load_state(path)
            except CheckpointError as error:
                if path == self.path and not isinstance(error, DamagedCheckpoint):
                    raise  # it may be read another time, and is not to be written over
                console.say(f"{error}. No evaluation goes on from it")
            else:
                console.say(f"eval    goes on from {path}")
                return state
        return None

    def save(self, state: dict[str, Any]) -> None:
        now, stop = time.monotonic(), self.run.stop
        due = now - self._written >= self.run.save_every_s or now - self._called >= PATIENCE_S
        stop.listen(awaited=True)  # also while the file is written, which is then whole
        # Rank 0's clock decides for all; a stop, whoever is asked.
        stopping, due = ranks.largest(stop.signal or 0, due and ranks.rank() == 0)
        if due or stopping:
            if ranks.rank() == 0:
                self._write(state)
            raise_if_stopped(stop)  # on all ranks, once the file is there
        self._called = time.monotonic()

    def _write(self, state: dict[str, Any]) -> None:
        try:
            save_state(self.path, state)
        except CheckpointError as error:
            console.say(f"{error}. The evaluation itself goes on")
        self._written = time.monotonic()


def raise_if_stopped(stop: StopRequest) -> None:
    """Leave the run with the signal's exit code if any rank was asked to stop; else a signal ends it at once again.

    All ranks call it together.
    """
    (signal,) = ranks.largest(stop.signal or 0)
    stop.signal = signal or None
    stop.listen(awaited=False)
    if stop:
        raise Stopped(stop.exit_code)
