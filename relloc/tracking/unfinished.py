"""What to say of the folder of a training that has not ended, where its weights or results are asked for."""

from pathlib import Path

from relloc.checkpoints.places import BACKBONE_FILE, saved_trainings
from relloc.tracking.holding import is_held
from relloc.tracking.journal import read_journal
from relloc.tracking.record import RUN_FILE, RunRecord


def unfinished_training(run_dir: Path) -> str:
    """How far a training is that left no weights yet, and how it goes on; "" where the folder is not of such a one.

    Raises:
        DamagedFile: what the folder says of its run can't be read.
    """
    if not (run_dir / RUN_FILE).is_file() or (run_dir / BACKBONE_FILE).exists():
        return ""
    record = RunRecord.read(run_dir)
    if record.tags.get("relloc.kind") != "train":
        return ""
    if is_held(run_dir):
        return f"{run_dir} is being trained, and has no weights before the end: wait for it"
    saved = saved_trainings(run_dir)
    step = (saved[-1].stem.removeprefix("step_").lstrip("0") if saved else "") or "0"
    return (
        f"{run_dir} was stopped at step {step}{_of_all(run_dir, record)}, and has no weights before the end: its own "
        f"command with hydra.run.dir={run_dir} goes on from there"
    )


def _of_all(run_dir: Path, record: RunRecord) -> str:
    """How many steps the training has, by the epochs that its journal counts; "" where it has none yet."""
    epochs = record.params.get("schedule.epochs")
    for entry in reversed(read_journal(run_dir)):
        epoch = entry.metrics.get("train/epoch")
        if epoch and isinstance(epochs, int | float):
            return f" of {round(entry.step / epoch * epochs)}"
    return ""
