"""Writing, reading, appending to and locking files: the one way each is done; a crash or a full disk leaves no half."""

import contextlib
import errno
import fcntl
import functools
import glob
import json
import os
from collections.abc import Iterable, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

from relloc.errors import DamagedFile, DataError, data_errors

# What file systems without locks answer (Lustre mounted without flock, some FUSE ones)
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_CHUNK = 1 << 16


def unfinished(path: Path) -> Path:
    """Where this process writes a file before that takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def path_as_text(path: Path | str) -> str:
    r"""A path as it may be written anywhere: bytes that are no UTF-8 are told as `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed began to write in the place of a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*unfinished"):
        left.unlink(missing_ok=True)


def remove_all_unfinished(folder: Path, *, but: str = "") -> None:
    """Remove what processes that were killed began to write in a folder, but for a file named `but`."""
    for left in folder.glob(".*.unfinished"):
        if not left.name.startswith(f".{but}."):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BufferedRandom]:
    """A file that takes the place of what was there once the block ends, whole and on the disk; else nothing changes.

    Raises `OSError`.
    """
    new = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:  # also a signal that asks to stop
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # writing knows of a number only
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            new.unlink()
        raise


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, in the place of what was there. Raises `OSError`."""
    with writing(path) as file:
        file.write(content)


def write_json(path: Path, value: object, *, errors: str = "strict") -> None:
    """Replace a JSON file at once: a reader sees the old one or the new one, never a part. Raises `OSError`.

    `errors` as of `str.encode`: what becomes of a path's bytes that are no text.
    """
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(path, text.encode("utf-8", errors))


def read_json(path: Path, kind: Any, what: str, advice: str) -> Any:
    """The value of a JSON file, checked against the type `kind`, such as a dataclass or list[str].

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it can't be read, or is not `what` it should be; `advice` says what to do then.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as error:
        raise DamagedFile(f"{path} can't be read ({error.strerror}). {advice}") from error
    return parse_json(content, kind, f"{path} is not {what}", advice)


def parse_json(content: bytes, kind: Any, problem: str, advice: str) -> Any:
    """JSON text as a value of the type `kind`. Raises `DamagedFile`, which says `problem`, why, and `advice`."""
    from pydantic import ValidationError  # late, as it takes a while

    try:
        return _validator(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        why = f"{place}: {first['msg']}" if place else first["msg"]
        raise DamagedFile(f"{problem}: {why}. {advice}") from error


@functools.cache
def _validator(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_text(path: Path, advice: str) -> str:
    """The text of a file of a data set; bytes that are no UTF-8 stay as surrogates.

    Raises:
        DataError: it is missing, can't be read, or is no file: to open a pipe would wait for ever.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file. {advice}")
    problem = "can't be read" if path.exists() else "is missing"
    with data_errors(f"{path} {problem}", OSError, advice=advice):
        return path.read_text(encoding="utf-8", errors="surrogateescape")


def append_lines(path: Path, lines: Iterable[str], *, durable: bool = True) -> None:
    """Append whole lines: all of them or, where the disk is full, none; `durable`: on disk before returning.

    A last line that a kill left without its end is cut off first. Several processes may append to one file: each
    waits for the other, where the file system has locks.

    Raises:
        OSError: they could not be written; the file is as it was.
    """
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    # Without a buffer: one that could not be emptied is written when the file is closed, behind the cut.
    with open(path, "a+b", buffering=0) as file, _exclusive(file):
        end = _cut_half_line(file)
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            if durable:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), end)
            error.filename = str(path)  # writing knows of a number only
            raise


def read_lines(path: Path) -> list[bytes]:
    """The finished lines of a file that grows by `append_lines`, without their ends; none where there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return content.split(b"\n")[:-1]  # what follows the last line end is unfinished, or empty


def _cut_half_line(file: IO[bytes]) -> int:
    """Truncate behind the last line end; how many bytes are left."""
    end = position = os.fstat(file.fileno()).st_size
    found = 0
    # Backward, in pieces: a journal may be long, and is nearly always whole.
    while position and not found:
        start = max(0, position - _CHUNK)
        file.seek(start)
        piece = file.read(position - start)
        found = start + piece.rfind(b"\n") + 1 if b"\n" in piece else 0
        position = start
    if found < end:
        os.ftruncate(file.fileno(), found)
    return found


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among processes and threads; no lock on file systems that have none."""
    with open(path, "ab") as file, _exclusive(file):
        yield


@contextlib.contextmanager
def _exclusive(file: IO[bytes]) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    try:
        yield
    finally:
        # Said out loud: a process forked meanwhile (a loader's worker) has the file open too.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
