"""Learning-rate schedules of fine-tuning, as factors on the base rate of each parameter group.

A schedule counts in the unit of its own numbers, iterations or epochs. Each is a function of the
position alone, so a resumed training needs nothing but its step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from relloc.optimization import milestone_factor


@runtime_checkable
class Schedule(Protocol):
    """A learning rate as a function of how far a training is."""

    def factor(self, position: float) -> float:
        """Returns learning rate over base rate at `position`, a number of 0 or more."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Milestones:
    """A step schedule with linear warm-up.

    The rate is multiplied by `gamma` at each milestone. During the first `warmup` units it rises
    linearly from `warmup_from` times its value. mmdetection's detectors have warmup=100 iterations
    (1,000 for Mask R-CNN) and warmup_from=0.001.

    Example:
        Milestones(milestones=[30, 60], gamma=0.1).factor(45)  # 0.1

    Raises:
        ValueError: milestones do not rise, or a number is out of range.
    """

    milestones: Sequence[float]
    gamma: float
    warmup: float = 0
    warmup_from: float = 1

    def __post_init__(self) -> None:
        milestones = list(self.milestones)
        if milestones != sorted(set(milestones)):
            raise ValueError(f"milestones are {milestones}: give numbers that rise")
        # A gamma of 0 would end the training, and a negative one climb the loss.
        is_positive = self.gamma > 0
        _check("gamma", self.gamma, is_positive, "above 0")
        is_length = self.warmup >= 0
        _check("warmup", self.warmup, is_length, "of 0 or more")
        # A warm-up that starts above the base rate would be none.
        is_share = 0 <= self.warmup_from <= 1
        _check("warmup_from", self.warmup_from, is_share, "in 0..1")

    def factor(self, position: float) -> float:
        factor = milestone_factor(position, self.milestones, self.gamma)
        # Warm-up multiplies what the milestones give, as a milestone may lie within it.
        if position < self.warmup:
            # mmcv's LrUpdaterHook with warmup="linear".
            missing_share = 1 - self.warmup_from
            warmup_rise = missing_share * position / self.warmup
            factor *= self.warmup_from + warmup_rise
        return factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poly:
    """A polynomial schedule, as mmsegmentation's.

    The rate falls from the base rate to `floor` times the base rate at `length`, as the given
    power of the share of `length` that remains.

    Raises:
        ValueError: a number is out of range.
    """

    length: float
    power: float
    floor: float = 0

    def __post_init__(self) -> None:
        has_length = self.length > 0
        _check("length", self.length, has_length, "above 0")
        # A power of 0 would be a constant rate, and a negative one would rise.
        falls = self.power > 0
        _check("power", self.power, falls, "above 0")
        is_share = 0 <= self.floor <= 1
        _check("floor", self.floor, is_share, "in 0..1")

    def factor(self, position: float) -> float:
        # Beyond the end the rate stays at the floor.
        done = position / self.length
        remaining = max(0.0, 1 - done)
        # mmcv's PolyLrUpdaterHook.
        above_floor = 1 - self.floor
        return above_floor * remaining**self.power + self.floor


def in_proportion(
    milestones: Sequence[int], published_iterations: int, iterations: int
) -> list[int]:
    """Returns the milestones of a training in proportion to its length, as the config rounds them.

    Example:
        >>> in_proportion([18_000, 22_000], 24_000, 2400)
        [1800, 2200]
    """
    scaled_milestones = set()
    for milestone in milestones:
        scaled = round(milestone * iterations / published_iterations)
        # Before the first iteration, or after the last one, a milestone changes nothing.
        if 1 <= scaled < iterations:
            scaled_milestones.add(scaled)
    return sorted(scaled_milestones)


def _check(name: str, value: float, fits: bool, limit: str) -> None:
    """Raises `ValueError` unless `value` is finite and fits."""
    if not fits or not math.isfinite(value):
        raise ValueError(f"{name} is {value}: give a number {limit}")
