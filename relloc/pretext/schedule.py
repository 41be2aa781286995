"""Learning rate over a run, as a factor on the base rate: pure functions of the step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from relloc import checks
from relloc.errors import UsageError
from relloc.optimization import milestone_factor


@runtime_checkable
class Schedule(Protocol):
    """How long a run is, and how its learning rate moves."""

    epochs: float

    def factor(self, epoch: float) -> float:
        """Learning rate over base rate at `epoch`, a real number in [0, epochs)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The base rate throughout (the author's code)."""

    epochs: float

    def __post_init__(self) -> None:
        checks.number("schedule.epochs", self.epochs, above=0)

    def factor(self, epoch: float) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WarmedUp(Constant):
    """Linear warm-up each step, from `warmup_from` times the base rate, to which it then stays."""

    warmup_epochs: float
    warmup_from: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("schedule.warmup_epochs", self.warmup_epochs, at_least=0)
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"schedule.warmup_epochs is {self.warmup_epochs}, more than the {self.epochs} epochs of the run"
            )
        checks.number("schedule.warmup_from", self.warmup_from, at_least=0, at_most=1)

    def factor(self, epoch: float) -> float:
        if epoch >= self.warmup_epochs:
            return 1.0
        return self.warmup_from + (1 - self.warmup_from) * epoch / self.warmup_epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(_WarmedUp):
    """Linear warm-up each step, then times `gamma` at each milestone (protocols.md 2.1).

    Raises:
        ValueError: a milestone that the run never reaches, or a span that does not fit.
    """

    milestone_epochs: Sequence[float]
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.numbers("schedule.milestone_epochs", self.milestone_epochs, at_least=0, may_be_empty=True)
        checks.rising("schedule.milestone_epochs", self.milestone_epochs)
        if self.milestone_epochs and self.milestone_epochs[-1] >= self.epochs:
            raise ValueError(
                f"schedule.milestone_epochs {list(self.milestone_epochs)}: {self.milestone_epochs[-1]} is "
                f"never reached in {self.epochs} epochs; set them to fit, or [] for none"
            )

    def factor(self, epoch: float) -> float:
        return super().factor(epoch) * milestone_factor(epoch, self.milestone_epochs, self.gamma)


class Cosine(_WarmedUp):
    """Linear warm-up each step, then half a cosine down to zero at the end."""

    def factor(self, epoch: float) -> float:
        if epoch < self.warmup_epochs:
            return super().factor(epoch)
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
