"""Waiting in tests for what another thread or process does."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import requests


def wait_until(true: Callable[[], object], seconds: float = 120.0) -> None:
    """Return once something is true, and fail if that takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def wait_until_served(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once a started MLflow server answers; fails with its log if it has ended."""

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return requests.get(f"{uri}/health", timeout=60).ok
        except requests.RequestException:
            return False

    wait_until(answers, 300)
