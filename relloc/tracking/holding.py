"""run.lock: which run has a folder. A run holds it from its first look into the folder until its end.

The lock is the kernel's (POSIX record locks), so that it is gone with the process, however that ends. Forked processes,
such as those that read images, do not inherit it, and NFS passes it on to other machines. The content of the file only
says who has it, for messages. Where a file system has no locks, or keeps them to one machine, the content decides:
whether a process of this machine lives is looked up by its number, and one of another machine counts as alive as long
as it touches the file.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relloc.errors import UsageError
from relloc.files import NO_LOCKS_HERE
from relloc.tracking.living import is_alive, is_elsewhere, process_mark
from relloc.tracking.mounts import locks_stay_here

LOCK_FILE = "run.lock"
BEAT_S = 30.0  # between two touches of the file
SILENT_S = 300.0  # after so long without a touch, a process of another machine counts as ended
_BUSY = (errno.EAGAIN, errno.EACCES)
_ATTEMPTS = 20  # of taking it: who only asks whether it is held has it for a moment
_PAUSE_S = 0.05
_SETTLE_S = (
    1.0  # without locks: how long another command that starts just now may take to write its name
)
_MOST_BYTES = 1 << 16
# The locks of this process, with their descriptors. They don't stop the process itself, and the file must not be opened
# here again: closing any descriptor of it would end the lock.
_ours: dict[Path, int] = {}


class FolderIsTaken(UsageError):
    """Another run has the folder."""


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Have a run folder to oneself while the block runs; it is made if it is missing.

    Raises:
        FolderIsTaken: another run has it: which, since when, and what to do.
    """
    path = run_dir.resolve() / LOCK_FILE
    if path in _ours:
        raise _taken(run_dir, _note(_ours[path]))
    descriptor, by_name = _lock(path, run_dir)
    _ours[path] = descriptor
    owner = os.getpid()
    try:
        with _touching(descriptor) if by_name else contextlib.nullcontext():
            yield
    finally:
        if os.getpid() == owner:  # not in a process forked meanwhile
            del _ours[path]
            # Removed while it is still locked: who opened it before finds that it is no longer the file of this name.
            with contextlib.suppress(OSError):
                if _is_file_of(path, descriptor):
                    path.unlink()
            os.close(descriptor)


def is_held(run_dir: Path) -> bool:
    """Whether a run has the folder now, on whatever machine."""
    path = run_dir.resolve() / LOCK_FILE
    if path in _ours:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return True
        if error.errno not in NO_LOCKS_HERE:
            raise
        return _lives(_note(descriptor), descriptor)
    else:
        return locks_stay_here(path) and _lives(_of_elsewhere(_note(descriptor)), descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path, run_dir: Path) -> tuple[int, bool]:
    """A descriptor of the file with our name in it, and whether it is the name that keeps others out, not the lock."""
    by = None
    for _ in range(_ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            ours, by_name = _try(path, run_dir, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if ours:
            return descriptor, by_name
        by = _note(descriptor)
        os.close(descriptor)
        time.sleep(_PAUSE_S)
    raise _taken(run_dir, by)


def _try(path: Path, run_dir: Path, descriptor: int) -> tuple[bool, bool]:
    """Whether the folder is ours now (if not, it may be in a moment), and whether by name."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False, False
        if error.errno not in NO_LOCKS_HERE:
            raise
        _claim_by_name(run_dir, descriptor, _note(descriptor))
        return True, True
    if not _is_file_of(path, descriptor):
        return False, False  # the run before has just ended, and removed it
    if locks_stay_here(path):
        _claim_by_name(run_dir, descriptor, _of_elsewhere(_note(descriptor)))
        return True, True
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        _write(descriptor)
    return True, False


def _claim_by_name(run_dir: Path, descriptor: int, before: Mapping[str, Any] | None) -> None:
    """Take the folder by writing our name into the file, unless `before` names a process that lives."""
    if _lives(before, descriptor):
        raise _taken(run_dir, before)
    _write(descriptor)
    time.sleep(_SETTLE_S)
    now = _note(descriptor)
    if now is None or any(now[name] != ours for name, ours in process_mark(os.getpid()).items()):
        raise _taken(run_dir, now)


def _write(descriptor: int) -> None:
    note = process_mark(os.getpid()) | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(note).encode(), 0)
    os.fsync(descriptor)


def _note(descriptor: int) -> dict[str, Any] | None:
    """Who has it, by the content of the file; None where that does not say."""
    try:
        note = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        known = (
            isinstance(note["pid"], int)
            and isinstance(note["host"], str)
            and {"born", "since"} <= note.keys()
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return note if known else None


def _of_elsewhere(note: dict[str, Any] | None) -> dict[str, Any] | None:
    """The note if it is of another machine: on this one the lock has answered already."""
    return note if note and is_elsewhere(note) else None


def _lives(note: Mapping[str, Any] | None, descriptor: int) -> bool:
    if note is None:
        return False
    if is_elsewhere(note):
        return abs(time.time() - os.fstat(descriptor).st_mtime) < SILENT_S
    return note["pid"] != os.getpid() and is_alive(note)


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _touching(descriptor: int) -> Iterator[None]:
    """Touch the file now and then, from a thread, so that other machines see that its process lives."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=touch, name="relloc-run-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _taken(run_dir: Path, note: Mapping[str, Any] | None) -> FolderIsTaken:
    who, stop = "another run, which has not said yet who it is,", "stop it"
    if note:
        who = f"the run of process {note['pid']} on {note['host']}, since {note['since']},"
        stop = f"stop it (kill {note['pid']} on {note['host']})"
    return FolderIsTaken(
        f"{who} has the folder {run_dir}, and nothing was changed there. Wait for it to end or {stop}, after which the "
        "same command goes on with the folder; or give another hydra.run.dir"
    )
