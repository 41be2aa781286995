"""What differs between the systems that relloc runs on: Linux and macOS."""

import multiprocessing
import os
import sys
from typing import Any


def cores() -> int:
    """How many cores this process may use; of all, where the system knows no such limit (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forks() -> bool:
    """Whether processes that work for this one are forked, and so share the memory that it made before.

    On macOS system libraries start threads that a fork breaks: there they start afresh.
    """
    return sys.platform == "linux"


def process_context() -> Any:
    """What starts such processes: a context of `multiprocessing`."""
    return multiprocessing.get_context("fork" if forks() else "spawn")
