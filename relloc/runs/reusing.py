"""Spares evaluations work: rows that other runs measured are used again, and a stopped evaluation goes on."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from relloc import ranks
from relloc.checkpoints import states
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.evaluation.contract import EvaluatedModel
from relloc.pretext.stopping import Stopped, StopRequest
from relloc.results import RESULTS_FILE, Result, append_results, read_results
from relloc.runs import console
from relloc.runs.folder import UNREADABLE_FILE
from relloc.runs.refusing import STATES

PATIENCE_S = 5  # between two states; a cluster gives half a minute or more from its signal to `kill -9`
_RUN_FOLDERS = ("*", "*/*", "sweeps/*/*")

Which = tuple[str, str, str]  # name of the evaluation, batch norm, fingerprint


class KnownRows:
    """Rows that are there already: in `run_dir`, and in the other run folders below `runs` (None: in no other)."""

    def __init__(self, run_dir: Path, runs: Path | None) -> None:
        self.run_dir = run_dir
        self._elsewhere = _rows_below(runs, run_dir) if runs else {}
        self._told: set[tuple[str, str]] = set()

    def of(self, model: EvaluatedModel) -> list[Result]:
        """The rows of a model in this run folder."""
        return [row for row in read_results(self.run_dir) if row.checkpoint == model.checkpoint]

    def has(self, model: EvaluatedModel, name: str, batch_norm: str, fingerprint: str) -> bool:
        """Whether a part of an evaluation needs no measuring; rows of other runs are copied into this one's."""
        which = (name, batch_norm, fingerprint)
        here = [row for row in read_results(self.run_dir) if (row.eval, row.batch_norm, row.fingerprint) == which]
        if any(row.checkpoint == model.checkpoint for row in here):
            return True
        if here:  # the same weights by another path
            found, source = [row for row in here if row.checkpoint == here[0].checkpoint], self.run_dir
        elif which in self._elsewhere:
            source, found = self._elsewhere[which]
        else:
            return False
        copied = {"checkpoint": model.checkpoint}
        rows = [dataclasses.replace(row, **copied, measured_in=row.measured_in or str(source)) for row in found]
        append_results(self.run_dir, rows)
        self._tell(name, batch_norm, rows[0].measured_in)
        return True

    def _tell(self, name: str, batch_norm: str, source: str) -> None:
        if (name, batch_norm) not in self._told:
            self._told.add((name, batch_norm))
            console.say(f"found   {name} ({batch_norm}) of the same weights in {source}; reuse=false measures it again")


def _rows_below(runs: Path, but: Path) -> dict[Which, tuple[Path, list[Result]]]:
    """Rows of the run folders below `runs`; the newest run's count."""
    found: dict[Which, tuple[Path, list[Result]]] = {}
    for path in _of_other_runs(runs, RESULTS_FILE, but):
        run = path.parent
        try:
            rows = read_results(run)
        except (ValueError, OSError):  # of another version, or unreadable: then it is measured again
            continue
        of_run: dict[Which, tuple[Path, list[Result]]] = {}
        for row in rows:
            of_run.setdefault((row.eval, row.batch_norm, row.fingerprint), (run, []))[1].append(row)
        found |= of_run
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
                with contextlib.suppress(FileNotFoundError):  # its run has just finished, and removed it
                    found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def state_file(run_dir: Path, fingerprint: str) -> Path:
    """Where a stopped evaluation is kept until it is finished."""
    return run_dir / _state_name(fingerprint)


def _state_name(fingerprint: str) -> str:
    return f"{STATES}/{fingerprint}.pt"


class ResumableState:
    """A `State` in a file of the run folder; else the newest that a run below `runs` left is loaded.

    It is written `every_s` seconds apart at most, and wherever more than `PATIENCE_S` went by. So what
    was saved last is in the file, or the next call comes within seconds: then a stop waits for that,
    which writes and leaves. Rank 0 reads and writes for all ranks. A full disk is told, and ends nothing.
    """

    def __init__(
        self, run_dir: Path, fingerprint: str, *, every_s: float, stop: StopRequest, runs: Path | None
    ) -> None:
        self.path = state_file(run_dir, fingerprint)
        self._run_dir = run_dir
        self._mark = fingerprint
        self._every_s = every_s
        self._stop = stop
        self._runs = runs
        self._written = self._called = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        return ranks.from_first(self._newest() if ranks.rank() == 0 else None)

    def _newest(self) -> dict[str, Any] | None:
        if self.path.exists() and (state := self._loaded(self.path)) is not None:
            return state
        elsewhere = _of_other_runs(self._runs, _state_name(self._mark), self._run_dir) if self._runs else []
        return next((state for path in reversed(elsewhere) if (state := self._loaded(path)) is not None), None)

    def _loaded(self, path: Path) -> dict[str, Any] | None:
        try:
            state = states.load_state(path)
        except CheckpointError as error:
            if path == self.path and not isinstance(error, DamagedCheckpoint):
                raise  # it may be read another time, and is not to be written over
            console.say(f"{error}. No evaluation goes on from it")
            return None
        console.say(f"eval    goes on from {path}")
        return state

    def save(self, state: dict[str, Any]) -> None:
        now = time.monotonic()
        due = now - self._written >= self._every_s or now - self._called >= PATIENCE_S
        self._stop.listen(awaited=True)  # also while the file is written, which is then whole
        # Rank 0's clock decides for all; a stop, whoever is asked.
        stopping, due = ranks.largest(self._stop.signal or 0, due and ranks.rank() == 0)
        if due or stopping:
            if ranks.rank() == 0:
                self._write(state)
            raise_if_stopped(self._stop)  # on all ranks, once the file is there
        self._called = time.monotonic()

    def _write(self, state: dict[str, Any]) -> None:
        try:
            states.save_state(self.path, state)
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
