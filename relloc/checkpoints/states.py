"""Checkpoints of trainings and evaluations, saved atomically: a file is there whole, or the one before still is."""

import contextlib
import hashlib
import io
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from relloc import files
from relloc.errors import CheckpointError, DamagedCheckpoint

_KEPT = 2
# What torch.load raises for damaged files
UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(OverflowError, MemoryError, AssertionError, struct.error),
)


def write_checkpoint(path: Path, content: bytes | memoryview) -> None:
    """As `write_whole`, with advice. Raises `CheckpointError`: no space or no permission."""
    try:
        files.write_whole(path, content)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be written ({error.strerror}). What was saved before is untouched; "
        "free some space and start the same command with the same hydra.run.dir to go on"
    )


def training_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_training(run_dir: Path, state: Mapping[str, Any], step: int, milestone: str | None = None) -> Path:
    """Save the state of a training after `step` steps; the newest two and all named milestones are kept.

    A milestone `epoch_30` is saved as that, besides. Beside each file stands its hash, as
    `sha256sum --check` reads it.

    Raises:
        CheckpointError: no space or no permission; earlier checkpoints stay.
    """
    content = _serialized({**state, "step": step})
    if milestone:
        write_hashed(training_folder(run_dir) / f"{milestone}.pt", content)
    path = training_folder(run_dir) / f"step_{step:09d}.pt"
    write_hashed(path, content)
    for old in saved_trainings(run_dir)[:-_KEPT]:
        old.unlink(missing_ok=True)
        hash_file(old).unlink(missing_ok=True)
    return path


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors and plain values, and their hash beside them, for `load_state`.

    They go to the file one by one: what is saved may be larger than the memory that is left.

    Raises:
        CheckpointError: no space or no permission; what was at `path` stays.
    """
    unfinished = files.unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _stream(unfinished, state)
        # The hash last: a process that is killed while it saves leaves the old file with the old hash.
        files.write_whole(hash_file(path), _hash_line(path, digest))
        _replace_hashed(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise _not_written(path, error) from error


def delete_state(path: Path) -> None:
    """Remove what `save_state` saved or began to save, if it is there."""
    for file in (path, hash_file(path)):
        file.unlink(missing_ok=True)
    files.remove_unfinished(path)


def _stream(path: Path, state: Mapping[str, Any]) -> str:
    """Write a state to a file and to the disk; its SHA-256."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        torch.save(dict(state), hashed)  # pyright: ignore[reportArgumentType] - it asks for write and flush alone
        if hashed.error:
            raise hashed.error
        os.fsync(file.fileno())
    return hashed.sha256.hexdigest()


class _Hashed:
    """A file for torch.save, hashed as it is written.

    The first error is kept, and nothing is written after it: torch would make a RuntimeError without
    a reason of it, after trying to write the end of the file all the same.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, content: bytes | memoryview) -> int:
        if not self.error:
            try:
                self._file.write(content)
                self.sha256.update(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        if not self.error:
            self._file.flush()


def _replace_hashed(unfinished: Path, path: Path) -> None:
    try:
        os.replace(unfinished, path)
    except OSError:
        hash_file(path).unlink(missing_ok=True)  # it is not that of the file which stays
        raise


def _serialized(state: Mapping[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getbuffer()


def hash_file(path: Path) -> Path:
    """Where the SHA-256 of a file is noted, as `sha256sum --check` reads it."""
    return path.with_name(path.name + ".sha256")


def _hash_line(path: Path, digest: str) -> bytes:
    return f"{digest}  {path.name}\n".encode()


def write_hashed(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, with its SHA-256 beside it. Raises `CheckpointError`: no space or no permission."""
    # The hash first: a checkpoint without one is never left behind, an old one's is not yet wanted.
    write_checkpoint(hash_file(path), _hash_line(path, hashlib.sha256(content).hexdigest()))
    try:
        write_checkpoint(path, content)
    except CheckpointError:
        hash_file(path).unlink(missing_ok=True)
        raise


