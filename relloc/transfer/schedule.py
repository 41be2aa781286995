"""Learning rates of fine-tuning, as factors on the base rate of each parameter group.

A schedule counts in the unit of its own numbers, iterations or epochs. All are functions of the
position alone, so a resumed training needs nothing but its step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from relloc.optimization import milestone_factor


@runtime_checkable
class Schedule(Protocol):
    """How the learning rate moves."""

    def factor(self, position: float) -> float:
        """Learning rate over base rate at `position`, a number of 0 or more."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Milestones:
    """Linear warm-up from `warmup_from` over `warmup`, and times `gamma` at each milestone reached.

    mmdetection's detectors have warmup=100 (1,000 for Mask R-CNN) iterations from 0.001.

    Raises:
        ValueError: milestones that do not rise, or numbers out of range.
    """

    milestones: Sequence[float]
    gamma: float
    warmup: float = 0
    warmup_from: float = 1

    def __post_init__(self) -> None:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}: give numbers that rise")
        _check("gamma", self.gamma, self.gamma > 0, "above 0")
        _check("warmup", self.warmup, self.warmup >= 0, "of 0 or more")
        _check("warmup_from", self.warmup_from, 0 <= self.warmup_from <= 1, "in 0..1")

    def factor(self, position: float) -> float:
        factor = milestone_factor(position, self.milestones, self.gamma)
        if position < self.warmup:
            factor *= self.warmup_from + (1 - self.warmup_from) * position / self.warmup
        return factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poly:
    """A power of what is left of `length`, down to `floor` times the base rate, as in mmsegmentation.

    Raises:
        ValueError: numbers out of range.
    """

    length: float
    power: float
    floor: float = 0

    def __post_init__(self) -> None:
        _check("length", self.length, self.length > 0, "above 0")
        _check("power", self.power, self.power > 0, "above 0")
        _check("floor", self.floor, 0 <= self.floor <= 1, "in 0..1")

    def factor(self, position: float) -> float:
        left = max(0.0, 1 - position / self.length)
        return (1 - self.floor) * left**self.power + self.floor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The base rate throughout."""

    def factor(self, position: float) -> float:
        return 1.0


def _check(name: str, value: float, fits: bool, limit: str) -> None:
    if not fits or not math.isfinite(value):
        raise ValueError(f"{name} is {value}: give a number {limit}")
