"""Learning rate schedules: factors on the initial rate, as pure functions of the epoch."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from relloc import checks
from relloc.errors import UsageError
from relloc.optimization import milestone_factor
from relloc.terminal import quantity


@runtime_checkable
class Schedule(Protocol):
    """The length of a training and the course of its learning rate."""

    epochs: float

    def factor(self, epoch: float) -> float:
        """Returns the learning rate at `epoch` in [0, epochs), as a multiple of the initial one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lasting:
    # What all schedules share: the number of epochs.

    epochs: float

    def __post_init__(self) -> None:
        checks.number("schedule.epochs", self.epochs, above=0)


class Constant(_Lasting):
    """Keeps the initial rate throughout, as the paper's code does (protocols.md 2.1).

    Raises:
        ValueError: `epochs` is not above 0.
    """

    def factor(self, epoch: float) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WarmedUp(_Lasting):
    # What `Step` and `Cosine` share. The rate rises by the same amount each step for
    # `warmup_epochs`, from `warmup_from` times the initial rate up to the initial rate.

    warmup_epochs: float
    warmup_from: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("schedule.warmup_epochs", self.warmup_epochs, at_least=0)
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"schedule.warmup_epochs is {self.warmup_epochs}, more than the {self.epochs} "
                "epochs of the run: give a shorter warm-up or a larger schedule.epochs"
            )
        checks.number("schedule.warmup_from", self.warmup_from, at_least=0, at_most=1)

    def _warmup_factor(self, epoch: float) -> float:
        if epoch >= self.warmup_epochs:
            return 1.0
        rise = 1 - self.warmup_from
        return self.warmup_from + rise * epoch / self.warmup_epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(_WarmedUp):
    """Warms up linearly, then multiplies the rate by `gamma` at each milestone (protocols.md 2.1).

    Raises:
        ValueError: a milestone that the run never reaches, milestones out of order, or a warm-up
            that is longer than the run.
    """

    milestone_epochs: Sequence[float]
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.numbers(
            "schedule.milestone_epochs", self.milestone_epochs, at_least=0, may_be_empty=True
        )
        checks.increasing("schedule.milestone_epochs", self.milestone_epochs)
        if not self.milestone_epochs:
            return
        # A milestone that never acts is most likely a slip, such as epochs shortened alone.
        last = self.milestone_epochs[-1]
        if last >= self.epochs:
            raise ValueError(
                f"schedule.milestone_epochs {list(self.milestone_epochs)}: {last} is never reached "
                f"in {quantity(self.epochs, 'epoch')}; set them to fit, or [] for none"
            )

    def factor(self, epoch: float) -> float:
        decay = milestone_factor(epoch, self.milestone_epochs, self.gamma)
        return self._warmup_factor(epoch) * decay


class Cosine(_WarmedUp):
    """Warms up linearly, then falls to zero at the end along half a cosine.

    Raises:
        ValueError: the warm-up is longer than the run.
    """

    def factor(self, epoch: float) -> float:
        if epoch < self.warmup_epochs:
            return self._warmup_factor(epoch)
        decay_epochs = self.epochs - self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / decay_epochs
        # An epoch beyond the end would let the cosine rise again.
        angle = math.pi * min(progress, 1.0)
        return 0.5 * (1 + math.cos(angle))
