"""Where a run folder has its weights, for those who only look whether they are there: nothing here imports torch."""

from pathlib import Path

BACKBONE_FILE = "backbone.safetensors"
TRAINING_FOLDER = "checkpoints"


def training_folder(run_dir: Path) -> Path:
    return run_dir / TRAINING_FOLDER


def saved_trainings(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, oldest first; milestones are not among them."""
    return sorted(training_folder(run_dir).glob("step_*.pt"))
