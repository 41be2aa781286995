"""Times loops of the package through the progress bar that they pass their batches through."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class Clock:
    """A progress bar (`relloc.features.source.ProgressBar`) that shows nothing and takes the time.

    The first `warm_up` batches are not counted: workers start, kernels are chosen and compiled. On
    a GPU the time begins and ends when its kernels are done.

    Example:
        >>> clock = Clock(torch.device("cpu"), warm_up=2)
        >>> clock.per_s(lambda: [None for _ in clock.progress(range(10), "counting", 10)])
    """

    def __init__(self, device: torch.device, *, warm_up: int) -> None:
        self.device = device
        self.warm_up = warm_up
        self._counted = 0
        self._started = 0.0

    def progress(self, batches: Iterable[T], _what: str = "", _total: int = 0) -> Iterator[T]:
        """Yields the batches."""
        remaining = iter(batches)
        for number in itertools.count():
            if number == self.warm_up:
                self._finish()
                self._started = time.perf_counter()
            try:
                batch = next(remaining)
            except StopIteration:
                return
            yield batch
            # Here the loop has dealt with it, and asks for the next.
            self._counted = number + 1 - self.warm_up

    def per_s(self, work: Callable[[], object]) -> float:
        """Returns how many batches a second go through `progress` while `work` runs.

        Raises:
            ValueError: no batch was left after those that warm up.
        """
        self._counted = 0
        work()
        self._finish()
        spent_s = time.perf_counter() - self._started
        if self._counted < 1:
            raise ValueError(f"no batch was counted after the {self.warm_up} that warm up")
        return self._counted / spent_s

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
