"""Saves and loads the states of trainings and evaluations as checkpoints.

Files are replaced atomically: after a crash either the new file is complete, or the previous one is
still there.
"""

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
from relloc.checkpoints.paths import saved_trainings, training_folder
from relloc.errors import CheckpointError, DamagedCheckpoint

_NUMBER_KEPT = 2  # checkpoints of a training; if the newest is damaged, the one before serves


def save_training(
    run_dir: Path, state: Mapping[str, Any], step: int, milestone: str | None = None
) -> Path:
    """Saves the state of a training, and deletes checkpoints older than the newest two.

    Each file has its SHA-256 beside it, as `sha256sum --check` reads it.

    Args:
        run_dir: the run folder.
        state: tensors and plain values, such as the state dicts of model and optimizer.
        step: how many steps the training has done.
        milestone: a name, such as "epoch_30", under which the state is saved too and never deleted.

    Returns:
        The file of the checkpoint.

    Raises:
        CheckpointError: there is no space or no permission; earlier checkpoints stay.
    """
    state = {**state, "step": step}
    if milestone:
        save_state(training_folder(run_dir) / f"{milestone}.pt", state)
    path = training_folder(run_dir) / f"step_{step:09d}.pt"
    save_state(path, state)
    # Old ones are deleted last, so that after a crash at any point two checkpoints are there.
    for old in saved_trainings(run_dir)[:-_NUMBER_KEPT]:
        delete_state(old)
    return path


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Saves tensors and plain values for `load_state`, with their SHA-256 in a file beside them.

    The tensors are written one by one, so that this needs almost no memory.

    Raises:
        CheckpointError: there is no space or no permission; what was at `path` stays.
    """
    with writing_hashed(path) as file:
        # torch.save needs only the methods write and flush, whatever its signature says.
        torch.save(dict(state), file)  # pyright: ignore[reportArgumentType]


def delete_state(path: Path) -> None:
    """Deletes what `save_state` saved or began to save at `path`, if it is there."""
    for file in (path, hash_file(path)):
        file.unlink(missing_ok=True)
    files.remove_unfinished(path)


def newest_sound(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Returns the newest checkpoint of a training that is not damaged, or None if there is none.

    A damaged one is renamed to `….damaged`, and `warn` is called with a message.

    Raises:
        CheckpointError: all checkpoints are damaged, or one can't be read at present.
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
    # To start anew would silently lose the work, so that is for the user to decide. Checkpoints
    # that an earlier start renamed count as well.
    if list(training_folder(run_dir).glob("step_*.damaged")):
        raise CheckpointError(
            f"no checkpoint in {training_folder(run_dir)} can be read. Copy a milestone to "
            "step_000000000.pt to go on from there, or give another hydra.run.dir to start anew"
        )
    return None


def load_training(path: Path) -> dict[str, Any]:
    """Loads the state that `save_training` saved; its tensors are on the CPU.

    Raises:
        DamagedCheckpoint: the file is no checkpoint, or not as it was saved.
        CheckpointError: the file is missing, or can't be read at present.
    """
    state = _load(path, mapped=False)
    if "step" not in state:
        raise DamagedCheckpoint(f"{damaged(path)}: it names no step")
    return state


def load_state(path: Path) -> dict[str, Any]:
    """Loads what `save_state` saved; its tensors are on the CPU and mapped from the file.

    Mapped tensors are read from the disk when they are used. A file without a hash is not mapped
    but read whole, since it may be cut off.

    Raises:
        DamagedCheckpoint: the file is no checkpoint, or not as it was saved.
        CheckpointError: the file is missing, or can't be read at present.
    """
    return _load(path, mapped=True)


def _load(path: Path, *, mapped: bool) -> dict[str, Any]:
    """Loads a checkpoint with torch's safe unpickler; tells damaged files from unreadable ones."""
    is_as_saved = check_hash(path)
    # The file is opened once before, because torch's errors do not tell whether a file can't be
    # read or is no checkpoint.
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise not_read(path, error) from error
    try:
        state = _read(path, mapped=mapped and is_as_saved)
    except pickle.UnpicklingError as error:
        # torch's own message is not shown, since it advises to run the code in the file.
        raise DamagedCheckpoint(
            f"{damaged(path)}: it holds more than tensors and plain values"
        ) from error
    except BROKEN as error:
        # A damaged file may name an offset that can't be read, which is reported as EINVAL. Any
        # other OSError, and each one of a file with the right hash, is the system's.
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
        # Only files with the right hash are mapped, so this is a file system that can't map files.
        return _read(path, mapped=False)
