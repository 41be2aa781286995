"""Processes that read images beside the training process, and whose answers come back in the order of the tasks.

This is what torch's DataLoader does, in another way: there a batch that can't be put into /dev/shm
is lost in a thread of the worker, and the training process waits for it without end, deaf to
SIGTERM. Here an answer is a short message through a socket pair, every error of a reading process
comes back as its answer, and every wait looks about once a second.
"""

import contextlib
import dataclasses
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from relloc import machine
from relloc.errors import Interrupted

PREFETCHED = 2  # tasks that each process has before it, or whose answers are ready
_FINISHING = 4  # answers that are finished at a time: to lock pages and copy a batch takes one thread 20 to 30 ms
STOP_WITHIN_S = 5.0  # how long an answer is awaited after a stop was asked for
_OF_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LOOK_EVERY_S = 1.0
_TELL_AFTER_S = 60.0
_GIVE_UP_AFTER_S = 1800.0  # a network disk may come back; NCCL gives up after as long


class NoImagesCame(Interrupted):
    """A stop was asked for while images were awaited, and they did not come in time to end the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a process made of a task: `content`, which is pickled, and descriptors of memory that it hands over."""

    content: Any
    descriptors: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Process:
    """A reading process, the way to it, and what ends it."""

    process: BaseProcess
    channel: Connection
    kill: Callable[[], object]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def _silent(_text: str) -> None:
    pass


class ReadingProcesses(Iterator[Answer]):
    """An iterator over what `make` answers to each of `tasks`, in their order; use it as a context.

    Process k of n is given tasks k, k + n, k + 2 n, ..., up to PREFETCHED ahead. They are started by
    the first answer that is asked for. `stopping` says whether the run was asked to stop, in a way
    that ends no wait by itself; `say` is told of waits that last.

    Raises (from `next`):
        Interrupted: a process was killed or can't be started, or no image came for half an hour.
        NoImagesCame: none came within seconds, and `stopping` is true.
        Exception: what `make` raised in the process that ran it.
    """

    def __init__(
        self,
        make: Callable[[Any], Answer],
        tasks: Iterable[Any],
        *,
        workers: int,
        stopping: Callable[[], bool] = never,
        say: Callable[[str], None] = _silent,
    ) -> None:
        self._make = make
        self._tasks = iter(tasks)
        self._workers = workers
        self._stopping = stopping
        self._say = say
        self._processes: list[_Process] = []
        self._asked = 0
        self._answered = 0

    def __enter__(self) -> "ReadingProcesses":
        return self

    def __exit__(self, *_error: object) -> None:
        """End all processes at once: they only read, and have nothing to save."""
        for one in self._processes:
            one.kill()
        deadline = time.monotonic() + STOP_WITHIN_S
        for one in self._processes:
            # One that waits inside the kernel, for a network disk that is gone, can't be ended by anyone.
            one.process.join(max(0.0, deadline - time.monotonic()))
            one.channel.close()
        self._processes = []
        self._tasks = iter(())  # so that no process is started for them
        self._asked = self._answered

    def __next__(self) -> Answer:
        if not self._asked:
            self._start()
        if self._answered == self._asked:
            raise StopIteration
        answer = self._receive(self._turn(self._answered))
        self._answered += 1
        self._ask()
        return answer

    def ready(self) -> bool:
        """Whether the next answer is there, so that `next` would not wait."""
        return self._answered < self._asked and self._turn(self._answered).channel.poll()

    def _turn(self, number: int) -> _Process:
        """The process that the task of this number is given to."""
        return self._processes[number % len(self._processes)]

    def _start(self) -> None:
        first = list(itertools.islice(self._tasks, self._workers * PREFETCHED))
        self._tasks = itertools.chain(first, self._tasks)
        try:
            for _ in range(min(self._workers, len(first))):
                self._processes.append(
                    _start_process(self._make, [one.channel for one in self._processes])
                )
        except OSError as error:
            raise Interrupted(
                f"only {len(self._processes)} of workers={self._workers} processes that read images could be started "
                f"({error.strerror or error}): give fewer, such as workers=2, or raise the limits of `ulimit -a`"
            ) from error
        for _ in first:
            self._ask()

    def _ask(self) -> None:
        """Give the next task, if there is one, to the process whose turn it is."""
        for task in itertools.islice(self._tasks, 1):
            one = self._turn(self._asked)
            with self._killed_told(one):
                one.channel.send((task,))
            self._asked += 1

    def _receive(self, one: _Process) -> Answer:
        self._wait(one)
        with self._killed_told(one):
            content, n_descriptors = one.channel.recv()
        if n_descriptors is None:
            raise pickle.loads(content)
        descriptors = []
        for _ in range(n_descriptors):
            self._wait(one)
            try:
                with self._killed_told(one):
                    descriptors.append(reduction.recv_handle(one.channel))
            except (
                RuntimeError
            ) as error:  # what Python makes of a message whose descriptor the system left out
                raise Interrupted(
                    "the system lets this process open no more files, which takes one for each batch of images: raise "
                    "`ulimit -n`, or give workers=0"
                ) from error
        return Answer(content=content, descriptors=tuple(descriptors))

    def _wait(self, one: _Process) -> None:
        """Until the process has sent something, or has ended. Bounded, and not deaf to a request to stop."""
        started = time.monotonic()
        stop_after, tell_after = math.inf, _TELL_AFTER_S
        while not one.channel.poll(_LOOK_EVERY_S):
            waited = time.monotonic() - started
            told = f"process {one.process.pid} that reads images has read none for {waited:.0f} s"
            if stop_after == math.inf and self._stopping():
                stop_after = waited + STOP_WITHIN_S
            if waited >= stop_after:
                raise NoImagesCame(told)
            if waited >= _GIVE_UP_AFTER_S:
                raise Interrupted(
                    f"{told}: look at the disk that holds them, and start the same command again"
                )
            if waited >= tell_after:
                self._say(f"loader  {told}: still waiting")
                tell_after *= 2

    @contextlib.contextmanager
    def _killed_told(self, one: _Process) -> Iterator[None]:
        """Raises `Interrupted` where the other end of a channel is gone."""
        try:
            yield
        except (EOFError, OSError) as error:
            one.process.join(_LOOK_EVERY_S)
            raise Interrupted(
                "a process that reads images was killed, most often because memory ran out "
                f"(workers={self._workers}): give fewer, such as workers=2, or more memory, and start the same command "
                f"again. It ended with code {one.process.exitcode}"
            ) from error


