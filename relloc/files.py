"""Writes, reads, appends to and locks files; a crash or a full disk leaves nothing half done.

Everything in relloc that writes a file into a run folder or a data set does it by these functions.
"""

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

# How file systems without locks answer to a lock (Lustre mounted without flock, and some FUSE ones)
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_CHUNK = 1 << 16  # bytes read at once when looking for the end of the last line


def unfinished(path: Path) -> Path:
    """Returns the temporary file in which this process writes what will become `path`."""
    # With the process's id, so that two processes never write the same one.
    process_id = os.getpid()
    return path.with_name(f".{path.name}.{process_id}.unfinished")


def path_as_text(path: Path | str) -> str:
    r"""Returns a path as text that can be written anywhere: `\xe9` for a byte that isn't UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def remove_unfinished(path: Path) -> None:
    """Removes the temporary files of `path` that killed processes left behind."""
    escaped_name = glob.escape(path.name)
    for temporary in path.parent.glob(f".{escaped_name}.*unfinished"):
        temporary.unlink(missing_ok=True)


def remove_all_unfinished(folder: Path, *, but: str = "") -> None:
    """Removes temporary files that killed processes left in a folder, except those of `but`."""
    for temporary in folder.glob(".*.unfinished"):
        if not temporary.name.startswith(f".{but}."):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BufferedRandom]:
    """Opens a file that replaces `path` when the block ends, whole and on the disk.

    If the block raises, or the process is killed, `path` stays as it was. Missing folders are made.

    Example:
        >>> with writing(path) as file:
        ...     figure.savefig(file, format="png")

    Raises:
        OSError: the file can't be written.
    """
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            # On the disk before it gets its name; otherwise a power failure could leave an empty
            # file.
            file.flush()
            os.fsync(file.fileno())
        # Replacing is atomic: a reader sees the old file or the new one.
        os.replace(temporary, path)
    except BaseException as error:  # also a signal that asks to stop
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # errors of a write do not name the file
        # A read-only file system refuses even this.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file by one with this content, at once.

    Raises:
        OSError: the file can't be written; what was there is unchanged.
    """
    with writing(path) as file:
        file.write(content)


def write_json(path: Path, value: object, *, errors: str = "strict") -> None:
    """Replaces a JSON file at once: a reader sees the old one or the new one, never a part.

    `errors` is that of `str.encode`: what becomes of a path's bytes that are not UTF-8.

    Raises:
        OSError: the file can't be written; what was there is unchanged.
        ValueError: the value contains nan or infinity, which JSON has no words for.
    """
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(path, text.encode("utf-8", errors))


