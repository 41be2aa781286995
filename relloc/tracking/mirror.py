"""Sends a run folder to MLflow in the background while training goes on.

A thread calls `relloc.tracking.mlflow.sync` every few seconds. Training never waits for it, and an
unreachable store costs one warning, since everything is in the run folder and can be sent later.
"""

import shlex
import threading
from collections.abc import Callable
from pathlib import Path

from relloc.status import Status
from relloc.tracking.addresses import absolute_uri
from relloc.tracking.imports import import_for
from relloc.tracking.mlflow import sync
from relloc.tracking.record import write_status
from relloc.tracking.store import StoreError
from relloc.tracking.system import SystemMetrics

CLOSE_S = 60.0  # how long the end of a run waits for the last sending
CLOSE_IN_TROUBLE_S = 20.0  # the same if the last attempt failed
LONGEST_PAUSE_S = 600.0  # between two attempts while the store fails
_MOST_DOUBLINGS = 10  # of the pause, after as many failures; keeps the power of two small


class Mirror:
    """Sends a run folder to an MLflow store every `every_s` seconds, from a thread.

    It also measures the machine's load (`SystemMetrics`) while the run goes on.

    Example:
        mirror = Mirror(run_dir, "http://127.0.0.1:5000", warn=print)
        mirror.start()
        ...  # training writes to the run folder
        message = mirror.close("FINISHED")

    Args:
        run_dir: the run folder, with its run.json.
        uri: the address of the store.
        warn: is called once, from the thread, when the store is first found unreachable or broken,
            and once for each file that can't be sent. After failures attempts grow rarer.
        every_s: seconds between two sendings.
    """

    def __init__(
        self, run_dir: Path, uri: str, *, warn: Callable[[str], None], every_s: float = 15.0
    ) -> None:
        self._run_dir = run_dir.resolve()
        self._uri = absolute_uri(uri)
        self._warn = warn
        self._every_s = every_s
        self._failures = 0
        self._warned = False
        self._refused: set[str] = set()
        # Why the store lacks something, or None; until the first sending succeeds it lacks
        # everything.
        self._trouble: str | None = "nothing was sent"
        self._system: SystemMetrics | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="relloc-mirror", daemon=True)

    def start(self) -> None:
        """Write the status RUNNING and start the thread.

        mlflow, and all modules that sending needs, are imported here (about 3 s) and not in the
        thread. Otherwise other threads could see half-imported modules, and a data worker that is
        forked during an import could wait for its lock forever.
        """
        try:
            write_status(self._run_dir, Status.RUNNING)
            import_for(self._uri)
            self._system = SystemMetrics(self._run_dir)
        except (OSError, ImportError, ValueError) as error:  # ValueError: a damaged system.jsonl
            self._fail(error)
            return
        self._thread.start()

    def close(self, status: str, timeout_s: float | None = None) -> str | None:
        """Write the final status, send the rest, and wait for that at most `timeout_s` seconds.

        Args:
            status: how the run ended, such as "FINISHED".
            timeout_s: by default 60 s, or 20 s if the last sending failed.

        Returns:
            None if everything was sent; otherwise a message for the user that says what happened
            and gives the command that sends the rest later.
        """
        if timeout_s is None:
            timeout_s = CLOSE_IN_TROUBLE_S if self._failures else CLOSE_S
        try:
            write_status(self._run_dir, status)
        except OSError as error:
            self._fail(error)
        if self._system:
            self._system.stop()
        # This wakes the thread, which sends once more and ends.
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        trouble = self._trouble
        if self._thread.is_alive():
            trouble = f"sending took longer than {timeout_s:g} s"
        if trouble is None:
            return None
        folder = shlex.quote(str(self._run_dir))
        command = f"python -m relloc.sync {folder} --uri {shlex.quote(self._uri)}"
        return (
            f"MLflow did not receive everything: {trouble}. "
            f"Nothing is lost; send it later with\n  {command}"
        )

    def _work(self) -> None:
        """Send until the mirror is closed, and once more then. This is what the thread runs."""
        pause_s = 0.0
        closing = False
        while not closing:
            closing = self._closing.wait(pause_s)
            self._send()
            # The pause doubles with every failure in a row, so that a dead server is not pestered.
            doublings = min(self._failures, _MOST_DOUBLINGS)
            longest_s = max(self._every_s, LONGEST_PAUSE_S)
            pause_s = min(self._every_s * 2**doublings, longest_s)

    def _send(self) -> None:
        # `close` may stop waiting in the middle of this, and then reports this reason.
        self._trouble = "sending was cut short"
        try:
            refused = sync(self._run_dir, self._uri).refused
        except (StoreError, OSError, ValueError) as error:
            self._fail(error)
            return
        self._failures = 0
        self._trouble = None
        for line in refused:
            if line not in self._refused:
                self._refused.add(line)
                self._warn(f"artifacts.json: {line}")

    def _fail(self, error: Exception) -> None:
        """Count a failure, and warn of the first one only."""
        self._failures += 1
        self._trouble = str(error)
        if not self._warned:
            self._warned = True
            self._warn(
                f"MLflow does not receive this run: {error}. "
                "Training goes on, and the run folder keeps everything."
            )
