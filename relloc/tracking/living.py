"""Marks of processes: which one it was, so that it can be asked later whether it still lives."""

import socket
from collections.abc import Mapping
from typing import Any

import psutil


def process_mark(pid: int) -> dict[str, Any]:
    """What tells a process of this machine from later ones of its number."""
    return {"pid": pid, "host": socket.gethostname(), "born": _born(pid)}


def is_elsewhere(mark: Mapping[str, Any]) -> bool:
    """Whether the process that `process_mark` told of is one of another machine."""
    return mark.get("host", socket.gethostname()) != socket.gethostname()


def is_alive(mark: Mapping[str, Any]) -> bool:
    """Whether the process that `process_mark` told of lives; False on any other machine."""
    born = _born(mark["pid"])
    return not is_elsewhere(mark) and born is not None and born == mark["born"]


def _born(pid: int) -> str | None:
    """When a living process began, in seconds since the machine did, which no change of its clock moves."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return f"{process.create_time() - psutil.boot_time():.2f}"
    except psutil.Error:  # it has ended, perhaps while it was looked at
        return None
