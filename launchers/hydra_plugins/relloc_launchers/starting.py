"""Starts a process whose number is noted before it does anything."""

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from relloc.sweeps.points import Point, note_job
from relloc.tracking.process_identity import process_identity

# The process waits for a line from its parent, and ends if that died before. `exec` turns it into
# the command under the same process number.
_WAIT = 'read -r go && exec "$@" </dev/null'


def start_noted(
    point: Point,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    output: BinaryIO | None,
    messages: BinaryIO,
) -> subprocess.Popen[bytes]:
    """Starts a point's command, in a session of its own, once its run folder notes the process.

    If it were noted after the command began, a kill in between would leave an unknown process, and
    the point would be started a second time. stdout goes to `output`, or to this process's stdout
    if that is None; stderr goes to `messages`.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", _WAIT, "relloc", *command],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=messages,
        start_new_session=True,  # so that Ctrl-C reaches it once, from this process
    )
    try:
        note_job(point, process_identity(process.pid))
    except BaseException:
        # At the end of its input the process ends.
        _send(process, b"")
        process.wait()
        raise
    _send(process, b"go\n")
    return process


def _send(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Writes to a process's input, and closes that."""
    # A process that was killed meanwhile says so by its exit code.
    with contextlib.suppress(BrokenPipeError):
        if process.stdin is not None:
            with process.stdin as waiting:
                waiting.write(line)
