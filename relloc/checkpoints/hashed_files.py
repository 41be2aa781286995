"""Files with their SHA-256 noted beside them, as `sha256sum --check` reads it, and what is said of damaged ones."""

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

# What readers raise for damaged files. A content that needs more memory than there is, is none of ours, too.
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
    """A file that is being written, for torch.save as well, hashed as it is written.

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


@contextlib.contextmanager
def writing_hashed(path: Path) -> Iterator[HashedFile]:
    """A file that takes its place, and its hash the one beside it, when the block ends; else nothing changes.

    Raises:
        CheckpointError: no space or no permission.
    """
    hash_is_new = False
    try:
        with files.writing(path) as file:
            hashed = HashedFile(file)
            yield hashed
            if hashed.error:
                raise hashed.error
            # The file is whole on the disk before its hash is there, and takes its place directly after.
            file.flush()
            os.fsync(file.fileno())
            _write_hash(path, hashed.sha256.hexdigest())
            hash_is_new = True
    except OSError as error:
        if hash_is_new:  # it is not that of the file which stays
            hash_file(path).unlink(missing_ok=True)
        raise not_written(path, error) from error


def hash_file(path: Path) -> Path:
    """Where the SHA-256 of a file is noted."""
    return path.with_name(path.name + ".sha256")


def check_hash(path: Path) -> bool:
    """Whether there is a noted hash; files of older versions of relloc, of others, and copies, may have none.

    Raises:
        DamagedCheckpoint: the file is another than the one of which the hash was noted.
        CheckpointError: it, or the note, can't be read at present.
    """
    note = hash_file(path)
    for file in (path, note):
        _refuse_pipe(file)
    try:
        # Others write the note in other words.
        noted = re.findall(
            r"\b[0-9a-f]{64}\b", note.read_text(encoding="ascii", errors="replace").lower()
        )
    except FileNotFoundError:
        return False
    except OSError as error:
        raise not_read(note, error) from error
    if noted and _digest(path) not in noted:
        raise DamagedCheckpoint(
            f"{damaged(path)}: its SHA-256 is not the one noted in {note.name} (if you replaced it yourself, delete "
            "that note)"
        )
    return bool(noted)


def damaged(path: Path) -> str:
    """How a message about a file that is not as it was saved begins."""
    return f"{path} is damaged or no checkpoint of relloc"


def not_read(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not give at present."""
    return CheckpointError(f"{path} can't be read ({error.strerror}); nothing was changed")


def not_written(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that finds no room."""
    return CheckpointError(
        f"{path} could not be written ({error.strerror}). What was saved before is untouched; "
        "free some space and start the same command with the same hydra.run.dir to go on"
    )


def _write_hash(path: Path, digest: str) -> None:
    files.write_whole(hash_file(path), f"{digest}  {path.name}\n".encode())


def _refuse_pipe(path: Path) -> None:
    """Raises `CheckpointError` where a path is there and no file: to open a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file: move it away")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise not_read(path, error) from error