def saved_trainings(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, oldest first; milestones are not among them."""
    return sorted(training_folder(run_dir).glob("step_*.pt"))


def newest_sound(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is set aside as `….damaged`, with a warning.

    Raises:
        CheckpointError: there were checkpoints, and all are damaged; or one can't be read at present.
    """
    for unfinished in training_folder(run_dir).glob(".*.unfinished"):
        unfinished.unlink(missing_ok=True)  # of a process that was killed while it saved
    for path in reversed(saved_trainings(run_dir)):
        try:
            load_training(path)
        except DamagedCheckpoint as error:
            _set_aside(path)
            warn(f"{error}. It is set aside as {path.name}.damaged")
        else:
            return path
    if list(training_folder(run_dir).glob("step_*.damaged")):  # also those of an earlier start
        raise CheckpointError(
            f"no checkpoint in {training_folder(run_dir)} can be read. Copy a milestone to "
            "step_000000000.pt to go on from there, or give another hydra.run.dir to start anew"
        )
    return None


def _set_aside(path: Path) -> None:
    os.replace(path, path.with_name(path.name + ".damaged"))
    if hash_file(path).exists():
        os.replace(hash_file(path), hash_file(path).with_name(hash_file(path).name + ".damaged"))


def load_training(path: Path) -> dict[str, Any]:
    """The state that `save_training` saved, on the CPU.

    Raises:
        DamagedCheckpoint: no checkpoint, or not as it was saved.
        CheckpointError: it is missing, or can't be read at present.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _not_read(path, error) from error
    _check_hash(path, hashlib.sha256(content).hexdigest())
    state = _parsed(path, lambda: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    if "step" not in state:
        raise DamagedCheckpoint(f"{damaged(path)}: it names no step")
    return state


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` saved, on the CPU: its tensors stay in the file until they are read.

    Raises:
        DamagedCheckpoint: not as it was saved.
        CheckpointError: it is missing, or can't be read at present.
    """
    hashed = _check_hash(path, _digest(path))
    return _parsed(path, lambda: _loaded(path, hashed))


def _loaded(path: Path, hashed: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=hashed)
    except (OSError, RuntimeError) as error:
        if not hashed:
            raise
        if isinstance(error, OSError):
            raise _not_read(path, error) from error
        return _loaded(path, hashed=False)  # it is as it was saved: the file system can't map files


def _parsed(path: Path, load: Callable[[], Any]) -> dict[str, Any]:
    try:
        state = load()
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code in the file
        raise DamagedCheckpoint(f"{damaged(path)}: it holds more than tensors and plain values") from error
    except CheckpointError:  # a ValueError, too
        raise
    except UNREADABLE as error:
        raise DamagedCheckpoint(f"{damaged(path)}: {error}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{damaged(path)}: it holds no named values")
    return state


def damaged(path: Path) -> str:
    """How a message about a file that is not as it was saved begins."""
    return f"{path} is damaged or no checkpoint of relloc"


def _not_read(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} can't be read ({error.strerror}); nothing was changed")


def note_hash(path: Path) -> None:
    """Note the SHA-256 of a file that has none. Raises `CheckpointError`: it can't be read, or the hash not written."""
    write_checkpoint(hash_file(path), _hash_line(path, _digest(path)))


def check_hash(path: Path) -> bool:
    """Whether there is a noted hash; files of older versions of relloc, of others, and copies, may have none.

    Raises:
        DamagedCheckpoint: the file is another than the one of which the hash was noted.
        CheckpointError: it can't be read at present.
    """
    return bool(_noted(path)) and _check_hash(path, _digest(path))


def _noted(path: Path) -> list[str]:
    """The hashes in the note beside a file, which others write in other words; none where there is no note."""
    note = hash_file(path)
    _refuse_pipe(note)
    try:
        return re.findall(r"\b[0-9a-f]{64}\b", note.read_text(encoding="ascii", errors="replace").lower())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _not_read(note, error) from error


def _refuse_pipe(path: Path) -> None:
    """Raises `CheckpointError` where a path is there and no file: to open a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file: move it away")


def _digest(path: Path) -> str:
    _refuse_pipe(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _not_read(path, error) from error


def _check_hash(path: Path, digest: str) -> bool:
    """Whether there is a noted hash. Raises `DamagedCheckpoint` if it is not `digest`."""
    note = hash_file(path)
    if not note.exists():
        return False
    if digest not in _noted(path):
        raise DamagedCheckpoint(
            f"{damaged(path)}: its SHA-256 is not the one noted in {note.name} (if you replaced it yourself, delete "
            "that note)"
        )
    return True
