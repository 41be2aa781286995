"""Measures the load of the machine during a run, and writes it to system.jsonl in the run folder.

The metrics have MLflow's names, so that its "System metrics" tab shows them. A step is a second
since the first start of the run, so that a resumed run continues the curves.
"""

import contextlib
import importlib
import threading
from pathlib import Path
from typing import Any

from relloc.tracking.journal import SYSTEM_FILE, Journal
from relloc.tracking.record import RunRecord, now_ms

STOP_S = 5.0  # how long the end of a run waits for the thread
# Modules and classes of mlflow.system_metrics.metrics. All need psutil; the one of GPUs also needs
# nvidia-ml-py and NVIDIA's driver.
MONITORS = {
    "cpu_monitor": "CPUMonitor",
    "disk_monitor": "DiskMonitor",
    "network_monitor": "NetworkMonitor",
    "gpu_monitor": "GPUMonitor",
}


class SystemMetrics:
    """Measures processors, memory, disk, network and GPUs in a thread, until stopped.

    What this machine does not report is left out.

    Args:
        run_dir: the run folder, with its run.json.
        every_s: seconds between two measurements.
    """

    def __init__(self, run_dir: Path, *, every_s: float = 15.0) -> None:
        self._started_ms = RunRecord.read(run_dir).started_ms
        self._every_s = every_s
        self._journal = Journal(run_dir, SYSTEM_FILE)
        monitors = [_make_monitor(module, name) for module, name in MONITORS.items()]
        self._monitors = [monitor for monitor in monitors if monitor]
        # The use of processors is counted between two samples, so the first one only starts it.
        self._sample()
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name="relloc-system-metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop measuring; a driver that hangs is waited for at most `STOP_S` seconds."""
        self._stopping.set()
        self._thread.join(timeout=STOP_S)

    def _work(self) -> None:
        while not self._stopping.wait(self._every_s):
            # A full disk must not end the thread, since there may be room again.
            with contextlib.suppress(OSError):
                self._journal.log(self._sample(), (now_ms() - self._started_ms) // 1000)

    def _sample(self) -> dict[str, float]:
        """Return the current values of all monitors, and drop monitors that fail."""
        sample: dict[str, float] = {}
        for monitor in list(self._monitors):
            monitor.clear_metrics()
            try:
                monitor.collect_metrics()
                values = monitor.aggregate_metrics()
                sample |= {f"system/{name}": value for name, value in values.items()}
            except Exception:  # noqa: BLE001 - see _make_monitor
                self._monitors.remove(monitor)
        return sample


def _make_monitor(module: str, name: str) -> Any:
    """Return a monitor of MLflow, or None if it can't work on this machine."""
    # Drivers and containers fail in many ways, and training must not die of any of them.
    try:
        metrics_module = importlib.import_module(f"mlflow.system_metrics.metrics.{module}")
        return getattr(metrics_module, name)()
    except Exception:  # noqa: BLE001 - see above
        return None
