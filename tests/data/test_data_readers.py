"""Reading processes: order, errors, and that no wait is without end."""

import faulthandler
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from relloc import machine
from relloc.data import readers
from relloc.data.mapped_files import MappedFiles
from relloc.data.readers import Answer, NoImagesCame, ReadingProcesses, look_ahead
from relloc.errors import DataError, Interrupted


def doubled(task: int) -> Answer:
    return Answer(content=2 * task)


def slower_where_even(task: int) -> Answer:
    time.sleep(0.02 * (task % 2 == 0))
    return Answer(content=(task, os.getpid()))


class Cycle:
    """It refers to itself, and leaves a file when it is collected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.myself = self

    def __del__(self) -> None:
        self.path.touch()


CYCLES: list[Cycle] = []


def collecting(task: int) -> Answer:
    CYCLES.clear()
    gc.collect()
    return Answer(content=task)


class OddError(Exception):
    """It can't be made again from what it keeps."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def failing(task: int) -> Answer:
    if task == 3:
        raise DataError("image 3 is not there")
    if task == 4:
        raise OddError(1, 2)
    return doubled(task)


def ended(task: int) -> Answer:
    os.kill(os.getpid(), signal.SIGKILL if task == 5 else 0)
    return doubled(task)


def suspended(task: int) -> Answer:
    """Stands for a process that waits without end for a disk."""
    if task == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return doubled(task)


def signaled(task: int) -> Answer:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), number)
    return doubled(task)


def wide(task: int) -> Answer:
    return Answer(content=bytes(task))


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(readers, "STOP_WITHIN_S", 0.05)


def answers(make: Callable[[int], Answer], tasks: int | list[int], *, workers: int) -> list[object]:
    with ReadingProcesses(
        make, range(tasks) if isinstance(tasks, int) else tasks, workers=workers
    ) as found:
        return [answer.content for answer in found]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 17])
def test_answers_come_in_the_order_of_tasks(workers: int, tasks: int) -> None:
    found = answers(slower_where_even, tasks, workers=workers)
    assert [number for number, _ in found] == list(range(tasks))
    assert len({pid for _, pid in found}) == min(workers, tasks)


def test_no_more_tasks_are_asked_for_than_are_prefetched() -> None:
    given: list[int] = []
    tasks = (given.append(number) or number for number in range(100))
    with ReadingProcesses(doubled, tasks, workers=2) as found:
        assert next(found).content == 0
        assert len(given) == 2 * readers.PREFETCHED + 1
    assert list(found) == []


def test_no_process_is_started_after_the_end() -> None:
    with ReadingProcesses(doubled, range(9), workers=2) as found:
        pass
    assert list(found) == []
    assert found._processes == []


def test_tasks_and_answers_wider_than_what_the_system_buffers_do_not_lock_each_other() -> None:
    tasks = [b"x" * 3_000_000] * 6
    with ReadingProcesses(lambda task: Answer(content=task), tasks, workers=2) as found:
        assert [answer.content for answer in found] == tasks


def test_an_error_comes_back_as_what_it_was_in_its_place() -> None:
    with ReadingProcesses(failing, range(10), workers=2) as found:
        assert [next(found).content for _ in range(3)] == [0, 2, 4]
        with pytest.raises(DataError) as raised:
            next(found)
    assert str(raised.value) == "image 3 is not there"
    assert "in failing" in "".join(raised.value.__notes__)


def test_an_error_that_can_not_travel_is_told_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"in failing[\s\S]*OddError: 1 and 2"):
        answers(failing, [4], workers=1)


def test_a_killed_process_is_a_clear_error() -> None:
    with pytest.raises(Interrupted, match=r"was killed.*workers=2") as raised:
        answers(ended, 20, workers=2)
    assert raised.value.exit_code == 75


def cut_while_it_is_read(path: Path) -> Answer:
    """Reads a mapped file that becomes shorter in between."""
    faulthandler.disable()  # of pytest, which would print the stack
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pixels = MappedFiles().view(path, 0, 100_000)
    os.truncate(path, 0)
    return Answer(content=int(pixels.sum()))


