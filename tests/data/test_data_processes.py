import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relloc.data.processes import work_through
from relloc.errors import DataError, UsageError


class Shown:
    """Records what a progress display is given."""

    def __init__(self) -> None:
        self.opened: tuple[int, int] | None = None
        self.counts: list[int] = []

    @contextlib.contextmanager
    def __call__(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        self.opened = (total, done)
        yield lambda now, text: self.counts.append(now)


def leave_file(folder: Path, job: int, tick: Callable[[], None]) -> None:
    for _ in range(10):
        tick()
    (folder / str(job)).write_text(str(os.getpid()))


def fail(error: Exception, job: int, tick: Callable[[], None]) -> None:
    if job == 1:
        raise error
    for _ in range(6000):  # ended with the other process, not waited for
        time.sleep(0.1)


def die(job: int, tick: Callable[[], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once_and_the_images_counted(tmp_path: Path, workers: int) -> None:
    shown = Shown()
    work_through(
        functools.partial(leave_file, tmp_path),
        range(4),
        workers=workers,
        total=45,
        done=5,
        progress=shown,
    )
    pids = {name.name: name.read_text() for name in tmp_path.iterdir()}
    assert set(pids) == {"0", "1", "2", "3"}
    assert len(set(pids.values())) == min(workers, 4)
    assert str(os.getpid()) not in pids.values()
    assert shown.opened == (45, 5)
    assert shown.counts == sorted(set(shown.counts))
    assert shown.counts[-1] == 45


def test_without_jobs_nothing_is_started() -> None:
    shown = Shown()
    work_through(
        functools.partial(leave_file, Path()), [], workers=2, total=7, done=7, progress=shown
    )
    assert shown.opened == (7, 7)


@pytest.mark.parametrize(
    "error", [DataError("as it is"), OSError(28, "No space left on device", "a.tar")]
)
def test_an_error_ends_all_processes_and_comes_out_as_it_was(error: Exception) -> None:
    started = time.monotonic()
    with pytest.raises(type(error)) as caught:
        work_through(
            functools.partial(fail, error), range(2), workers=2, total=2, done=0, progress=Shown()
        )
    assert str(caught.value) == str(error)
    assert time.monotonic() - started < 120


def test_a_killed_process_is_told() -> None:
    with pytest.raises(UsageError, match=r"code -9.* same command"):
        work_through(die, range(2), workers=1, total=2, done=0, progress=Shown())
