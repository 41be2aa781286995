"""Differences between the operating systems that relloc runs on: Linux and macOS."""

import multiprocessing
import os
import sys
from typing import Any


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    # A cluster gives a job a part of the cores. macOS knows no such limit, so there it is all of
    # them.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forks() -> bool:
    """Returns whether child processes are forked, and so share the memory of this process.

    On macOS system libraries start threads that do not survive a fork: there, child processes
    start afresh.
    """
    return sys.platform == "linux"


def process_context() -> Any:
    """Returns the context of `multiprocessing` by which child processes are started."""
    method = "fork" if forks() else "spawn"
    return multiprocessing.get_context(method)
