"""Mirror: MLflow follows a run from a thread of its own, which training neither waits for nor dies of."""

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

CLOSE_S = 60.0
CLOSE_IN_TROUBLE_S = 20.0
LONGEST_PAUSE_S = 600.0


class Mirror:
    """Sends the run folder to the store at `uri` every `every_s` seconds while training goes on.

    `warn` is called once, from the thread, when the store is first found unreachable or broken;
    from then on attempts grow rarer until one succeeds. Meanwhile system.jsonl is written.
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
        self._trouble: str | None = "nothing was sent"
        self._system: SystemMetrics | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="relloc-mirror", daemon=True)

    def start(self) -> None:
        """Note the run as RUNNING and begin.

        mlflow, and all that sending imports, is imported here (about 3 s), not in the thread: other threads would see
        half-made modules, and a worker that is forked meanwhile may wait for the rest for ever.
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
        """Note how the run ended, send the rest, and wait for that for a bounded time.

        By default 60 s, or 20 s if the store was in trouble. Returns None if all was sent, or else
        one message for the user: what happened, and the command that sends the rest later.
        """
        if timeout_s is None:
            timeout_s = CLOSE_IN_TROUBLE_S if self._failures else CLOSE_S
        try:
            write_status(self._run_dir, status)
        except OSError as error:
            self._fail(error)
        if self._system:
            self._system.stop()
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        trouble = self._trouble
        if self._thread.is_alive():
            trouble = f"sending took longer than {timeout_s:g} s"
        if trouble is None:
            return None
        command = f"python -m relloc.sync {shlex.quote(str(self._run_dir))} --uri {shlex.quote(self._uri)}"
        return f"MLflow has not got everything: {trouble}. Nothing is lost; send it later with\n  {command}"

    def _work(self) -> None:
        pause_s, closing = 0.0, False
        while not closing:
            closing = self._closing.wait(pause_s)
            self._send()
            pause_s = min(
                self._every_s * 2 ** min(self._failures, 10), max(self._every_s, LONGEST_PAUSE_S)
            )

    def _send(self) -> None:
        self._trouble = "sending was cut short"
        try:
            refused = sync(self._run_dir, self._uri).refused
        except (StoreError, OSError, ValueError) as error:
            self._fail(error)
            return
        self._failures, self._trouble = 0, None
        for line in refused:
            if line not in self._refused:
                self._refused.add(line)
                self._warn(f"artifacts.json: {line}")

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self._trouble = str(error)
        if not self._warned:
            self._warned = True
            self._warn(
                f"MLflow does not follow: {error}. Training goes on; the run folder keeps everything."
            )
