"""Starting a process that is on record before it does anything."""

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from relloc.sweeps.points import Point, note_job
from relloc.tracking.living import process_mark

# The process waits for a line from who started it, and ends where that died first. It keeps its number as it becomes
# the command.
_WAIT = 'read -r go && exec "$@" </dev/null'


def start_noted(
    point: Point,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    output: BinaryIO | None,
    messages: BinaryIO,
) -> subprocess.Popen[bytes]:
    """Start a point's command, in a session of its own, once its run folder notes which process it is.

    Were it noted after the command began, a kill in between would leave a process that nobody knows of, and the
    point would be started a second time. What it prints goes to `output`, or without one where this
    process prints; what it writes on stderr goes to `messages`.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", _WAIT, "relloc", *command],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=messages,
        start_new_session=True,  # Ctrl-C comes once, from us
    )
    try:
        note_job(point, process_mark(process.pid))
    except BaseException:
        _tell(process, b"")  # the end of its input: it ends
        process.wait()
        raise
    _tell(process, b"go\n")
    return process


def _tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it was killed meanwhile, which its exit code says
        if process.stdin is not None:
            with process.stdin as waiting:
                waiting.write(line)
