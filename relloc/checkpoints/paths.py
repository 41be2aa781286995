"""Paths of checkpoints and weights within a run folder. This module does not import torch."""

from pathlib import Path

BACKBONE_FILE = "backbone.safetensors"
# The same weights with batch-norm statistics of whole images
RECALIBRATED_FILE = "backbone_recalibrated.safetensors"
TRAINING_FOLDER = "checkpoints"


def training_folder(run_dir: Path) -> Path:
    """Returns the folder of the checkpoints of a training."""
    return run_dir / TRAINING_FOLDER


def saved_trainings(run_dir: Path) -> list[Path]:
    """Returns the checkpoints in a run folder, oldest first, without the named milestones."""
    # The step in the name has nine digits, so that names sort like numbers.
    return sorted(training_folder(run_dir).glob("step_*.pt"))


def saved_milestones(run_dir: Path) -> list[Path]:
    """Returns the named checkpoints in a run folder, such as epoch_30.pt, which stay for good."""
    return sorted(training_folder(run_dir).glob("epoch_*.pt"))
