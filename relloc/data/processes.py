"""Going through jobs with several processes, none of which outlives the command that started it."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from relloc.errors import UsageError

Job = TypeVar("Job")
Tick = Callable[[], None]
Progress = Callable[[int, int], AbstractContextManager[Callable[[int, str], None]]]
"""Called with (total, done so far) it opens a display, to be told (done, text)."""

_LOOK_EVERY_S = 0.2


@contextlib.contextmanager
def without_progress(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A `Progress` that shows nothing."""
    del total, done
    yield lambda _done, _text: None


class _Worker:
    """One process with its jobs, and what it tells: how far it is, and the error that stopped it."""

    def __init__(self, work: Callable[[Job, Tick], None], jobs: Sequence[Job]) -> None:
        context = multiprocessing.get_context()
        self.count = context.RawValue("q", 0)
        self.errors, told = context.Pipe(duplex=False)
        arguments = (work, jobs, self.count, told, os.getpid())
        self.process: BaseProcess = context.Process(target=_work_through, args=arguments, daemon=True)
        self.process.start()
        told.close()

    def finish(self) -> None:
        """Take leave of the process, which has ended. Raises what ended it early."""
        self.process.join()
        code = self.process.exitcode
        if not code:
            return
        try:
            error = self.errors.recv()
        except EOFError:
            raise UsageError(
                f"a process that reads images ended with code {code} (-9: killed, perhaps for want of memory). "
                "What is finished stays: start the same command again, perhaps with fewer workers"
            ) from None
        raise error

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.errors.close()


def work_through(
    work: Callable[[Job, Tick], None],
    jobs: Sequence[Job],
    *,
    workers: int,
    total: int,
    done: int,
    progress: Progress,
) -> None:
    """Call `work(job, tick)` for every job in up to `workers` processes; `work` calls `tick` for each image.

    `total` images are told to `progress`, of which `done` were finished before.

    Raises:
        OSError, UsageError: as `work` raised it; the other processes are ended.
        UsageError: a process died.
    """
    team = [_Worker(work, jobs[place::workers]) for place in range(min(workers, len(jobs)))]
    told = done
    try:
        with progress(total, done) as tell:  # opened after the processes began: its thread is not copied into them
            running = team
            while running:
                ended = wait([worker.process.sentinel for worker in running], _LOOK_EVERY_S)
                for worker in [worker for worker in running if worker.process.sentinel in ended]:
                    worker.finish()
                running = [worker for worker in running if worker.process.sentinel not in ended]
                if (now := done + sum(worker.count.value for worker in team)) > told:
                    tell(now, "images")
                    told = now
    finally:
        for worker in team:
            worker.end()


def _work_through(
    work: Callable[[Any, Tick], None], jobs: Sequence[Any], count: Any, told: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def tick() -> None:
        count.value += 1
        if os.getppid() != parent:  # killed: nobody waits for this any more
            os._exit(1)

    try:
        for job in jobs:
            work(job, tick)
    except (OSError, UsageError) as error:
        told.send(error)
        os._exit(1)
