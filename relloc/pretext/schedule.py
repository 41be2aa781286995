"""Learning rate over a run, as a factor on the base rate: pure functions of the step."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from relloc import checks
from relloc.errors import UsageError


@runtime_checkable
class Schedule(Protocol):
    """How long a run is, and how its learning rate moves."""

    epochs: float

    def factor(self, epoch: float) -> float:
        """Learning rate over base rate at `epoch`, a real number in [0, epochs)."""
        ...


def _check_span(epochs: float, warmup_epochs: float, warmup_from: float) -> None:
    checks.number("schedule.epochs", epochs, above=0)
    checks.number("schedule.warmup_epochs", warmup_epochs, at_least=0)
    if warmup_epochs > epochs:
        raise UsageError(f"schedule.warmup_epochs is {warmup_epochs}, more than the {epochs} epochs of the run")
    checks.number("schedule.warmup_from", warmup_from, at_least=0, at_most=1)


def _warmup(epoch: float, warmup_epochs: float, warmup_from: float) -> float:
    if epoch >= warmup_epochs:
        return 1.0
    return warmup_from + (1 - warmup_from) * epoch / warmup_epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Linear warm-up each step, then times `gamma` at each milestone (protocols.md 2.1).

    Raises:
        ValueError: a milestone that the run never reaches, or a span that does not fit.
    """

    epochs: float
    warmup_epochs: float
    warmup_from: float
    milestone_epochs: Sequence[float]
    gamma: float

    def __post_init__(self) -> None:
        _check_span(self.epochs, self.warmup_epochs, self.warmup_from)
        checks.numbers("schedule.milestone_epochs", self.milestone_epochs, at_least=0, may_be_empty=True)
        checks.rising("schedule.milestone_epochs", self.milestone_epochs)
        if self.milestone_epochs and self.milestone_epochs[-1] >= self.epochs:
            raise ValueError(
                f"schedule.milestone_epochs {list(self.milestone_epochs)}: {self.milestone_epochs[-1]} is "
                f"never reached in {self.epochs} epochs; set them to fit, or [] for none"
            )

    def factor(self, epoch: float) -> float:
        passed = bisect.bisect_right(self.milestone_epochs, epoch)
        return _warmup(epoch, self.warmup_epochs, self.warmup_from) * self.gamma**passed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up each step, then half a cosine down to zero at the end."""

    epochs: float
    warmup_epochs: float
    warmup_from: float

    def __post_init__(self) -> None:
        _check_span(self.epochs, self.warmup_epochs, self.warmup_from)

    def factor(self, epoch: float) -> float:
        if epoch < self.warmup_epochs:
            return _warmup(epoch, self.warmup_epochs, self.warmup_from)
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The base rate throughout (the author's code)."""

    epochs: float

    def __post_init__(self) -> None:
        _check_span(self.epochs, 0, 0)

    def factor(self, epoch: float) -> float:
        return 1.0
