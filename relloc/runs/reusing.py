"""Reuses results of other runs, waits for what they measure now, and resumes what was stopped.

All go by the fingerprint of an evaluation, a hash of all that decides its numbers: weights, images,
settings and protocol.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from relloc import ranks
from relloc.checkpoints.states import delete_state, load_state, save_state
from relloc.data.image_set import hash_lines
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.evaluation.contract import EvaluatedModel
from relloc.evaluation.run import EvalPart
from relloc.files import path_as_text
from relloc.pretext.stopping import Stopped, StopRequest
from relloc.results import PERSON, RESULTS_FILE, Result, append_results, read_results
from relloc.runs import console
from relloc.runs.folder import UNREADABLE_FILE, RunFolder
from relloc.runs.refusing import STATES
from relloc.tracking.run_lock import FolderIsTaken, locked_run_folder

# Seconds between two calls of `ResumableState.save` within which a stop may wait for the next one.
# Clusters leave at least half a minute between their signal and `kill -9`.
PATIENCE_S = 5
# Where runs lie below the folder of runs: by themselves, by date and time, and as points of sweeps.
_RUN_FOLDERS = ("[!.]*", "[!.]*/*", "sweeps/*/*")
# Below the folder of runs: a lock for each group of parts that a run is measuring now.
_MEASURED_NOW = ".measured_now"

# Name of an evaluation, and fingerprint. This covers the batch norm of the part; that of a row may
# be another, as of a network of the pretext task.
_Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
    """The run that evaluations are part of, and what they may reuse.

    Args:
        folder: the run folder; None on all ranks but the first, which alone writes and prints.
        save_every_s: least time in seconds between two saved states of an evaluation.
        reused_runs: the folder of runs whose results and states for the same weights are reused, or
            None to reuse only those of this run.
    """

    run_dir: Path
    folder: RunFolder | None
    stop: StopRequest
    save_every_s: float
    reused_runs: Path | None


class ReusableRows:
    """The rows on disk that parts may have: those of this run, and of others that it may reuse.

    Of rows with the same key the newest count, but those of this run before all others.
    """

    def __init__(self, parts: Sequence[EvalPart], run: EvalRun) -> None:
        self.run = run
        self._keys = {_key(part) for part in parts}
        # Of each file of another run: when it was written last, and its rows.
        self._of_files: dict[Path, tuple[float, dict[_Key, list[Result]]]] = {}

    def here(self) -> dict[_Key, list[Result]]:
        """Returns the rows of this run by key."""
        return _rows_by_key(self.run.run_dir)

    def elsewhere(self) -> dict[_Key, list[Result]]:
        """Returns the rows of other runs by key. Only files that changed are read once more."""
        rows: dict[_Key, list[Result]] = {}
        if self.run.reused_runs is None:
            return rows
        files = _files_of_other_runs(self.run.reused_runs, RESULTS_FILE, exclude=self.run.run_dir)
        for written, path in files:
            known = self._of_files.get(path)
            if known is None or known[0] != written:
                known = (written, self._read(path))
                self._of_files[path] = known
            rows |= known[1]
        return rows

    def _read(self, path: Path) -> dict[_Key, list[Result]]:
        # A file may be unreadable or of another version: then its rows are measured again.
        try:
            rows = _rows_by_key(path.parent)
        except (ValueError, OSError):
            return {}
        return {key: rows[key] for key in rows.keys() & self._keys}


def not_measured(
    parts: Sequence[EvalPart], model: EvaluatedModel, rows: ReusableRows
) -> list[EvalPart]:
    """Returns the parts that have yet to be measured.

    Rows that another run measured for the same weights are copied into the run folder. Only rank 0
    calls this.
    """
    run = rows.run
    rows_here = rows.here()
    reusable = rows.elsewhere() | rows_here

    missing: list[EvalPart] = []
    reported: set[tuple[str, str]] = set()
    for part in parts:
        name, _ = key = _key(part)
        found = reusable if part.evaluation.repeatable else rows_here
        if key not in found:
            missing.append(part)
            continue
        # This run may have begun the part, and another one finished it: the state is obsolete.
        delete_state(state_file(run.run_dir, part.fingerprint))
        if any(row.checkpoint == model.checkpoint for row in rows_here.get(key, [])):
            continue
        copies = _copies(found[key], part, model)
        if not copies:
            continue
        append_results(run.run_dir, copies)
        # One line an evaluation and batch norm, not one for each layer.
        if (name, part.batch_norm) not in reported:
            reported.add((name, part.batch_norm))
            console.print_message(
                f"found   {name} ({part.batch_norm}) of the same weights in "
                f"{copies[0].measured_in}; "
                "reuse=false measures it again"
            )
    return missing


@contextlib.contextmanager
def measured_by_us(parts: Sequence[EvalPart], run: EvalRun) -> Iterator[bool]:
    """Yields whether this run may measure a group of parts, or another one is measuring the same.

    Trainings of a sweep end at about the same time, and each compares itself with the same random
    weights. Within the block other runs that reuse results keep from measuring the group; what they
    find afterwards is for `not_measured` to say. Only rank 0 calls this.
    """
    can_share = all(part.evaluation.repeatable for part in parts)
    if run.reused_runs is None or not can_share:
        yield True
        return
    group = hash_lines(sorted(part.fingerprint for part in parts))
    locks = run.reused_runs / _MEASURED_NOW
    with contextlib.ExitStack() as at_end:
        # The folder stays while other groups are locked in it.
        at_end.callback(_remove_if_empty, locks)
        try:
            at_end.enter_context(locked_run_folder(locks, f"{group}.lock"))
        except FolderIsTaken:
            yield False
            return
        except OSError:
            # Other people's runs may be read-only: their results can be reused, and not locked.
            pass
        yield True


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _copies(rows: Sequence[Result], part: EvalPart, model: EvaluatedModel) -> list[Result]:
    """Returns rows of a part as rows of the model, whose weights are the same.

    What a person answered is of no weights, and is not among them.
    """
    of_weights = [row for row in rows if row.checkpoint != PERSON]
    splits = part.named.splits
    copies = []
    for row in of_weights:
        # The same weights may have been measured under several paths. One set of rows is enough;
        # it is copied under the path that this command gave.
        if row.checkpoint != of_weights[0].checkpoint:
            continue
        dataset = row.dataset
        # The folder may have had another name, or rows none, when they were measured. Images that
        # an evaluation makes itself, such as noise, are of no split of it.
        is_of_folder = row.split in (splits.train.split, splits.held_out.split)
        if splits.is_unnamed and is_of_folder:
            dataset = splits.train.name
        copies.append(dataclasses.replace(row, checkpoint=model.checkpoint, dataset=dataset))
    return copies


def _key(part: EvalPart) -> _Key:
    return part.named.name, part.fingerprint


def _rows_by_key(run_dir: Path) -> dict[_Key, list[Result]]:
    """Returns the rows of a run folder by key; each row says in which run it was measured."""
    rows_by_key: dict[_Key, list[Result]] = {}
    for row in read_results(run_dir):
        # A row that was itself copied keeps the run that measured it.
        measured_in = row.measured_in or path_as_text(run_dir)
        row_with_origin = dataclasses.replace(row, measured_in=measured_in)
        key = (row.eval, row.fingerprint)
        rows_by_key.setdefault(key, []).append(row_with_origin)
    return rows_by_key


def _files_of_other_runs(runs: Path, name: str, *, exclude: Path) -> list[tuple[float, Path]]:
    """Returns the files called `name` in run folders below `runs`, with their times, oldest first.

    `name` is the path below a run folder, and `exclude` the run folder that is left out.
    """
    files = []
    for pattern in _RUN_FOLDERS:
        for path in runs.absolute().glob(f"{pattern}/{name}"):
            run_dir = path.parents[name.count("/")]
            # A run that met unreadable images has numbers of fewer images, and the images may have
            # been repaired since.
            if run_dir == exclude or (run_dir / UNREADABLE_FILE).exists():
                continue
            # The run may just have finished, and removed its state.
            with contextlib.suppress(FileNotFoundError):
                files.append((path.stat().st_mtime, path))
    return sorted(files)


def state_file(run_dir: Path, fingerprint: str) -> Path:
    """Returns the file that holds the state of an evaluation until it is finished."""
    return run_dir / STATES / f"{fingerprint}.pt"


class ResumableState:
    """An `EvaluationState` in a file of the run folder, from which a stopped evaluation resumes.

    If the run folder has no such file, the newest one of the runs below `reused_runs` is loaded.
    Rank 0 reads and writes for all ranks. A full disk is reported and stops nothing.

    An evaluation calls `save` often, with all that it needs to go on. The state is written if
    `save_every_s` seconds have passed since it was written last, or `PATIENCE_S` since the last
    call. So at any time either the file is up to date or the next call comes within seconds, and a
    stop can wait for that call, which writes the file and exits.
    """

    def __init__(self, run: EvalRun, fingerprint: str) -> None:
        self.run = run
        self.path = state_file(run.run_dir, fingerprint)
        self._written = self._called = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Returns the saved state, or None if the evaluation has to start anew."""
        return ranks.from_first(self._newest() if ranks.rank() == 0 else None)

    def _newest(self) -> dict[str, Any] | None:
        """Returns the run's own state, or else the newest one that another run left."""
        run = self.run
        paths = []
        if self.path.exists():
            paths.append(self.path)
        if run.reused_runs:
            name = str(self.path.relative_to(run.run_dir))
            oldest_first = _files_of_other_runs(run.reused_runs, name, exclude=run.run_dir)
            paths += [path for _, path in reversed(oldest_first)]
        # A damaged file is reported, and the next one tried.
        for path in paths:
            try:
                state = load_state(path)
            except CheckpointError as error:
                # The run's own file may be readable another time, such as after a problem of the
                # network. To go on would write over it.
                if path == self.path and not isinstance(error, DamagedCheckpoint):
                    raise
                console.print_message(f"{error}. No evaluation is resumed from it")
            else:
                console.print_message(f"eval    goes on from {path}")
                return state
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state if it is time. After a signal it writes, and raises `Stopped`."""
        now = time.monotonic()
        stop = self.run.stop
        is_old = now - self._written >= self.run.save_every_s
        is_slow = now - self._called >= PATIENCE_S
        # From here on a signal waits for the next call, and cuts off no file that is being written.
        stop.listen(awaited=True)
        # All ranks have to decide alike: rank 0's clock counts, and a signal to any of them.
        due = (is_old or is_slow) and ranks.rank() == 0
        stopping, due = ranks.largest(stop.signal or 0, due)
        if due or stopping:
            if ranks.rank() == 0:
                self._write(state)
            # All ranks leave, once the file is there.
            raise_if_stopped(stop)
        self._called = time.monotonic()

    def _write(self, state: dict[str, Any]) -> None:
        """Writes the state; without it the evaluation goes on, and could only not be resumed."""
        try:
            save_state(self.path, state)
        except CheckpointError as error:
            console.print_message(f"{error}. The evaluation itself goes on")
        self._written = time.monotonic()


def raise_if_stopped(stop: StopRequest) -> None:
    """Raises `Stopped`, with the signal's exit code, if any rank was asked to stop.

    Otherwise a signal ends the process at once from here on, since nothing is unsaved. All ranks
    call this together.
    """
    (signal,) = ranks.largest(stop.signal or 0)
    # One that came during the call above must not be forgotten.
    stop.signal = stop.signal or signal or None
    stop.listen(awaited=False)
    if stop:
        raise Stopped(stop.exit_code)