def _start_process(make: Callable[[Any], Answer], earlier: Sequence[Connection]) -> _Process:
    context = machine.process_context()
    ours, theirs = context.Pipe()
    # A forked process has the parent's ends of all channels, which would hide from it that the parent is gone.
    inherited = (*earlier, ours) if machine.forks() else ()
    process = context.Process(
        target=_answer_tasks, args=(make, theirs, inherited, os.getpid()), daemon=True
    )
    # Blocked until the process ignores them: a signal in between would end it by the parent's own handlers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    # At exit Python sends SIGTERM, which the process ignores, and waits for it: this comes before.
    kill = util.Finalize(None, process.kill, exitpriority=0)
    return _Process(process=process, channel=ours, kill=kill)


def _answer_tasks(
    make: Callable[[Any], Answer], channel: Connection, inherited: Sequence[Connection], parent: int
) -> None:
    """What a reading process does until the parent ends it."""
    # Ignored is what terminals (SIGINT, SIGHUP) and clusters (the others) send to every process of a run: the parent
    # still needs images to end its step, after which it ends its reading processes.
    for number in _OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_RUN)
    torch.set_num_threads(1)
    for other in inherited:
        other.close()
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_tasks, args=(channel, tasks, parent), daemon=True).start()
    while True:
        (task,) = tasks.get()
        try:
            answer = make(task)
        except BaseException as error:
            channel.send((_pickled(error), None))  # in the place of how many descriptors follow
            threading.Event().wait()  # for ever: the parent ends this process when it has read the error
            raise
        channel.send((answer.content, len(answer.descriptors)))
        for descriptor in answer.descriptors:
            # The kernel makes it a descriptor of the parent's (SCM_RIGHTS), which keeps the memory when ours is closed.
            reduction.send_handle(channel, descriptor, parent)
            os.close(descriptor)


def _take_tasks(channel: Connection, tasks: "queue.SimpleQueue[Any]", parent: int) -> None:
    """Take tasks as they come, so that the parent never waits to give one; end with the parent."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            if channel.poll(_LOOK_EVERY_S):
                tasks.put(channel.recv())
    os._exit(0)


def _pickled(error: BaseException) -> bytes:
    """An error as it can be raised elsewhere, with a note that shows where it arose."""
    where = "".join(traceback.format_exception(error))
    error.add_note(f"In a process that reads images:\n{where}")
    try:
        content = pickle.dumps(error)
        pickle.loads(content)  # errors that take other arguments than they keep fail here
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        content = pickle.dumps(RuntimeError(where))
    return content


def look_ahead(answers: ReadingProcesses, finish: Callable[[Answer], Any]) -> Iterator[Any]:
    """`finish` of each answer, in order, called in threads as soon as the answers are there, a few ahead."""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(max_workers=_FINISHING, thread_name_prefix="relloc batches") as threads:
        for answer in answers:
            pending.append(threads.submit(finish, answer))
            while len(pending) > _FINISHING or (pending and not answers.ready()):
                yield pending.popleft().result()  # all of them, once there is no next answer
