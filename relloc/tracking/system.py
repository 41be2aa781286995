"""system.jsonl: how busy the machine was while a run lived, in MLflow's names, so that its System metrics tab shows it.

Journal first, as all metrics: a step is a second since the run's first start, so that a run that goes on adds to it.
"""

import contextlib
import importlib
import threading
from pathlib import Path
from typing import Any

from relloc.tracking.journal import SYSTEM_FILE, Journal
from relloc.tracking.record import RunRecord, now_ms

STOP_S = 5.0
# Of mlflow.system_metrics.metrics. They need psutil, that of GPUs nvidia-ml-py and NVIDIA's driver.
MONITORS = {
    "cpu_monitor": "CPUMonitor",
    "disk_monitor": "DiskMonitor",
    "network_monitor": "NetworkMonitor",
    "gpu_monitor": "GPUMonitor",
}


class SystemMetrics:
    """Notes processors, memory, disk, network and GPUs of this machine every `every_s` seconds.

    From a thread of its own, until stopped. What this machine does not tell is left out.
    """

    def __init__(self, run_dir: Path, *, every_s: float = 15.0) -> None:
        self._started_ms = RunRecord.read(run_dir).started_ms
        self._every_s = every_s
        self._journal = Journal(run_dir, SYSTEM_FILE)
        self._monitors = [
            made for module, name in MONITORS.items() if (made := _made(module, name))
        ]
        self._sample()  # use of processors is counted between two samples
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name="relloc-system-metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples; a driver that does not answer is not waited for."""
        self._stopping.set()
        self._thread.join(timeout=STOP_S)

    def _work(self) -> None:
        while not self._stopping.wait(self._every_s):
            with contextlib.suppress(OSError):
                self._journal.log(self._sample(), (now_ms() - self._started_ms) // 1000)

    def _sample(self) -> dict[str, float]:
        sample: dict[str, float] = {}
        for monitor in list(self._monitors):
            monitor.clear_metrics()
            try:
                monitor.collect_metrics()
                sample |= {
                    f"system/{name}": value for name, value in monitor.aggregate_metrics().items()
                }
            except Exception:  # noqa: BLE001 - as below
                self._monitors.remove(monitor)
        return sample


def _made(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"mlflow.system_metrics.metrics.{module}"), name)()
    except Exception:  # noqa: BLE001 - drivers and containers fail in ways of their own, and training is not to die of it
        return None