def read_json(path: Path, kind: Any, what: str, advice: str) -> Any:
    """Returns the value of a JSON file, checked against a type.

    Args:
        path: the file.
        kind: the type, such as a dataclass or list[str].
        what: what the file should be, for the message: "PATH is not WHAT".
        advice: what to do if it is damaged, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: the file can't be read, or its value is not of the type.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        # As Python would raise it, whatever part of the path is missing.
        message = os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, message, str(path)) from None
    except OSError as error:
        problem = f"{path} can't be read ({error.strerror})"
        raise DamagedFile(f"{problem}. {advice}") from error
    return parse_json(content, kind, f"{path} is not {what}", advice)


def parse_json(content: bytes, kind: Any, problem: str, advice: str) -> Any:
    """Returns the value of JSON text, checked against the type `kind`.

    Raises:
        DamagedFile: it is not JSON or not of that type; the message says `problem`, why and
            `advice`.
    """
    from pydantic import ValidationError  # late, since importing pydantic takes a while

    try:
        return _validator(kind).validate_json(content)
    except ValidationError as error:
        # One mistake is enough to say what is wrong; a value may have hundreds.
        details = error.errors(include_url=False, include_context=False, include_input=False)
        first = details[0]
        why = first["msg"]
        field = ".".join(map(str, first["loc"]))
        if field:
            why = f"{field}: {why}"
        raise DamagedFile(f"{problem}: {why}. {advice}") from error


@functools.cache
def _validator(kind: Any) -> Any:
    # Cached, since pydantic takes longer to make a validator than to use it.
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_text(path: Path, advice: str) -> str:
    """Returns the text of a file of a data set; bytes that are not UTF-8 become surrogates.

    Raises:
        DataError: the file is missing, can't be read, or is not a regular file; the message ends
            with `advice`.
    """
    exists = path.exists()
    # A pipe is refused, since opening one would wait for ever.
    if exists and not path.is_file():
        raise DataError(f"{path} is no file. {advice}")
    problem = "can't be read" if exists else "is missing"
    with data_errors(f"{path} {problem}", OSError, advice=advice):
        return path.read_text(encoding="utf-8", errors="surrogateescape")


def append_lines(path: Path, lines: Iterable[str], *, durable: bool = True) -> None:
    """Appends lines to a file: all of them or, if the disk is full, none.

    Several processes may append to one file: each waits for the others, on file systems that have
    locks. A last line without its end, which a killed process left, is cut off first.

    Args:
        path: the file; it is made if there is none.
        lines: the lines, without their ends.
        durable: whether they are on the disk when the function returns.

    Raises:
        OSError: they could not be written; the file is as it was.
    """
    text = "".join(f"{line}\n" for line in lines)
    content = text.encode("utf-8", "surrogateescape")
    # Unbuffered: a buffer that could not be emptied would be written when the file is closed, after
    # the file has been cut to its former length.
    with open(path, "a+b", buffering=0) as file, _exclusive_lock(file):
        former_length = _cut_half_line(file)
        try:
            # One write may take only a part, such as when the disk is nearly full.
            remaining = memoryview(content)
            while remaining:
                n_written = file.write(remaining)
                remaining = remaining[n_written:]
            if durable:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), former_length)
            error.filename = str(path)  # errors of a write do not name the file
            raise


def read_lines(path: Path) -> list[bytes]:
    """Returns the finished lines of a file that `append_lines` writes, without their ends.

    A file that does not exist has no lines.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    # What follows the last line end is an unfinished line, or empty.
    return content.split(b"\n")[:-1]


def read_json_lines(
    path: Path, kind: Any, what: str, advice: str, first_line: int = 0
) -> list[Any]:
    """Returns the values of the finished lines of a file, each checked against the type `kind`.

    Args:
        path: the file; one that does not exist has no lines.
        kind: the type of the value of a line.
        what: what a line is, for messages, such as "a journal entry".
        advice: what to do about a line that is something else.
        first_line: the first line to read, counted from 0.

    Raises:
        DamagedFile: the file can't be read, or a finished line is something else. The message has
            the number of the line, counted from 1.
    """
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DamagedFile(
            f"{path} can't be read ({error.strerror}): put back a copy, or move it away"
        ) from error
    return [
        parse_json(line, kind, f"{path} line {number} is not {what}", advice)
        for number, line in enumerate(lines[first_line:], start=first_line + 1)
    ]


def _cut_half_line(file: IO[bytes]) -> int:
    """Cuts off what follows the last line end, and returns how many bytes are left."""
    length = os.fstat(file.fileno()).st_size
    whole_length = 0
    position = length
    # Backward and piece by piece, since a journal may be long and nearly always ends with a whole
    # line.
    while position > 0 and whole_length == 0:
        start = max(0, position - _CHUNK)
        file.seek(start)
        piece = file.read(position - start)
        line_end = piece.rfind(b"\n")
        if line_end >= 0:
            whole_length = start + line_end + 1
        position = start
    if whole_length < length:
        os.ftruncate(file.fileno(), whole_length)
    return whole_length


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock while the block runs, among processes and threads.

    On a file system that has no locks the block runs without one.
    """
    with open(path, "ab") as file, _exclusive_lock(file):
        yield


@contextlib.contextmanager
def _exclusive_lock(file: IO[bytes]) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    try:
        yield
    finally:
        # Closing the file would not do: a process that was forked meanwhile (one that loads images)
        # has it open too, and the lock would stay as long as that process lives.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
