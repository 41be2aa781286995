"""Identifies processes across time: by number, machine and start, since numbers are used again."""

import socket
from collections.abc import Mapping
from typing import Any

import psutil


def process_identity(pid: int) -> dict[str, Any]:
    """Return what identifies a process of this machine, as values that JSON can hold."""
    return {"pid": pid, "host": socket.gethostname(), "born": _born(pid)}


def is_elsewhere(mark: Mapping[str, Any]) -> bool:
    """Return whether a process identified by `process_identity` belongs to another machine."""
    this_host = socket.gethostname()
    return mark.get("host", this_host) != this_host


def is_alive(mark: Mapping[str, Any]) -> bool:
    """Returns whether the process that `mark` identifies is alive; False if on another machine."""
    # A process that has the number but another start is a later one.
    born = _born(mark["pid"])
    if is_elsewhere(mark) or born is None:
        return False
    return born == mark["born"]


def _born(pid: int) -> str | None:
    """Return when a process started, or None if it has ended.

    The time is in seconds since the machine started, since the clock may be changed in between.
    """
    try:
        process = psutil.Process(pid)
        # A zombie has ended; only its exit code still waits to be collected.
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return f"{process.create_time() - psutil.boot_time():.2f}"
    except psutil.Error:  # it ended, perhaps in the middle of this function
        return None
