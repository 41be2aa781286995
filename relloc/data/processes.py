"""Runs jobs in several processes, none of which outlives the command that started it.

`concurrent.futures` does not serve here: the semaphores of its queues are files in /dev/shm, so
that it fails where that is full; it waits for running jobs before it lets an error or a signal
through; and it reports no progress within a job.
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
"""Opens a progress display: called with (total, done), it is a context whose value is called with
(done, text) as the work goes on."""
NamedProgress = Callable[[str, int, int], AbstractContextManager[Callable[[int, str], None]]]
"""As `Progress`, called with (what is done, total, done)."""

# Processes report their progress twice in this time.
_LOOK_EVERY_S = 0.2
# How long a process that is ended may take.
_END_WITHIN_S = 5.0


@contextlib.contextmanager
def without_progress(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A `Progress` that shows nothing."""
    del total, done
    yield lambda _done, _text: None


def without_named_progress(
    _what: str, total: int, done: int
) -> AbstractContextManager[Callable[[int, str], None]]:
    """A `NamedProgress` that shows nothing."""
    return without_progress(total, done)


def work_through(
    work: Callable[[Job, Tick], None],
    jobs: Sequence[Job],
    *,
    workers: int,
    total: int,
    done: int,
    progress: Progress,
) -> None:
    """Calls `work(job, tick)` for every job, in up to `workers` processes.

    `work` calls `tick` once for each image. `progress` displays how many of `total` images are
    done, beginning with the `done` that were finished before.

    Raises:
        OSError, UsageError: `work` raised it in a process; the other processes are ended.
        UsageError: a process was killed or could not be started.
    """
    with contextlib.ExitStack() as at_end:
        # Worker k of n gets the jobs k, k + n, k + 2 n, and so on.
        running: dict[Connection, BaseProcess] = {}
        for number in range(min(workers, len(jobs))):
            channel, process = _start(work, jobs[number::workers])
            at_end.callback(_end, channel, process)
            running[channel] = process
        # The display opens after the processes have started, so that they do not inherit its
        # thread.
        with progress(total, done) as report:
            while running:
                ready = wait(list(running))
                ready_channels = [channel for channel in running if channel in ready]
                for channel in ready_channels:
                    # The pipe ends when its process does.
                    try:
                        message = channel.recv()
                    except (EOFError, OSError):
                        _raise_if_killed(running.pop(channel))
                        continue
                    # A message is an error, or the number of images since the last message.
                    if isinstance(message, Exception):
                        raise message
                    if message:
                        done += message
                        report(done, "images")


def _start(
    work: Callable[[Job, Tick], None], jobs: Sequence[Job]
) -> tuple[Connection, BaseProcess]:
    """Starts a process that works on the jobs.

    Returns the pipe through which it reports its progress or its error, and the process.
    """
    context = machine.process_context()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work_on, args=(work, jobs, sending, os.getpid()), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise UsageError(
            f"another process that reads images can't be started ({error.strerror}): "
            "give fewer workers="
        ) from error
    # The process has its own copy. This one is closed, so that the pipe ends when the process does.
    sending.close()
    return receiving, process


def _raise_if_killed(process: BaseProcess) -> None:
    """Raises `UsageError` if a process that has ended did not finish its work."""
    process.join()
    if process.exitcode:
        raise UsageError(
            f"a process that reads images ended with code {process.exitcode} (-9: killed, perhaps "
            "because memory ran out). What is finished stays: start the same command again, "
            "perhaps with fewer workers"
        )


def _end(channel: Connection, process: BaseProcess) -> None:
    """Ends a process, first by SIGTERM and then by SIGKILL."""
    process.terminate()
    process.join(_END_WITHIN_S)
    # Only SIGKILL ends a process that was suspended.
    process.kill()
    process.join(_END_WITHIN_S)
    channel.close()


def _work_on(
    work: Callable[[Any, Tick], None], jobs: Sequence[Any], sending: Connection, parent: int
) -> None:
    """Works on the jobs in a worker process, and reports progress or an error."""
    # Ctrl-C reaches every process of a terminal: the parent alone reacts, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Images since the last message, and when that was sent.
    n_unreported = 0
    reported_at = 0.0

    def send(message: int | Exception) -> None:
        # A pipe without a reader: the parent is gone.
        try:
            sending.send(message)
        except OSError:
            os._exit(1)

    def tick() -> None:
        nonlocal n_unreported, reported_at
        n_unreported += 1
        # Another parent process than at the start: the first one was killed.
        if os.getppid() != parent:
            os._exit(1)
        now = time.monotonic()
        if now - reported_at >= _LOOK_EVERY_S / 2:
            send(n_unreported)
            n_unreported = 0
            reported_at = now

    try:
        for job in jobs:
            work(job, tick)
    except (OSError, UsageError) as error:
        send(error)
        os._exit(1)
    send(n_unreported)
