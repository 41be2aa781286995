"""Stopping between two steps when a person or a cluster asks for it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_AGAIN_S = 0.05  # until a signal is sent again whose exception was lost: by then the code that lost it has returned


class Stopped(SystemExit):
    """Leaves the run at once, with the exit code of the signal that asked for it."""


def watched() -> tuple[signal.Signals, ...]:
    """The signals to listen to. One of a closed terminal (SIGHUP) stays ignored where `nohup` has it ignored."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in WATCHED if not (nohup and number == signal.SIGHUP))


class StopRequest:
    """Which signal asked to stop, or None.

    While `awaited`, somebody looks between two steps and ends the run in order; else a signal ends
    it at once by `Stopped`, or by KeyboardInterrupt for Ctrl-C. A second Ctrl-C always does.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.awaited = False
        self.watched = watched()
        self._has_raised = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 plus the signal; 130 for Ctrl-C."""
        return 128 + (self.signal or 0)

    @property
    def name(self) -> str:
        """The signal's name, such as SIGUSR1."""
        return signal.Signals(self.signal or 0).name

    def listen(self, *, awaited: bool) -> None:
        """From here on somebody awaits signals, or nobody does.

        Handlers are put in place again: libraries that compile code at run time (LLVM in Triton and
        in GPU drivers) install their own for SIGUSR1 and others, below Python's knowledge.
        """
        self.awaited = awaited
        for number in self.watched:
            signal.signal(number, self.notice)

    def notice(self, number: int, _frame: FrameType | None) -> None:
        again = self.signal == number
        self.signal = number
        if not self.awaited or (again and number == signal.SIGINT):
            self._has_raised = True
            raise self._ending()

    def _ending(self) -> BaseException:
        return KeyboardInterrupt() if self.signal == signal.SIGINT else Stopped(self.exit_code)

    @contextlib.contextmanager
    def prevailing(self) -> Iterator[None]:
        """Have a signal that ended the block at once leave it as `Stopped` or KeyboardInterrupt, whatever became of it.

        It may arrive anywhere, also in code that makes an error of its own of what is raised there: a module in C that
        is just being imported makes an ImportError of it, without a word of the signal.
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
    def never_lost(self) -> Iterator[None]:
        """Send a signal again that arrived where Python drops exceptions: in weak references' callbacks and `__del__`.

        Python would print "Exception ignored in" with a traceback, and the run would go on.
        """
        before, again = sys.unraisablehook, []

        def hear(lost: "sys.UnraisableHookArgs") -> None:
            if not (self._has_raised and isinstance(lost.exc_value, (KeyboardInterrupt, Stopped))):
                before(lost)
                return
            timer = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), self.signal))
            again.append(timer)
            timer.start()

        sys.unraisablehook = hear
        try:
            yield
        finally:
            sys.unraisablehook = before
            for timer in again:  # the handlers that are put back next would end the process
                timer.cancel()
                timer.join()


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turns the watched signals into a request while the block runs; handlers are put back after."""
    request = StopRequest()
    before = {number: signal.signal(number, request.notice) for number in request.watched}
    try:
        with request.prevailing(), request.never_lost():
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
