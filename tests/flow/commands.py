"""Commands that a test may kill, forked from a process that has relloc imported: a start takes no seconds."""

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from relloc.tracking.store import SETTINGS

DEADLINE_S = 120


class Command:
    """A started command; `text` is all that it printed so far."""

    def __init__(self, process: ForkServerProcess, output: Path) -> None:
        self.process = process
        self.output = output

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def wait_for(self, true: Callable[[], object]) -> bool:
        """Whether it came true before the command ended."""
        end = time.monotonic() + DEADLINE_S
        while not true():
            if self.process.exitcode is not None:
                return False
            assert time.monotonic() < end, f"nothing happened in time:\n{self.text}"
            time.sleep(0.005)
        return True

    def wait(self, seconds: float = DEADLINE_S) -> int:
        """The exit code; minus the signal for a killed command."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            pytest.fail(f"not finished after {seconds} s:\n{self.text}")
        return self.process.exitcode

    def kill(self) -> int:
        """`kill -9` of it and of all that it started; the exit code."""
        for pid in [self.pid, *descendants(self.pid)]:
            _kill(pid)
        self.process.join(DEADLINE_S)
        return self.process.exitcode or 0


def start(module: str, *arguments: str, folder: Path) -> Command:
    """Start `python -m MODULE ARGUMENTS` in an existing folder."""
    output = folder / f"output_{len(list(folder.glob('output_*')))}.txt"
    output.touch()
    process = _server().Process(target=_become, args=(module, arguments, folder, output))
    process.start()
    return Command(process, output)


def descendants(pid: int) -> list[int]:
    """The processes that it started, and those that these started."""
    parents = {int(path.parent.name): _parent(path) for path in Path("/proc").glob("[0-9]*/stat")}
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["relloc.runs.pretraining", "relloc.data.folder", "mlflow.store.tracking.sqlalchemy_store"]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def _become(module: str, arguments: tuple[str, ...], folder: Path, output: Path) -> None:
    multiprocessing.set_start_method(None, force=True)  # the command's own processes start as they always do
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="160", HYDRA_FULL_ERROR="0", RELLOC_RUNS=str(folder / "runs"))
    sys.argv = [module, *arguments]
    sys.exit(_exit_code(module))


def _exit_code(module: str) -> str | int | None:
    # Caught and raised anew: what the command's frames hold must end before multiprocessing ends its children.
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code
    return 0
