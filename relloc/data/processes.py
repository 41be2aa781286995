"""Going through jobs with several processes, none of which outlives the command that started it.

`concurrent.futures` can't do this: its queues are guarded by semaphores that are files in /dev/shm, so that it fails
where that is full; it waits for running jobs before an error or a signal gets through; and it tells of no progress
within a job.
"""

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
    with contextlib.ExitStack() as at_end:
        running: dict[Connection, BaseProcess] = {}
        for number in range(min(workers, len(jobs))):
            channel, process = _start(work, jobs[number::workers])
            at_end.callback(_end, channel, process)
            running[channel] = process
        # Opened after the processes began: its thread is not copied into them.
        with progress(total, done) as tell:
            while running:
                ready = wait(list(running))
                for channel in [channel for channel in running if channel in ready]:
                    try:
                        message = channel.recv()
                    except (EOFError, OSError):
                        _raise_if_killed(running.pop(channel))
                        continue
                    if isinstance(message, Exception):
                        raise message
                    if message:
                        done += message
                        tell(done, "images")


def _start(
    work: Callable[[Job, Tick], None], jobs: Sequence[Job]
) -> tuple[Connection, BaseProcess]:
    """A process that works on the jobs, and the pipe through which it tells how far it is, or what stopped it."""
    context = machine.process_context()
    channel, telling = context.Pipe(duplex=False)
    process = context.Process(target=_work_on, args=(work, jobs, telling, os.getpid()), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise UsageError(
            f"another process that reads images can't be started ({error.strerror}): give fewer workers="
        ) from error
    telling.close()  # so that the pipe ends when the process does
    return channel, process


def _raise_if_killed(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise UsageError(
            f"a process that reads images ended with code {process.exitcode} (-9: killed, perhaps for want of "
            "memory). What is finished stays: start the same command again, perhaps with fewer workers"
        )


def _end(channel: Connection, process: BaseProcess) -> None:
    process.terminate()
    process.join(_END_WITHIN_S)
    process.kill()  # also one that was suspended
    process.join(_END_WITHIN_S)
    channel.close()


def _work_on(
    work: Callable[[Any, Tick], None], jobs: Sequence[Any], telling: Connection, parent: int
) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process: the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    new, told_at = 0, 0.0  # images since the last message, and when that was

    def tell(message: int | Exception) -> None:
        try:
            telling.send(message)
        except OSError:  # nobody listens any more
            os._exit(1)

    def tick() -> None:
        nonlocal new, told_at
        new += 1
        if os.getppid() != parent:  # killed: nobody waits for this any more
            os._exit(1)
        if (now := time.monotonic()) - told_at >= _LOOK_EVERY_S / 2:
            tell(new)
            new, told_at = 0, now

    try:
        for job in jobs:
            work(job, tick)
    except (OSError, UsageError) as error:
        tell(error)
        os._exit(1)
    tell(new)