def test_a_file_that_is_cut_off_while_it_is_read_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    path.write_bytes(bytes(100_000))
    with (
        ReadingProcesses(cut_while_it_is_read, [path], workers=1) as found,
        pytest.raises(Interrupted, match=r"SIGBUS.*relloc\.prepare") as raised,
    ):
        next(found)
    assert raised.value.exit_code == 75


def test_signals_of_the_whole_run_end_no_reading_process() -> None:
    assert answers(signaled, 5, workers=2) == [0, 2, 4, 6, 8]


@pytest.mark.usefixtures("quick_looks")
def test_a_wait_ends_after_a_stop_was_asked_for() -> None:
    asked: list[bool] = []
    with ReadingProcesses(suspended, range(9), workers=2, stopping=lambda: bool(asked)) as found:
        assert [next(found).content for _ in range(2)] == [0, 2]
        asked.append(True)
        with pytest.raises(NoImagesCame):
            next(found)
        processes = [one.process for one in found._processes]
    for process in processes:
        process.join(60)  # killed processes take a while to be gone where the cores are busy
    assert not any(process.is_alive() for process in processes)  # also the one that does not run


@pytest.mark.usefixtures("quick_looks")
def test_a_wait_that_lasts_is_told_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_TELL_AFTER_S", 2)
    monkeypatch.setattr(readers, "_GIVE_UP_AFTER_S", 30)
    said: list[str] = []
    with ReadingProcesses(suspended, range(9), workers=1, print_message=said.append) as found:
        assert [next(found).content for _ in range(2)] == [0, 2]
        said.clear()
        # A second passes with each look at it, also on a busy machine.
        seconds = itertools.count()
        monkeypatch.setattr(readers, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        with pytest.raises(Interrupted, match="has read none for 30 s"):
            next(found)
        monkeypatch.setattr(readers, "time", time)
    # Twice as long before each: after 2, 4, 8 and 16 s. Without doubling there would be fifteen.
    assert len(said) == 4


def test_processes_that_can_not_be_started_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing.context

    start, started = multiprocessing.context.ForkProcess.start, []

    def limited(process: multiprocessing.context.ForkProcess) -> None:
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", limited)
    with pytest.raises(Interrupted, match=r"\b2 of workers=4 .*Resource temporarily unavailable"):
        answers(doubled, 20, workers=4)
    assert not any(process.is_alive() for process in started)


def test_finishing_looks_ahead_and_keeps_the_order() -> None:
    with ReadingProcesses(slower_where_even, range(11), workers=2) as found:
        assert list(look_ahead(found, lambda answer: answer.content[0])) == list(range(11))


def test_where_processes_are_not_forked_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert answers(doubled, 3, workers=1) == [0, 2, 4]


PARENT = """
import os, sys, time
from relloc.data.readers import Answer, ReadingProcesses

def busy(task):
    if task:
        time.sleep(600)
    return Answer(content=os.getpid())

if __name__ == "__main__":
    found = ReadingProcesses(busy, range(9), workers=2)
    print(next(found).content, *(one.process.pid for one in found._processes), flush=True)
    {end}
"""


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", "sys.exit(3)", "sys.last_frames = found; sys.exit(3)"]
)
@pytest.mark.slow
def test_reading_processes_end_with_the_one_that_started_them(tmp_path: Path, end: str) -> None:
    (tmp_path / "parent.py").write_text(PARENT.replace("{end}", end))
    done = subprocess.run(
        [sys.executable, tmp_path / "parent.py"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == (-9 if "kill" in end else 3)
    pids = set(map(int, done.stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.skipif(not machine.forks(), reason="only a forked process inherits objects")
def test_a_worker_collects_nothing_that_it_inherited(tmp_path: Path) -> None:
    """A tensor of a GPU would end it."""
    CYCLES.append(Cycle(tmp_path / "collected"))
    try:
        with ReadingProcesses(collecting, [7], workers=1) as answers:
            assert [answer.content for answer in answers] == [7]
        assert not (tmp_path / "collected").exists()
        assert gc.isenabled()
    finally:
        CYCLES.clear()
    gc.collect()
    assert (tmp_path / "collected").exists()
