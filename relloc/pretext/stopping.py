"""Stopping between two steps when a person or a cluster asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Which signal asked to stop, or None. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 plus the signal; 130 for Ctrl-C."""
        return 128 + (self.signal or 0)

    def notice(self, number: int, _frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request while the block runs; handlers are put back after."""
    request = StopRequest()
    before = {number: signal.signal(number, request.notice) for number in WATCHED}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
