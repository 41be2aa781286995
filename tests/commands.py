"""Commands that a test may kill, forked from a process that has relloc imported to start fast."""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import inspect
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from relloc.tracking.imports import SETTINGS

DEADLINE_S = 600
# One thread, as torchrun sets it: sums in another order would hide differences between processes.
FIXED = {"COLUMNS": "160", "HYDRA_FULL_ERROR": "0", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hold:
    """Where a command waits for the test, so that it does not end before the test has acted.

    It waits before each call of `function`, as MODULE:NAME, whose argument `of` is `least` or more;
    where `of` is not given, before call number `least` and all later ones.
    """

    function: str
    least: int
    of: str | None = None


class Command:
    """A started command, of one process or several; `text` is all that it printed so far."""

    def __init__(self, processes: Sequence[ForkServerProcess], output: Path) -> None:
        self.processes = processes
        self.output = output

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def pid(self) -> int:
        return self.processes[0].pid or 0

    @property
    def is_held(self) -> bool:
        """Whether it waits, or has waited, at its `Hold`."""
        return _beside(self.output, "held").exists()

    def go_on(self) -> None:
        """From here on it does not wait at its `Hold` any more."""
        _beside(self.output, "go_on").touch()

    def wait_for(self, true: Callable[[], object]) -> bool:
        """Whether it came true before a process of the command ended."""
        end = time.monotonic() + DEADLINE_S
        while not true():
            if any(process.exitcode is not None for process in self.processes):
                return False
            assert time.monotonic() < end, f"nothing happened in time:\n{self.text}"
            time.sleep(0.005)
        return True

    def wait(self, seconds: float = DEADLINE_S) -> int:
        """The exit code of the first process that failed, or 0; minus the signal if killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(end - time.monotonic())
            if process.exitcode is None:
                self.kill()
                pytest.fail(f"not finished after {seconds} s:\n{self.text}")
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def kill(self) -> int:
        """`kill -9` of it and of all that it started; the first process's exit code."""
        alive = [process.pid or 0 for process in self.processes if process.exitcode is None]
        for pid in [*alive, *(below for above in alive for below in descendants(above))]:
            _kill(pid)
        for process in self.processes:
            process.join(DEADLINE_S)
        return self.processes[0].exitcode or 0


def start(
    module: str,
    *arguments: str,
    folder: Path,
    output: Path | None = None,
    messages: Path | None = None,
    environment: Mapping[str, str] | None = None,
    processes: int = 1,
    hold: Hold | None = None,
) -> Command:
    """Start `python -m MODULE ARGUMENTS`, or `python MODULE` for a file, in an existing folder.

    What it prints goes to the file `output`, or, where `messages` is given, what it prints on
    stderr goes there. Of several processes each is told what torchrun tells it. With `hold` it
    waits there until `go_on` is called, or until it is killed.
    """
    if environment is None:
        environment = {**os.environ, **FIXED, "RELLOC_RUNS": str(folder / "runs")}
    if output is None:
        output = folder / f"output_{len(list(folder.glob('output_*')))}.txt"
    output.touch()
    told = (output, messages or output)
    together = _together(processes) if processes > 1 else [{}]
    started = [
        _server().Process(
            target=_become,
            args=(module, arguments, folder, told, {**environment, **of_rank}, hold, _schema()),
        )
        for of_rank in together
    ]
    for process in started:
        process.start()
    return Command(started, output)


def _together(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [
        {**sizes, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]


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
    commands = (f"relloc.runs.{name}" for name in ("pretraining", "evaluating", "preparing"))
    context.set_forkserver_preload(
        [*commands, "relloc.data.folder", "mlflow.store.tracking.sqlalchemy_store"]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, **FIXED}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


@functools.cache
def _schema() -> Path:
    """Where commands of this process's tests keep an empty SQLite store of MLflow."""
    folder = tempfile.mkdtemp(prefix="relloc-schema-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder, "mlflow.db")


def _become(
    module: str,
    arguments: tuple[str, ...],
    folder: Path,
    told: tuple[Path, Path],
    environment: Mapping[str, str],
    hold: Hold | None,
    schema: Path,
) -> None:
    multiprocessing.set_start_method(
        None, force=True
    )  # the command's own processes start as they always do
    for descriptor, path in enumerate(told, start=1):  # of stdout and stderr
        with open(path, "ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    if hold is not None:
        _wait_at(hold, told[0])
    _copy_schema(schema)
    sys.exit(_exit_code(module))


def _copy_schema(schema: Path) -> None:
    """Have MLflow copy the tables of a new SQLite store that an earlier command has made.

    Its migrations of an empty store take 4 s of each command. What is made anew by MLflow alone is
    seen by the first command, by those with an interpreter of their own, and by tests/tracking.
    """
    # Loaded before the fork.
    utils: Any = importlib.import_module("mlflow.store.db.utils")
    make_tables = utils._initialize_tables

    def copy_or_make(engine: Any) -> None:
        if engine.dialect.name != "sqlite":
            make_tables(engine)
            return
        if not schema.exists():
            make_tables(engine)
            # Under another name until it is whole, as commands run in parallel and are killed.
            new = schema.with_name(f"{schema.name}.{os.getpid()}")
            _copy_database(engine.url.database, new)
            os.replace(new, schema)
            return
        _copy_database(schema, engine.url.database)

    utils._initialize_tables = copy_or_make


def _copy_database(source: str | Path, target: str | Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source)) as one,
        contextlib.closing(sqlite3.connect(target)) as other,
    ):
        one.backup(other)


def _beside(output: Path, name: str) -> Path:
    return output.with_name(f".{output.name}.{name}")


def _wait_at(hold: Hold, output: Path) -> None:
    """Has this process, and those that it forks, wait where `hold` says."""
    module, _, name = hold.function.partition(":")
    *outer, last = name.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    function = getattr(owner, last)
    signature = inspect.signature(function)
    n_calls = 0

    @functools.wraps(function)
    def wait_and_call(*arguments: Any, **named: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        given = n_calls
        if hold.of is not None:
            given = signature.bind(*arguments, **named).arguments[hold.of]
        while given >= hold.least and not _beside(output, "go_on").exists():
            _beside(output, "held").touch()
            time.sleep(0.01)
        return function(*arguments, **named)

    setattr(owner, last, wait_and_call)


def _exit_code(module: str) -> str | int | None:
    # Caught and raised anew: what the command's frames hold must end before multiprocessing ends
    # its children.
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code
    return 0
