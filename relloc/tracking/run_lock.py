"""Locks a run folder, so that two runs never write to the same one. The lock file is run.lock.

A run holds the lock from its first look into the folder until its end. There are two mechanisms:

* Normally the kernel's POSIX record lock on the file. It vanishes with the process, however that
  ends; forked processes, such as data workers, do not inherit it; and NFS forwards it to other
  machines. The content of the file only serves messages.
* Where a file system has no locks, or does not forward them to other machines, the content of the
  file decides ("by name"). A process of this machine is looked up by its number and start time. One
  of another machine counts as alive as long as it touches the file every now and then.
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
from relloc.tracking.mounts import locks_stay_here
from relloc.tracking.process_identity import is_alive, is_elsewhere, process_identity

LOCK_FILE = "run.lock"
BEAT_S = 30.0  # seconds between two touches of the file
SILENT_S = 300.0  # a process of another machine that did not touch the file for so long has ended
_BUSY = (errno.EAGAIN, errno.EACCES)  # another process has the kernel's lock
# `is_held` takes a shared lock for a moment, so one refusal does not mean that a run has the
# folder.
_ATTEMPTS = 20
_PAUSE_S = 0.05
# Without locks: how long another command that starts at the same time may take to write its name.
_SETTLE_S = 1.0
_MOST_BYTES = 1 << 16
# Lock files that this process holds, with their descriptors. POSIX locks do not exclude their own
# process, hence this table. A held file must not be opened here again: closing any descriptor of it
# would release the lock (fcntl(2)).
_held_here: dict[Path, int] = {}


class FolderIsTaken(UsageError):
    """Another run has locked the run folder."""


@contextlib.contextmanager
def locked_run_folder(run_dir: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Lock a run folder while the block runs. The folder is made if it is missing.

    Locks of other names are for what runs share, in a folder that is that of none.

    Raises:
        FolderIsTaken: another run has locked it; the message says which one and what to do.
    """
    path = run_dir.resolve() / name
    if path in _held_here:
        raise _taken(run_dir, _read_owner(_held_here[path]))
    descriptor, by_name = _lock(path, run_dir)
    _held_here[path] = descriptor
    owner = os.getpid()
    try:
        with _touching(descriptor) if by_name else contextlib.nullcontext():
            yield
    finally:
        # A process that was forked within the block must not release the lock of its parent.
        if os.getpid() == owner:
            del _held_here[path]
            # The file is removed while it is still locked. A process that opened it before gets a
            # lock on a file without a name, which `_try_lock` notices, and opens the new one.
            with contextlib.suppress(OSError):
                if _is_file_of(path, descriptor):
                    path.unlink()
            os.close(descriptor)


def is_held(run_dir: Path) -> bool:
    """Return whether a run has locked the folder now, on any machine."""
    path = run_dir.resolve() / LOCK_FILE
    if path in _held_here:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    # A shared lock can be taken only while no run has the exclusive one; it is released at the end.
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return True
        if error.errno not in NO_LOCKS_HERE:
            raise
        return _is_alive(_read_owner(descriptor), descriptor)
    else:
        # No process of this machine has it. Where locks are not forwarded, another machine may.
        if not locks_stay_here(path):
            return False
        return _is_alive(_only_elsewhere(_read_owner(descriptor)), descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path, run_dir: Path) -> tuple[int, bool]:
    """Lock the file and write our name into it.

    Returns:
        The open descriptor, and whether the name keeps other runs out instead of the kernel's lock.

    Raises:
        FolderIsTaken: another run has it.
    """
    owner = None
    for _ in range(_ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another process has just removed the empty folder
        try:
            is_locked, by_name = _try_lock(path, run_dir, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if is_locked:
            return descriptor, by_name
        owner = _read_owner(descriptor)
        os.close(descriptor)
        time.sleep(_PAUSE_S)
    raise _taken(run_dir, owner)


def _try_lock(path: Path, run_dir: Path, descriptor: int) -> tuple[bool, bool]:
    """Try once to lock the open file `descriptor`.

    Returns:
        Whether it is locked now (if not, another attempt may succeed), and whether only by name.

    Raises:
        FolderIsTaken: without usable locks, the file names another process that is alive.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False, False
        if error.errno not in NO_LOCKS_HERE:
            raise
        _claim_by_name(run_dir, descriptor, _read_owner(descriptor))
        return True, True
    if not _is_file_of(path, descriptor):
        return False, False  # the previous run has just ended and removed the file
    # The kernel's lock keeps out this machine only, so runs of other machines are looked up by
    # name.
    if locks_stay_here(path):
        _claim_by_name(run_dir, descriptor, _only_elsewhere(_read_owner(descriptor)))
        return True, True
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        _write_owner(descriptor)
    return True, False


def _claim_by_name(
    run_dir: Path, descriptor: int, previous_owner: Mapping[str, Any] | None
) -> None:
    """Lock the folder by writing our name into the file, unless its previous owner is alive.

    Raises:
        FolderIsTaken: the previous owner is alive, or another process wrote its name after us.
    """
    if _is_alive(previous_owner, descriptor):
        raise _taken(run_dir, previous_owner)
    # Of several processes that write at the same time, the last one has the folder. After a pause
    # that is long enough for all of them, each reads who that is.
    _write_owner(descriptor)
    time.sleep(_SETTLE_S)
    owner = _read_owner(descriptor)
    if owner is None:
        raise _taken(run_dir, owner)
    this_process = process_identity(os.getpid())
    if any(owner[name] != value for name, value in this_process.items()):
        raise _taken(run_dir, owner)


def _write_owner(descriptor: int) -> None:
    note = process_identity(os.getpid()) | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(note).encode(), 0)
    os.fsync(descriptor)


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """Return the process that the file names as its owner, or None if it names none."""
    try:
        note = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        has_types = isinstance(note["pid"], int) and isinstance(note["host"], str)
        is_complete = has_types and {"born", "since"} <= note.keys()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return note if is_complete else None


def _only_elsewhere(note: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the note if its process is on another machine: for this one the lock has answered."""
    return note if note and is_elsewhere(note) else None


def _is_alive(note: Mapping[str, Any] | None, descriptor: int) -> bool:
    """Return whether the process of a note is alive, and is not this one."""
    if note is None:
        return False
    if is_elsewhere(note):
        return abs(time.time() - os.fstat(descriptor).st_mtime) < SILENT_S
    return note["pid"] != os.getpid() and is_alive(note)


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Return whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _touching(descriptor: int) -> Iterator[None]:
    """Touch the file every `BEAT_S` seconds within the block, as a sign of life to others."""
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
    if note is None:
        who = "another run, which has not yet written its process number,"
        stop = "stop it"
    else:
        who = f"the run of process {note['pid']} on {note['host']}, since {note['since']},"
        stop = f"stop it (kill {note['pid']} on {note['host']})"
    return FolderIsTaken(
        f"{who} has the folder {run_dir}, and nothing was changed there. "
        f"Wait for it to end or {stop}, after which the same command goes on with the folder; "
        "or give another hydra.run.dir"
    )
