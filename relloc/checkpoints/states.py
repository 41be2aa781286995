"""Checkpoints of trainings and evaluations, saved atomically: a file is there whole, or the one before still is."""

import errno
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from relloc import files
from relloc.checkpoints.hashed_files import (
    BROKEN,
    check_hash,
    damaged,
    hash_file,
    not_read,
    writing_hashed,
)
from relloc.checkpoints.places import saved_trainings, training_folder
from relloc.errors import CheckpointError, DamagedCheckpoint

_KEPT = 2


def save_training(
    run_dir: Path, state: Mapping[str, Any], step: int, milestone: str | None = None
) -> Path:
    """Save the state of a training after `step` steps; the newest two and all named milestones are kept.

    A milestone `epoch_30` is saved as that, besides. Beside each file stands its hash, as
    `sha256sum --check` reads it.

    Raises:
        CheckpointError: no space or no permission; earlier checkpoints stay.
    """
    state = {**state, "step": step}
    if milestone:
        save_state(training_folder(run_dir) / f"{milestone}.pt", state)
    path = training_folder(run_dir) / f"step_{step:09d}.pt"
    save_state(path, state)
    for old in saved_trainings(run_dir)[:-_KEPT]:
        delete_state(old)
    return path


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors and plain values, and their hash beside them, for `load_state`.

    They go to the file one by one: what is saved may be larger than the memory that is left.

    Raises:
        CheckpointError: no space or no permission; what was at `path` stays.
    """
    with writing_hashed(path) as file:
        torch.save(dict(state), file)  # pyright: ignore[reportArgumentType] - it asks for write and flush alone


def delete_state(path: Path) -> None:
    """Remove what `save_state` saved or began to save, if it is there."""
    for file in (path, hash_file(path)):
        file.unlink(missing_ok=True)
    files.remove_unfinished(path)


def newest_sound(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is set aside as `….damaged`, with a warning.

    Raises:
        CheckpointError: there were checkpoints, and all are damaged; or one can't be read at present.
    """
    files.remove_all_unfinished(training_folder(run_dir))
    for path in reversed(saved_trainings(run_dir)):
        try:
            load_training(path)
        except DamagedCheckpoint as error:
            for file in (path, hash_file(path)):
                if file.exists():
                    os.replace(file, file.with_name(f"{file.name}.damaged"))
            warn(f"{error}. It is set aside as {path.name}.damaged")
        else:
            return path
    if list(training_folder(run_dir).glob("step_*.damaged")):  # also those of an earlier start
        raise CheckpointError(
            f"no checkpoint in {training_folder(run_dir)} can be read. Copy a milestone to "
            "step_000000000.pt to go on from there, or give another hydra.run.dir to start anew"
        )
    return None


def load_training(path: Path) -> dict[str, Any]:
    """The state that `save_training` saved, on the CPU.

    Raises:
        DamagedCheckpoint: no checkpoint, or not as it was saved.
        CheckpointError: it is missing, or can't be read at present.
    """
    state = _load(path, mapped=False)
    if "step" not in state:
        raise DamagedCheckpoint(f"{damaged(path)}: it names no step")
    return state


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` saved, on the CPU: its tensors stay in the file until they are read. Raises as `load_training`.

    A file without a hash is read whole, as it may be cut off.
    """
    return _load(path, mapped=True)


def _load(path: Path, *, mapped: bool) -> dict[str, Any]:
    is_as_saved = check_hash(path)
    try:
        with path.open(
            "rb"
        ):  # torch's errors do not tell whether a file can't be read or is no checkpoint
            pass
    except OSError as error:
        raise not_read(path, error) from error
    try:
        state = _read(path, mapped=mapped and is_as_saved)
    except (
        pickle.UnpicklingError
    ) as error:  # torch's own message advises to run the code in the file
        raise DamagedCheckpoint(
            f"{damaged(path)}: it holds more than tensors and plain values"
        ) from error
    except BROKEN as error:
        # Reading at a place that a damaged file names is an invalid argument; other errors are the system's.
        if isinstance(error, OSError) and (is_as_saved or error.errno != errno.EINVAL):
            raise not_read(path, error) from error
        raise DamagedCheckpoint(f"{damaged(path)}: {error}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{damaged(path)}: it holds no named values")
    return state


def _read(path: Path, *, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except RuntimeError:
        if not mapped:
            raise
        return _read(path, mapped=False)  # it is as it was saved: the file system can't map files
