"""Calibration: whether a network is right as often as it is confident."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """Pairs in bins of about equally many, in the order of their confidence.

    Attributes:
        counts: pairs in each bin.
        confidences: mean confidence in each bin, from 0 to 1.
        accuracies: share of right answers in each bin, from 0 to 1.
    """

    counts: Int64[np.ndarray, "bins"]
    confidences: Float64[np.ndarray, "bins"]
    accuracies: Float64[np.ndarray, "bins"]

    @property
    def expected_error(self) -> float:
        """The expected calibration error, from 0 to 1.

        The absolute difference of confidence and accuracy, averaged over bins by their counts
        (Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015).
        """
        gaps = np.abs(self.confidences - self.accuracies)
        return float((self.counts * gaps).sum() / self.counts.sum())


def reliability(
    confidences: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], n_bins: int
) -> Reliability:
    """Puts pairs into at most `n_bins` bins of about equal counts by their confidence.

    Equal confidences stay in one bin, so that the order of pairs does not matter: a network that
    always has the same confidence gives a single bin.

    Args:
        confidences: the probability of the answer of each pair, from 0 to 1.
        right: whether it is right.
        n_bins: the largest number of bins.
    """
    ordered = np.sort(confidences.astype(np.float64))
    # The last place of each of the equal parts; the first ones are larger by one where counts do
    # not divide.
    sizes = np.full(n_bins, len(ordered) // n_bins)
    sizes[: len(ordered) % n_bins] += 1
    ends = np.cumsum(sizes[sizes > 0]) - 1
    upper_ends = np.unique(ordered[ends])
    bin_of_pair = np.searchsorted(upper_ends, confidences, side="left")
    counts = np.bincount(bin_of_pair, minlength=len(upper_ends))
    of_confidence = np.bincount(bin_of_pair, weights=confidences, minlength=len(upper_ends))
    of_right = np.bincount(bin_of_pair, weights=right, minlength=len(upper_ends))
    return Reliability(
        counts=counts.astype(np.int64),
        confidences=of_confidence / counts,
        accuracies=of_right / counts,
    )
