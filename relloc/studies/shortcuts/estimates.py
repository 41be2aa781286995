"""Numbers with 95 % intervals that are clustered by the source of images."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Tensor

from relloc.geometry import CHANCE_PERCENT
from relloc.pretext.held_out import clustered_ratio
from relloc.pretext.questions import CENTER_PAIRS
from relloc.studies.shortcuts.position import Errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; `half_width` is infinite where nothing is known of it.

    `n`: of images. `sources`: of what these were taken from, by which the interval is clustered.
    """

    value: float
    half_width: float
    n: int
    sources: int

    def wider(self, intervals: int) -> "Estimate":
        """Returns the estimate with an interval for one of several, which hold together in 95 %.

        That is Bonferroni's way: each of them may be wrong in 5 % divided by their number.
        """
        # With a single source the width is infinite at any level.
        if self.sources < 2:
            return self
        degrees = self.sources - 1
        factor = stdtrit(degrees, 1 - 0.025 / intervals) / stdtrit(degrees, 0.975)
        return dataclasses.replace(self, half_width=self.half_width * float(factor))

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width

    def times(self, factor: float) -> "Estimate":
        """Returns the estimate in another unit."""
        return dataclasses.replace(
            self, value=factor * self.value, half_width=factor * self.half_width
        )


def accuracy_estimate(right: Int[Tensor, "n"], sources: Sequence[str]) -> Estimate:
    """Returns the accuracy over all pairs in percent; `right`: right answers (0 to 8) an image."""
    return difference_estimate(right, None, sources)


def difference_estimate(
    right: Int[Tensor, "n"], control: Int[Tensor, "n"] | None, sources: Sequence[str]
) -> Estimate:
    """Returns by how many points more is right than in answers to a control about the same images.

    Without a control it is the accuracy itself.
    """
    counted = right.numpy()
    if control is not None:
        counted = counted - control.numpy()
    pairs = np.full(len(counted), CENTER_PAIRS.n_questions)
    ratio, half_width = clustered_ratio(counted, pairs, sources)
    return _estimate(ratio, half_width, sources).times(100)


def above_chance(accuracy: Estimate) -> Estimate:
    """Returns by how many points an accuracy in percent exceeds that of guessing."""
    return dataclasses.replace(accuracy, value=accuracy.value - CHANCE_PERCENT)


def explained_percent(errors: Errors, sources: Sequence[str]) -> Estimate:
    """Returns the share of the center's squared error that a regressor takes away, in percent.

    That is R² for positions whose mean is the center.
    """
    ratio, half_width = clustered_ratio(errors.all_error, errors.all_center, sources)
    return _estimate(1 - ratio, half_width, sources).times(100)


def root_mean(squared: Float[np.ndarray, "n"], sources: Sequence[str]) -> Estimate:
    """Returns the root of the mean of squared errors, one of each image."""
    return root_of_ratio(squared, np.ones(len(squared)), sources)


def root_of_ratio(
    squared: Float[np.ndarray, "n"], others: Float[np.ndarray, "n"], sources: Sequence[str]
) -> Estimate:
    """Returns the root of the ratio of two sums of squared errors.

    Half the width of its interval follows from that of the ratio, as the slope of the root has it.
    """
    ratio, half_width = clustered_ratio(squared, others, sources)
    root = math.sqrt(ratio)
    # Without any error there is no slope, and nothing varies.
    of_root = half_width / (2 * root) if root else half_width
    return _estimate(root, of_root, sources)


def _estimate(value: float, half_width: float, sources: Sequence[str]) -> Estimate:
    return Estimate(value=value, half_width=half_width, n=len(sources), sources=len(set(sources)))
