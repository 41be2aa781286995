"""A sweep as processes of this machine, some at a time, each with a GPU of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra_plugins.relloc_launchers.points import PointsLauncher, to_run
from hydra_plugins.relloc_launchers.starting import start_noted

from relloc import machine
from relloc.errors import UsageError
from relloc.pretext.stopping import WATCHED, signals_to_watch
from relloc.status import Status
from relloc.sweeps.points import Point, note_ending
from relloc.sweeps.standing import standings
from relloc.sweeps.table import say
from relloc.terminal import escaped

_POLL_S = 0.2
# Exit codes of a point that was asked to end: it saved first, or it had not begun
_ASKED = {code for number in WATCHED for code in (-number, 128 + number)}


class ProcessLauncher(PointsLauncher):
    """Points as processes: one after the other with their output on this console, or several at once with logs.

    Messages of a point on this console go through its log as well, which says later why it failed.

    A signal is passed on: points save and end as they do alone, and no other is started.
    """

    sends_away = False
    may_be_chosen_in_files = False

    def plan(self, todo: Sequence[Point]) -> None:
        self._running: dict[subprocess.Popen[bytes], tuple[Point, str | None]] = {}
        self._waiting = list(todo)
        self._stop: int | None = None
        devices = _devices()
        asked = self.settings["processes"]
        if asked != "auto" and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise UsageError(
                f"launcher.processes={asked} is neither auto nor a whole number of 1 or more"
            )
        self._slots = max(1, len(devices)) if asked == "auto" else asked
        places = range(self._slots)
        self._free: list[str | None] = [
            devices[place % len(devices)] if devices else None for place in places
        ]
        self._since = time.time()

    def follow(self, todo: Sequence[Point]) -> None:
        before = {number: signal.signal(number, self._pass_on) for number in signals_to_watch()}
        try:
            while self._running or (self._waiting and self._stop is None):
                while self._waiting and len(self._running) < self._slots and self._stop is None:
                    if self.sweep.is_cancelled(self._since):
                        self._waiting.clear()
                        break
                    with self.sweep.locked():
                        self._start_next()
                time.sleep(_POLL_S)
                if self._on_console:
                    self._show_messages()
                self._collect()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop is not None:
            say(
                f"sweep   stopped by {signal.Signals(self._stop).name}; the same command goes on with it"
            )

    def log_of(self, point: Point) -> Path | None:
        return self.sweep.log(point)

    @property
    def _on_console(self) -> bool:
        return self.settings["processes"] == 1

    def _start_next(self) -> None:
        point = self._waiting.pop(0)
        # Another command may have run it, or run it now, while it waited here.
        if not to_run(standings([point], {})):
            return
        device = self._free.pop(0)
        environment = self.environment()
        if device is not None and not self._on_console:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if not self._on_console:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // self._slots)))
        log = self.sweep.log(point)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            self._shown_bytes = file.tell()
            name = escaped(point.name)
            say(f"\npoint   {name}" if self._on_console else f"start   {name}: {log}")
            output = None if self._on_console else file
            # Messages through the log, not through a pipe, which would break with this command.
            process = start_noted(
                point, self.command(point), environment=environment, output=output, messages=file
            )
        self._running[process] = (point, device)

    def _collect(self) -> None:
        for process in [process for process in self._running if process.poll() is not None]:
            if self._on_console:
                self._show_messages()
            point, device = self._running.pop(process)
            self._free.append(device)
            if process.returncode in _ASKED:
                note_ending(point.folder, Status.STOPPED)
            if not self._on_console:
                how = (
                    "done"
                    if process.returncode == 0
                    else f"ended with exit code {process.returncode}"
                )
                say(f"end     {point.name}: {how}")

    def _show_messages(self) -> None:
        """Show on this console what the only running point has written into its log since."""
        for point, _ in self._running.values():
            with open(self.sweep.log(point), "rb") as file:
                file.seek(self._shown_bytes)
                told = file.read()
            self._shown_bytes += len(told)
            sys.stderr.write(told.decode(errors="replace"))
            sys.stderr.flush()

    def _pass_on(self, number: int, _frame: object) -> None:
        self._stop = number
        for process in self._running:
            process.send_signal(number)


def _devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    try:
        asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split()
