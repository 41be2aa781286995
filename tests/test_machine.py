"""What differs between systems."""

import os
import subprocess
import sys

import pytest

from relloc import machine


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5, 6})
    assert machine.cores() == 3


@pytest.mark.parametrize(("counted", "cores"), [(8, 8), (None, 1)])
def test_a_system_that_knows_no_limit_counts_all_cores(
    monkeypatch: pytest.MonkeyPatch, counted: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert machine.cores() == cores


@pytest.mark.parametrize(("platform", "method"), [("linux", "fork"), ("darwin", "spawn")])
def test_processes_are_forked_on_linux_alone(
    monkeypatch: pytest.MonkeyPatch, platform: str, method: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert machine.process_context().get_start_method() == method


@pytest.mark.parametrize("windows", ["sys.platform = 'win32'", "os.name = 'nt'"])
@pytest.mark.parametrize(
    "command", ["import relloc", "import relloc.train", "from relloc.data import loader"]
)
def test_windows_is_told_in_one_sentence(windows: str, command: str) -> None:
    program = f"import os, sys; {windows}; {command}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert done.stderr.startswith("relloc: ")
    assert done.stderr.count("\n") == 1
    assert "WSL" in done.stderr
