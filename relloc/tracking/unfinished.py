"""Explains why a run folder has no weights yet: its training is still running, or was stopped."""

from collections.abc import Sequence
from pathlib import Path

from relloc.checkpoints.paths import BACKBONE_FILE, saved_trainings
from relloc.tracking.journal import Entry, read_journal
from relloc.tracking.record import RUN_FILE, RunRecord
from relloc.tracking.run_lock import is_held


def unfinished_training(run_dir: Path) -> str:
    """Return a message about a training that has not ended, or "" if the folder holds none.

    The message says how far the training is and how to go on.

    Raises:
        DamagedFile: run.json or the journal can't be read.
    """
    if not (run_dir / RUN_FILE).is_file() or (run_dir / BACKBONE_FILE).exists():
        return ""
    # Evaluations have a run.json as well, and never have weights of their own.
    record = RunRecord.read(run_dir)
    if record.tags.get("relloc.kind") != "train":
        return ""
    if is_held(run_dir):
        return f"{run_dir} is being trained, and has no weights before the end: wait for it"
    # Checkpoints are called step_000001234.pt, so the newest one tells where the training stands.
    checkpoints = saved_trainings(run_dir)
    newest = checkpoints[-1].stem if checkpoints else ""
    step = newest.removeprefix("step_").lstrip("0") or "0"
    n_steps = planned_steps(record, read_journal(run_dir))
    progress = f"step {step}" if n_steps is None else f"step {step} of {n_steps}"
    return (
        f"{run_dir} was stopped at {progress}, and has no weights before the end: "
        f"its own command with hydra.run.dir={run_dir} goes on from there"
    )


def planned_steps(record: RunRecord, journal: Sequence[Entry]) -> int | None:
    """Return how many steps the whole training has, or None if nothing was logged yet.

    The record has the epochs; the journal tells how many steps an epoch has.
    """
    epochs = record.params.get("schedule.epochs")
    if not isinstance(epochs, int | float):
        return None
    for entry in reversed(journal):
        epoch = entry.metrics.get("train/epoch")
        if epoch:
            return round(entry.step / epoch * epochs)
    return None
