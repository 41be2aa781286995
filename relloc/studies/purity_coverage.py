"""Sets of images: a selection without redundant ones, and how well they agree with classes.

A set is the images that one discovered cluster has been found in. Its purity is the share of its
images that show the class that most of them show. The coverage of several sets is the share of all
images that are in at least one of them (docs/protocols.md 3.12).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

ImagesOfSets = Sequence[Int64[np.ndarray, "_"]]  # positions of images, for each set
Shows = Bool[np.ndarray, "images classes"]


def select_by_coverage(sets: ImagesOfSets, n_images: int, most: int) -> list[int]:
    """Returns the numbers of up to `most` sets without redundant ones, in the order of selection.

    `sets` are given from the best to the worst. The best set is taken that has an image which no
    set before has, as long as there is one. Then the best that has an image which fewer than two
    sets have, then fewer than three, and so on.
    """
    times_covered = np.zeros(n_images, dtype=np.int64)
    selected: list[int] = []
    remaining = [number for number, images in enumerate(sets) if len(images)]
    level = 0
    while remaining and len(selected) < most:
        skipped = []
        # Coverage only grows: a set that adds nothing now adds nothing later on this level, so one
        # walk down the ranking finds the best set each time.
        for number in remaining:
            images = sets[number]
            adds_some = (times_covered[images] <= level).any()
            if adds_some and len(selected) < most:
                times_covered[images] += 1
                selected.append(number)
            else:
                skipped.append(number)
        remaining = skipped
        level += 1
    return selected


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PurityCoverage:
    """A purity-coverage curve: one point after each set, from the first to the last.

    Attributes:
        order: numbers of the sets, as the curve walks through them.
        coverage: the share of images in at least one of the sets so far.
        purity: the mean purity of the sets so far.
        of_set: the purity of each set by itself, in the order of the curve.
    """

    order: Int64[np.ndarray, "sets"]
    coverage: Float64[np.ndarray, "sets"]
    purity: Float64[np.ndarray, "sets"]
    of_set: Float64[np.ndarray, "sets"]

    def area(self, up_to: float = 1.0) -> float:
        """Returns the area under the curve up to a coverage, from 0 to `up_to`.

        The coverage that a set adds counts with the mean purity after this set. Where the sets
        cover less than `up_to`, the rest counts as purity 0.
        """
        ends = np.minimum(self.coverage, up_to)
        widths = np.diff(ends, prepend=0.0)
        return float((widths * self.purity).sum())


def purities(sets: ImagesOfSets, shows: Shows) -> Float64[np.ndarray, "sets"]:
    """Returns the share of the images of each set that show the set's most frequent class."""
    return np.array([shows[images].mean(axis=0).max() for images in sets], dtype=np.float64)


def purity_coverage(sets: ImagesOfSets, shows: Shows, *, purest_first: bool) -> PurityCoverage:
    """Returns the curve of sets that are not empty, walking down a ranking of them.

    `shows` says of each image which classes it shows; one image may show several. `purest_first`:
    the ranking is by purity, and sets of equal purity stay in the order in which they are given.
    Otherwise the ranking is the order in which they are given.
    """
    of_set = purities(sets, shows)
    order = np.arange(len(sets))
    if purest_first:
        order = np.argsort(-of_set, kind="stable")
    is_covered = np.zeros(len(shows), dtype=bool)
    coverage = []
    for number in order.tolist():
        is_covered[sets[number]] = True
        coverage.append(is_covered.mean())
    counts = np.arange(1, len(sets) + 1)
    return PurityCoverage(
        order=order,
        coverage=np.array(coverage, dtype=np.float64),
        purity=of_set[order].cumsum() / counts,
        of_set=of_set[order],
    )
