"""Runs a sweep as processes of this machine, several at a time, each with a GPU of its own."""

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
from relloc.sweeps.point_status import point_statuses
from relloc.sweeps.points import Point, note_ending
from relloc.sweeps.table import print_message
from relloc.terminal import escaped, quantity

_POLL_S = 0.2
# Exit codes of a point that a signal ended: it saved first (128 + number), or had not begun
_STOPPED_CODES = {code for number in WATCHED for code in (-number, 128 + number)}


class ProcessLauncher(PointsLauncher):
    """Runs points as processes of this machine.

    A single process at a time prints on this console; several at once write logs. Messages on
    stderr go through the log in either case, which later says why a point failed.

    A signal is passed on to the points, which save and end as they do alone, and no other point is
    started.
    """

    submits_to_scheduler = False
    may_be_chosen_in_files = False
    _has_told_slots = False

    def plan(self, todo: Sequence[Point]) -> None:
        self._running: dict[subprocess.Popen[bytes], tuple[Point, str | None]] = {}
        self._waiting = list(todo)
        self._stop: int | None = None
        self._were_told: set[subprocess.Popen[bytes]] = set()
        devices = _devices()
        asked = self.settings["processes"]
        if asked != "auto" and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise UsageError(
                f"launcher.processes={asked} is neither auto nor a whole number of 1 or more"
            )
        self._slots = max(1, len(devices)) if asked == "auto" else asked
        self._n_devices = len(devices)
        # The GPU of each slot; with more processes than GPUs, some share one.
        self._free: list[str | None] = [None] * self._slots
        if devices:
            self._free = [devices[slot % len(devices)] for slot in range(self._slots)]
        self._since = time.time()

    def follow(self, todo: Sequence[Point]) -> None:
        # A sweeper that searches calls this for each batch of points; the line is printed once.
        if len(todo) > 1 and not self._has_told_slots:
            print_message(f"sweep   {self._slots_and_why()}")
            self._has_told_slots = True
        before = {number: signal.signal(number, self._pass_on) for number in signals_to_watch()}
        # Until all points have ended: fill the free slots, then look which processes have ended.
        try:
            while self._running or (self._waiting and self._stop is None):
                while self._waiting and len(self._running) < self._slots and self._stop is None:
                    # `relloc.sweep cancel` leaves a note in the sweep's folder.
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
            print_message(
                f"sweep   stopped by {signal.Signals(self._stop).name}; "
                "the same command goes on with it"
            )

    def log_of(self, point: Point) -> Path | None:
        return self.sweep.log(point)

    def _slots_and_why(self) -> str:
        """Returns how many points run at a time, why, and which setting changes that."""
        at_a_time = f"{quantity(self._slots, 'point')} at a time"
        if self._on_console:
            return (
                f"{at_a_time} (launcher.processes=1): launcher.processes=N runs N beside each "
                "other, and launcher=local one on each GPU"
            )
        if self.settings["processes"] != "auto":
            return f"{at_a_time} (launcher.processes={self._slots})"
        if self._n_devices:
            return f"{at_a_time}, one on each GPU: launcher.processes=N runs N"
        return (
            f"{at_a_time}, since no GPU was found (launcher.processes=auto): "
            "launcher.processes=N runs N beside each other"
        )

    @property
    def _on_console(self) -> bool:
        """Whether points print on this console, one after the other."""
        return self.settings["processes"] == 1

    def _start_next(self) -> None:
        """Starts the next point that waits, unless another command has taken it."""
        point = self._waiting.pop(0)
        # Another command may have run the point, or may be running it, since it waits here.
        if not to_run(point_statuses([point], {})):
            return
        device = self._free.pop(0)
        environment = self.environment()
        # A single process at a time sees all GPUs, as a run that is alone.
        if device is not None and not self._on_console:
            environment["CUDA_VISIBLE_DEVICES"] = device
        # Processes beside each other share the cores.
        if not self._on_console:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // self._slots)))
        log = self.sweep.log(point)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            self._shown_bytes = file.tell()
            name = escaped(point.name)
            print_message(f"\npoint   {name}" if self._on_console else f"start   {name}: {log}")
            output = None if self._on_console else file
            # Messages go through the log. A pipe would break if this command were killed.
            process = start_noted(
                point, self.command(point), environment=environment, output=output, messages=file
            )
        self._running[process] = (point, device)
        # A signal may have come after the start and before the line above.
        if self._stop is not None and process not in self._were_told:
            process.send_signal(self._stop)

    def _collect(self) -> None:
        """Notes which processes have ended, and frees their slots."""
        ended = [process for process in self._running if process.poll() is not None]
        for process in ended:
            if self._on_console:
                self._show_messages()
            point, device = self._running.pop(process)
            self._free.append(device)
            if process.returncode in _STOPPED_CODES:
                note_ending(point.folder, Status.STOPPED)
            if not self._on_console:
                how = "done"
                if process.returncode != 0:
                    how = f"ended with exit code {process.returncode}"
                print_message(f"end     {point.name}: {how}")

    def _show_messages(self) -> None:
        """Shows what the only running point has written into its log since the last call."""
        for point, _ in self._running.values():
            with open(self.sweep.log(point), "rb") as file:
                file.seek(self._shown_bytes)
                messages = file.read()
            self._shown_bytes += len(messages)
            sys.stderr.write(messages.decode(errors="replace"))
            sys.stderr.flush()

    def _pass_on(self, number: int, _frame: object) -> None:
        """Handles a signal: sends it to all running points."""
        self._stop = number
        self._were_told = set(self._running)
        for process in self._running:
            process.send_signal(number)


def _devices() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    # A user or scheduler that has chosen GPUs is obeyed.
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        # There is no driver, so no GPU.
        return []
    return done.stdout.split()
