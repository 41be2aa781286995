"""Worker processes that read images beside the training process, with answers in task order.

They replace the workers of torch's DataLoader. There, a batch that does not fit into /dev/shm is
lost in a thread of the worker, and the training process waits for it forever without reacting to
SIGTERM. Here an answer is a short message through a socket pair, every error of a worker comes
back as its answer, and every wait checks about once a second whether the run was asked to stop.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from relloc import machine
from relloc.errors import Interrupted

# Tasks of each worker that are waiting, in progress, or whose answers are ready.
PREFETCHED = 2
# Threads that finish answers: page-locking and copying a batch takes one thread 20 to 30 ms.
_FINISHING = 4
# How long an answer is waited for after the run was asked to stop.
STOP_WITHIN_S = 5.0
# Signals that terminals and clusters send to all processes of a run.
_OF_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LOOK_EVERY_S = 1.0
_TELL_AFTER_S = 60.0
# A network disk may come back after minutes. NCCL, too, gives up after half an hour.
_GIVE_UP_AFTER_S = 1800.0


class NoImagesCame(Interrupted):
    """An error: a stop was requested, and the images of the current step did not come in time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a task: `content`, which is pickled, and descriptors of memory to hand over."""

    content: Any
    descriptors: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Process:
    """A worker process, the channel to it, and the function that kills it."""

    process: BaseProcess
    channel: Connection
    kill: Callable[[], object]


def never() -> bool:
    """Returns False: the run is never asked to stop."""
    return False


def _silent(_text: str) -> None:
    pass


class ReadingProcesses(Iterator[Answer]):
    """An iterator over the answers of `make` to each of `tasks`, computed in worker processes.

    Answers come in the order of the tasks: worker k of n gets tasks k, k + n, k + 2 n, and so on,
    up to `PREFETCHED` ahead. The workers start at the first `next`, and are killed at the end of
    the `with` block. `stopping` returns true once the run is asked to stop; `print_message` is
    called with a sentence about waits of a minute and longer.

    Raises (from `next`):
        Interrupted: a worker was killed or can't be started, or sent nothing for half an hour.
        NoImagesCame: a worker sent nothing for seconds, and `stopping` returns true.
        Exception: what `make` raised in the worker.

    Example:
        >>> with ReadingProcesses(make, tasks, workers=4) as answers:
        ...     for answer in answers:
        ...         answer.content
    """

    def __init__(
        self,
        make: Callable[[Any], Answer],
        tasks: Iterable[Any],
        *,
        workers: int,
        stopping: Callable[[], bool] = never,
        print_message: Callable[[str], None] = _silent,
    ) -> None:
        self._make = make
        self._tasks = iter(tasks)
        self._workers = workers
        self._stopping = stopping
        self._say = print_message
        self._processes: list[_Process] = []
        # How many tasks were given to workers, and how many of them were answered.
        self._asked = 0
        self._answered = 0

    def __enter__(self) -> "ReadingProcesses":
        return self

    def __exit__(self, *_error: object) -> None:
        """Kills all workers at once: they only read, and have nothing to save."""
        for worker in self._processes:
            worker.kill()
        # The deadline is for a worker that waits in the kernel for a network disk that is gone:
        # nothing can end such a process.
        deadline = time.monotonic() + STOP_WITHIN_S
        for worker in self._processes:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.channel.close()
        self._processes = []
        # Later calls of `next` find no tasks, and start no workers.
        self._tasks = iter(())
        self._asked = self._answered

    def __next__(self) -> Answer:
        if not self._asked:
            self._start()
        if self._answered == self._asked:
            raise StopIteration
        worker = self._worker_of(self._answered)
        answer = self._receive(worker)
        self._answered += 1
        # One answer taken, one task given: each worker keeps PREFETCHED tasks.
        self._ask()
        return answer

    def ready(self) -> bool:
        """Returns whether the next answer has arrived, so that `next` would not wait."""
        if self._answered == self._asked:
            return False
        return self._worker_of(self._answered).channel.poll()

    def _worker_of(self, number: int) -> _Process:
        """Returns the worker that the task of this number is given to."""
        return self._processes[number % len(self._processes)]

    def _start(self) -> None:
        """Starts the workers, no more than there are tasks, and gives them their first tasks."""
        first = list(itertools.islice(self._tasks, self._workers * PREFETCHED))
        self._tasks = itertools.chain(first, self._tasks)
        try:
            for _ in range(min(self._workers, len(first))):
                earlier = [worker.channel for worker in self._processes]
                self._processes.append(_start_process(self._make, earlier))
        except OSError as error:
            raise Interrupted(
                f"only {len(self._processes)} of workers={self._workers} processes that read "
                f"images could be started ({error.strerror or error}): give fewer, such as "
                "workers=2, or raise the limits of `ulimit -a`"
            ) from error
        for _ in first:
            self._ask()

    def _ask(self) -> None:
        """Gives the next task, if there is one, to the worker whose turn it is."""
        for task in itertools.islice(self._tasks, 1):
            worker = self._worker_of(self._asked)
            with self._interrupted_if_gone(worker):
                worker.channel.send((task,))
            self._asked += 1

    def _receive(self, worker: _Process) -> Answer:
        """Returns the next answer of a worker, or raises the error that its task raised."""
        self._wait(worker)
        with self._interrupted_if_gone(worker):
            content, n_descriptors = worker.channel.recv()
        # None stands for an error, which is the content.
        if n_descriptors is None:
            raise pickle.loads(content)
        descriptors = []
        for _ in range(n_descriptors):
            self._wait(worker)
            try:
                with self._interrupted_if_gone(worker):
                    descriptor = reduction.recv_handle(worker.channel)
            # The system drops a descriptor that exceeds the limit of open files; Python raises
            # RuntimeError for a message without one.
            except RuntimeError as error:
                raise Interrupted(
                    "the system lets this process open no more files, and each batch of images "
                    "takes one: raise `ulimit -n`, or give workers=0"
                ) from error
            descriptors.append(descriptor)
        return Answer(content=content, descriptors=tuple(descriptors))

    def _wait(self, worker: _Process) -> None:
        """Waits until a worker has sent something or has ended.

        Raises:
            NoImagesCame: the run was asked to stop, and nothing came within seconds of it.
            Interrupted: nothing came for half an hour.
        """
        started = time.monotonic()
        stop_after = math.inf
        report_after = _TELL_AFTER_S
        # `poll` also returns true when the worker has ended, which `recv` then raises.
        while not worker.channel.poll(_LOOK_EVERY_S):
            waited = time.monotonic() - started
            problem = (
                f"process {worker.process.pid} that reads images has read none for {waited:.0f} s"
            )
            # A step that is nearly complete may still end: its images get some seconds.
            if stop_after == math.inf and self._stopping():
                stop_after = waited + STOP_WITHIN_S
            if waited >= stop_after:
                raise NoImagesCame(problem)
            if waited >= _GIVE_UP_AFTER_S:
                raise Interrupted(
                    f"{problem}: check the disk that holds them, and start the same command again"
                )
            if waited >= report_after:
                self._say(f"loader  {problem}: still waiting")
                report_after *= 2

    @contextlib.contextmanager
    def _interrupted_if_gone(self, worker: _Process) -> Iterator[None]:
        """Raises `Interrupted` if the block fails because the worker has ended."""
        try:
            yield
        except (EOFError, OSError) as error:
            # To know the exit code, the process has to be waited for.
            worker.process.join(_LOOK_EVERY_S)
            # What the system does to a process that reads memory of a file which has become shorter
            # (relloc.data.mapped_files)
            if worker.process.exitcode == -signal.SIGBUS:
                raise Interrupted(
                    "a process that reads images was ended by SIGBUS: a packed file was cut off "
                    "while it was read, or its disk failed. Check it with "
                    "python -m relloc.prepare data.shards=…, and start the same command again"
                ) from error
            raise Interrupted(
                "a process that reads images was killed, most often because memory ran out "
                f"(workers={self._workers}): give fewer, such as workers=2, or more memory, and "
                f"start the same command again. It ended with code {worker.process.exitcode}"
            ) from error


def _start_process(make: Callable[[Any], Answer], earlier: Sequence[Connection]) -> _Process:
    """Starts a worker; `earlier` are the channels of those that were started before."""
    context = machine.process_context()
    ours, theirs = context.Pipe()
    # A forked process inherits the parent's ends of all channels. It has to close them, or it
    # would not notice that the parent is gone.
    inherited = (*earlier, ours) if machine.forks() else ()
    process = context.Process(
        target=_answer_tasks, args=(make, theirs, inherited, os.getpid()), daemon=True
    )
    # Signals are blocked until the worker ignores them. One that arrives before would run the
    # handlers that the worker inherited from the parent, and end it.
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    # Nothing is collected either, until the worker has set aside what it inherits.
    collects = gc.isenabled()
    gc.disable()
    try:
        process.start()
    finally:
        if collects:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        theirs.close()
    # When Python exits it sends daemons SIGTERM, which the worker ignores, and waits for them.
    # This finalizer runs before and kills it.
    kill = util.Finalize(None, process.kill, exitpriority=0)
    return _Process(process=process, channel=ours, kill=kill)


def _answer_tasks(
    make: Callable[[Any], Answer], channel: Connection, inherited: Sequence[Connection], parent: int
) -> None:
    """Answers tasks in a worker process until the parent kills it."""
    # Among the objects that a forked process inherits may be tensors of a GPU that only cycles of
    # references still hold. To collect them here would end the process, which can't use that GPU.
    gc.freeze()
    gc.enable()
    # Terminals (SIGINT, SIGHUP) and clusters (the others) signal every process of a run. Workers
    # ignore that: the parent still needs images to finish its step, and kills them afterwards.
    for number in _OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_RUN)
    # The workers are the parallelism: more threads each would compete for the same cores.
    torch.set_num_threads(1)
    for other in inherited:
        other.close()
    # A thread receives the tasks, so that the parent never waits while this one is busy.
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_tasks, args=(channel, tasks, parent), daemon=True).start()
    while True:
        (task,) = tasks.get()
        try:
            answer = make(task)
        except BaseException as error:
            # None marks an error; otherwise the number of descriptors stands there.
            channel.send((_pickled(error), None))
            # Wait forever: the parent kills this process when it has read the error.
            threading.Event().wait()
            raise
        channel.send((answer.content, len(answer.descriptors)))
        for descriptor in answer.descriptors:
            # The kernel duplicates the descriptor for the parent (SCM_RIGHTS), which keeps the
            # memory alive when this one is closed.
            reduction.send_handle(channel, descriptor, parent)
            os.close(descriptor)


def _take_tasks(channel: Connection, tasks: "queue.SimpleQueue[Any]", parent: int) -> None:
    """Receives tasks as they come, and ends the worker when the parent is gone."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            if channel.poll(_LOOK_EVERY_S):
                tasks.put(channel.recv())
    os._exit(0)


def _pickled(error: BaseException) -> bytes:
    """Returns an error pickled, with its traceback as a note, to be raised in the parent."""
    lines = traceback.format_exception(error)
    trace = "".join(lines)
    error.add_note(f"In a process that reads images:\n{trace}")
    try:
        content = pickle.dumps(error)
        # Some errors can be pickled but not read again, since their constructors take other
        # arguments than they keep.
        pickle.loads(content)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        content = pickle.dumps(RuntimeError(trace))
    return content


def look_ahead(
    answers: ReadingProcesses, finish: Callable[[Answer], Any], *, at_once: int = _FINISHING
) -> Generator[Any, None, None]:
    """Yields `finish(answer)` of each answer, in order, computed `at_once` ahead in threads."""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="relloc batches") as threads:
        for answer in answers:
            pending.append(threads.submit(finish, answer))
            # Read ahead only while answers are ready. After the last answer none is ready, so
            # that this empties the queue.
            while len(pending) > at_once or (pending and not answers.ready()):
                yield pending.popleft().result()
