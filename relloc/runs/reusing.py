"""What keeps an evaluation from being measured twice: rows of other runs, and states to go on from."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from relloc import checkpoints
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.evals.contract import Subject
from relloc.results import RESULTS_FILE, Result, append_results, read_results
from relloc.runs import console
from relloc.runs.folder import STATES, UNREADABLE_FILE

Which = tuple[str, str, str]  # name of the evaluation, batch norm, fingerprint


class KnownRows:
    """Rows that are there already: in `run_dir`, and in the other run folders below `runs` (None: in no other)."""

    def __init__(self, run_dir: Path, runs: Path | None) -> None:
        self.run_dir = run_dir
        self._elsewhere = _rows_below(runs, run_dir) if runs else {}
        self._told: set[tuple[str, str]] = set()

    def of(self, subject: Subject) -> list[Result]:
        """The rows of a subject in this run folder."""
        return [row for row in read_results(self.run_dir) if row.checkpoint == subject.checkpoint]

    def has(self, subject: Subject, name: str, batch_norm: str, mark: str) -> bool:
        """Whether a part of an evaluation needs no measuring; rows of other runs are copied into this one's."""
        which = (name, batch_norm, mark)
        here = [row for row in read_results(self.run_dir) if (row.eval, row.batch_norm, row.fingerprint) == which]
        if any(row.checkpoint == subject.checkpoint for row in here):
            return True
        if here:  # the same weights by another path
            found, source = [row for row in here if row.checkpoint == here[0].checkpoint], self.run_dir
        elif which in self._elsewhere:
            source, found = self._elsewhere[which]
        else:
            return False
        copied = {"checkpoint": subject.checkpoint}
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
    files = [path for pattern in ("*", "*/*") for path in runs.glob(f"{pattern}/{RESULTS_FILE}")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        run = path.parent.absolute()
        if run == but or (run / UNREADABLE_FILE).exists():  # an image may have been mended since
            continue
        try:
            rows = read_results(run)
        except (ValueError, OSError):  # of another version, or unreadable: then it is measured again
            continue
        of_run: dict[Which, tuple[Path, list[Result]]] = {}
        for row in rows:
            of_run.setdefault((row.eval, row.batch_norm, row.fingerprint), (run, []))[1].append(row)
        found |= of_run
    return found


def state_file(run_dir: Path, mark: str) -> Path:
    """Where a stopped evaluation is kept until it is finished."""
    return run_dir / STATES / f"{mark}.pt"


class KeptState:
    """A `State` in a file; it is written `every_s` seconds apart at most. A full disk is told, and ends nothing."""

    def __init__(self, path: Path, every_s: float) -> None:
        self.path = path
        self.every_s = every_s
        self._written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            state = checkpoints.load_state(self.path)
        except DamagedCheckpoint as error:
            console.say(f"{error}. This evaluation starts anew")
            return None
        console.say(f"eval    goes on from {self.path}")
        return state

    def save(self, state: dict[str, Any]) -> None:
        if time.monotonic() - self._written < self.every_s:
            return
        try:
            checkpoints.save_state(self.path, state)
        except CheckpointError as error:
            console.say(f"{error}. The evaluation itself goes on")
        self._written = time.monotonic()
