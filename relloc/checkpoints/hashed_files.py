"""Writes files with their SHA-256 in a second file beside them, and checks it before reading.

The second file is called like the first one with .sha256 appended, and `sha256sum --check` reads
it.
"""

import contextlib
import hashlib
import lzma
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from relloc import files
from relloc.errors import CheckpointError, DamagedCheckpoint

# What the readers of torch, pickle, zip and safetensors raise for damaged files. MemoryError is
# among them, because a damaged file may declare more content than fits into memory.
BROKEN = (
    *(
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
    ),
    *(MemoryError, AssertionError, ImportError, BufferError, struct.error, zlib.error),
    *(pickle.UnpicklingError, zipfile.BadZipFile, lzma.LZMAError, SafetensorError),
)


class HashedFile:
    """A file open for writing, as torch.save takes it, that hashes what is written.

    The first error is kept in `error`, and nothing is written after it. Otherwise torch would go on
    to write the end of the file, and would replace the error by a RuntimeError without its reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, content: bytes | memoryview) -> int:
        """Writes and hashes bytes, unless an error occurred before; returns how many were given."""
        if not self.error:
            try:
                self._file.write(content)
                self.sha256.update(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        if not self.error:
            self._file.flush()


@contextlib.contextmanager
def writing_hashed(path: Path) -> Iterator[HashedFile]:
    """Writes a file and its hash atomically: both are replaced if the block ends without an error.

    Raises:
        CheckpointError: there is no space or no permission; what was at `path` stays.
    """
    hash_is_new = False
    try:
        with files.writing(path) as file:
            hashed = HashedFile(file)
            yield hashed
            if hashed.error:
                raise hashed.error
            # The order matters for a crash in between: the new content is on the disk before its
            # hash is written, and the file gets its name directly after that, when the block ends.
            file.flush()
            os.fsync(file.fileno())
            _write_hash(path, hashed.sha256.hexdigest())
            hash_is_new = True
    except OSError as error:
        # If the renaming failed, the old file stays, and the new hash would call it damaged.
        if hash_is_new:
            hash_file(path).unlink(missing_ok=True)
        raise not_written(path, error) from error


def hash_file(path: Path) -> Path:
    """Returns the file that holds the SHA-256 of `path`."""
    return path.with_name(path.name + ".sha256")


def check_hash(path: Path) -> bool:
    """Compares a file with the SHA-256 beside it, if there is one.

    Files of older versions of relloc, of other projects, and copies may have none.

    Returns:
        Whether there was a hash to compare with.

    Raises:
        DamagedCheckpoint: the file has another hash.
        CheckpointError: the file or its hash can't be read at present.
    """
    note = hash_file(path)
    for file in (path, note):
        _refuse_pipe(file)
    # Copies often come without the file of the hash, so a missing one is no error.
    try:
        text = note.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise not_read(note, error) from error
    # Other programs write the hash in other forms, so any 64 hex digits are taken for one.
    noted = re.findall(r"\b[0-9a-f]{64}\b", text.lower())
    if noted and _digest(path) not in noted:
        raise DamagedCheckpoint(
            f"{damaged(path)}: its SHA-256 is not the one noted in {note.name} "
            "(if you replaced the file yourself, delete that note)"
        )
    return bool(noted)


def damaged(path: Path) -> str:
    """Returns the beginning of a message about a file that is not as it was saved."""
    return f"{path} is damaged or no checkpoint of relloc"


def not_read(path: Path, error: OSError) -> CheckpointError:
    """Returns the error for a file that can't be read now, such as while a network is down."""
    return CheckpointError(f"{path} can't be read ({error.strerror}); nothing was changed")


def not_written(path: Path, error: OSError) -> CheckpointError:
    """Returns the error for a file that can't be written, such as on a full disk."""
    return CheckpointError(
        f"{path} could not be written ({error.strerror}). What was saved before is untouched; "
        "free some space and start the same command with the same hydra.run.dir to go on"
    )


def _write_hash(path: Path, digest: str) -> None:
    files.write_whole(hash_file(path), f"{digest}  {path.name}\n".encode())


def _refuse_pipe(path: Path) -> None:
    """Raises `CheckpointError` if a path is there and is not a file: opening a pipe would block."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file: move it away, or give another path")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise not_read(path, error) from error
