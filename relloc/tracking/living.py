"""Marks of processes: which one it was, so that it can be asked later whether it still lives."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    """When a living process began, in the kernel's words; "" where these can't be had."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends while it is looked at
        return None if Path("/proc/self").exists() else ""
    return None if fields[0] == "Z" else fields[19]
