"""Turns signals (Ctrl-C, SLURM's warnings) into a request to stop between two training steps.

While a training waits for requests, the run saves a checkpoint and ends in order: `StopRequest`
notes the signal, `relloc.runs.saving.Saver.after_step` saves and ends the loop, and
`relloc.runs.training.train_to_the_end` exits. Before and after that a signal ends the run at once.
Either way the exit code is that of the signal.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

WATCHED = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # `kill`, and the end of a SLURM job
    signal.SIGHUP,  # the terminal was closed
    signal.SIGUSR1,  # such as SLURM's warning before a time limit (`sbatch --signal`)
    signal.SIGUSR2,
)
# Seconds until a signal is sent again whose exception Python dropped: by then the code that dropped
# it has returned.
_RESEND_AFTER_S = 0.05


class Stopped(SystemExit):
    """Ends the run at once, with the exit code of the signal that asked for it."""


def signals_to_watch() -> tuple[signal.Signals, ...]:
    """Returns the signals to listen to.

    SIGHUP, which a closed terminal sends, is left out where `nohup` has it ignored.
    """
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    if not under_nohup:
        return WATCHED
    return tuple(number for number in WATCHED if number != signal.SIGHUP)


class StopRequest:
    """A request to stop: true as soon as one of the watched signals has arrived.

    `signal` is the number of that signal, or None. While `awaited` is True, the training looks at
    the request between two steps and ends the run in order. Otherwise a signal ends the run at once
    by raising `Stopped`, or KeyboardInterrupt for Ctrl-C. A second Ctrl-C always does.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.awaited = False
        self.watched = signals_to_watch()
        self._has_raised = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The exit code as shells have it: 128 plus the signal's number, so 130 for Ctrl-C."""
        return 128 + (self.signal or 0)

    @property
    def name(self) -> str:
        """The signal's name, such as SIGUSR1."""
        return signal.Signals(self.signal or 0).name

    def listen(self, *, awaited: bool) -> None:
        """Sets whether somebody looks at the request from here on, and installs the handlers again.

        Handlers are installed again since libraries that compile code at run time (LLVM in Triton
        and in GPU drivers) install their own for SIGUSR1 and others, without Python knowing.
        """
        self.awaited = awaited
        for number in self.watched:
            signal.signal(number, self.notice)

    def notice(self, number: int, _frame: FrameType | None) -> None:
        """Notes a signal that arrived (the signal handler); raises if it is to end the run."""
        is_second = self.signal == number
        self.signal = number
        # A cluster may send SIGTERM again and again; a person who presses Ctrl-C twice means it.
        insists = is_second and number == signal.SIGINT
        if not self.awaited or insists:
            self._has_raised = True
            raise self._ending()

    def _ending(self) -> BaseException:
        # What Python itself raises, so that libraries and debuggers see an ordinary Ctrl-C.
        if self.signal == signal.SIGINT:
            return KeyboardInterrupt()
        return Stopped(self.exit_code)

    @contextlib.contextmanager
    def reraised(self) -> Iterator[None]:
        """Makes the block end with the signal's exception even if other code converted it.

        A signal can arrive anywhere, also in code that converts exceptions. For example, a C module
        that is being imported makes an ImportError of it, which says nothing of the signal.
        """
        try:
            yield
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:
            if not self._has_raised:
                raise
            raise self._ending() from error

    @contextlib.contextmanager
    def resent(self) -> Iterator[None]:
        """Sends a signal again if Python dropped the exception that it raised.

        Python drops exceptions in `__del__` and in callbacks of weak references: it prints
        "Exception ignored in" with a traceback, and the run would go on.
        """
        hook_before = sys.unraisablehook
        timers = []

        def resend(dropped: "sys.UnraisableHookArgs") -> None:
            is_stop = isinstance(dropped.exc_value, (KeyboardInterrupt, Stopped))
            if not (self._has_raised and is_stop):
                hook_before(dropped)
                return
            # Later and from another thread: raised here, it would be dropped as well.
            to_this_process = (os.getpid(), self.signal)
            timer = threading.Timer(_RESEND_AFTER_S, os.kill, to_this_process)
            timers.append(timer)
            timer.start()

        sys.unraisablehook = resend
        try:
            yield
        finally:
            sys.unraisablehook = hook_before
            # Not sent any more: with the handlers that are restored next, it would kill the
            # process.
            for timer in timers:
                timer.cancel()
                timer.join()


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turns the watched signals into a request while the block runs; handlers are restored after.

    Example:
        >>> with stop_request() as stop:
        ...     stop.listen(awaited=True)
        ...     while not stop:
        ...         take_step()
        >>> sys.exit(stop.exit_code)
    """
    request = StopRequest()
    handlers_before = {}
    for number in request.watched:
        handlers_before[number] = signal.signal(number, request.notice)
    try:
        with request.reraised(), request.resent():
            yield request
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
