"""Going through jobs with several processes, none of which outlives the command that started it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from relloc import machine
from relloc.errors import UsageError

Job = TypeVar("Job")
Tick = Callable[[], None]
Progress = Callable[[int, int], AbstractContextManager[Callable[[int, str], None]]]
"""Called with (total, done so far) it opens a display, to be told (done, text)."""

_LOOK_EVERY_S = 0.2
_END_WITHIN_S = 5.0


@contextlib.contextmanager
def without_progress(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A `Progress` that shows nothing."""
    del total, done
    yield lambda _done, _text: None


class _Worker:
    """One process with its jobs, and what it tells: how far it is, and the error that stopped it.

    Both come through a pipe. Memory that counts for several processes would be a file in /dev/shm or
    TMPDIR, and where these are full a process dies that touches it.
    """

    def __init__(self, work: Callable[[Job, Tick], None], jobs: Sequence[Job]) -> None:
        context = machine.process_context()
        self.count = 0
        self.error: Exception | None = None
        self.told, telling = context.Pipe(duplex=False)
        arguments = (work, jobs, telling, os.getpid())
        self.process: BaseProcess = context.Process(target=_work_through, args=arguments, daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise UsageError(
                f"another process that reads images can't be started ({error.strerror}): give fewer workers="
            ) from error
        telling.close()

    def listen(self) -> None:
        """Take what the process has told since it was last listened to."""
        with contextlib.suppress(EOFError, OSError):  # it has ended, and said all
            while self.told.poll():
                told = self.told.recv()
                if isinstance(told, Exception):
                    self.error = told
                else:
                    self.count = told

    def finish(self) -> None:
        """Take leave of the process, which has ended. Raises what ended it early."""
        self.process.join()
        self.listen()
        if not self.process.exitcode:
            return
        raise self.error or UsageError(
            f"a process that reads images ended with code {self.process.exitcode} (-9: killed, perhaps for want of "
            "memory). What is finished stays: start the same command again, perhaps with fewer workers"
        )

    def end(self) -> None:
        self.process.terminate()
        self.process.join(_END_WITHIN_S)
        self.process.kill()  # also one that was suspended
        self.process.join(_END_WITHIN_S)
        self.told.close()


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
    team: list[_Worker] = []
    told = done
    try:
        for place in range(min(workers, len(jobs))):
            team.append(_Worker(work, jobs[place::workers]))
        with progress(total, done) as tell:  # opened after the processes began: its thread is not copied into them
            running = team
            while running:
                ended = wait([worker.process.sentinel for worker in running], _LOOK_EVERY_S)
                for worker in running:
                    worker.listen()
                for worker in [worker for worker in running if worker.process.sentinel in ended]:
                    worker.finish()
                running = [worker for worker in running if worker.process.sentinel not in ended]
                if (now := done + sum(worker.count for worker in team)) > told:
                    tell(now, "images")
                    told = now
    finally:
        for worker in team:
            worker.end()


def _work_through(work: Callable[[Any, Tick], None], jobs: Sequence[Any], telling: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    done, told_at = 0, 0.0

    def tell(what: int | Exception) -> None:
        try:
            telling.send(what)
        except OSError:  # nobody listens any more
            os._exit(1)

    def tick() -> None:
        nonlocal done, told_at
        done += 1
        if os.getppid() != parent:  # killed: nobody waits for this any more
            os._exit(1)
        if (now := time.monotonic()) - told_at >= _LOOK_EVERY_S / 2:
            tell(done)
            told_at = now

    try:
        for job in jobs:
            work(job, tick)
    except (OSError, UsageError) as error:
        tell(error)
        os._exit(1)
    tell(done)
