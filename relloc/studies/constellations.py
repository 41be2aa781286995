"""Constellations of four adjacent patches, drawn in images.

A constellation is a square of 2 x 2 patches without gaps, at a place of an image as it is stored.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from relloc.data.image_set import ImageSet
from relloc.features.source import EncodeConfig
from relloc.seeds import Use, seed_for
from relloc.studies.image_reading import read_counted

Squares = Int64[np.ndarray, "n 3"]  # left, top, and the side of a patch (half that of the square)
PATCHES = 4  # of a constellation
_Cumulative = Float64[np.ndarray, "places"]  # sums of the weights of a place and those before
# How often a place is drawn anew where it overlaps an earlier constellation too much.
_TRIES = 20


def patch_boxes(squares: Squares) -> Int64[np.ndarray, "n 4 4"]:
    """Returns the boxes of the four patches of each constellation, in the order of `CORNERS`."""
    left, top, side = squares.T
    boxes = []
    for x, y in ((left, top), (left + side, top), (left, top + side), (left + side, top + side)):
        boxes.append(np.stack([x, y, x + side, y + side], axis=1))
    return np.stack(boxes, axis=1)


def overlap(square: Sequence[int], other: Sequence[int]) -> float:
    """Returns the intersection over union of two constellations of the same image."""
    left, top, side = square
    other_left, other_top, other_side = other
    width = min(left + 2 * side, other_left + 2 * other_side) - max(left, other_left)
    height = min(top + 2 * side, other_top + 2 * other_side) - max(top, other_top)
    intersection = max(0, width) * max(0, height)
    union = (2 * side) ** 2 + (2 * other_side) ** 2 - intersection
    return intersection / union


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedChoice:
    """How the places of constellations are drawn in an image.

    Attributes:
        sides_px: sides of patches; each that fits into the image twice is equally likely.
        by_gradient: places are drawn in proportion to the sum of the squared gradient of the
            luminance over the constellation; otherwise all places are equally likely.
        most_overlap: intersection over union that two constellations of an image may have.
    """

    sides_px: Sequence[int]
    by_gradient: bool
    most_overlap: float

    def squares(self, gray: UInt8[np.ndarray, "h w"], n: int, seed: int) -> Squares:
        """Returns up to `n` constellations of an image, given its luminance.

        There are fewer where the image is small, or where they would overlap too much. Drawn by
        gradient, an image of a single color has none.
        """
        height, width = gray.shape
        fitting = [side for side in self.sides_px if 2 * side <= min(height, width)]
        energies = _sums_from_corner(_gradient_energy(gray)) if self.by_gradient else None
        if not fitting or (energies is not None and not energies[-1, -1]):
            return np.zeros((0, 3), dtype=np.int64)
        rng = random.Random(seed)
        weights_by_side: dict[int, _Cumulative] = {}
        chosen: list[tuple[int, int, int]] = []
        for _ in range(n):
            for _ in range(_TRIES):
                side = rng.choice(fitting)
                n_columns = width - 2 * side + 1
                n_rows = height - 2 * side + 1
                u = rng.random()
                if energies is None:
                    place = int(u * n_rows * n_columns)
                else:
                    if side not in weights_by_side:
                        weights_by_side[side] = _cumulative_energies(energies, 2 * side)
                    place = _weighted_place(weights_by_side[side], u)
                top, left = divmod(place, n_columns)
                square = (left, top, side)
                if all(overlap(square, other) <= self.most_overlap for other in chosen):
                    chosen.append(square)
                    break
        return np.array(chosen, dtype=np.int64).reshape(-1, 3)


def _gradient_energy(gray: UInt8[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    """Returns the squared differences to the next pixel to the right and below, added up."""
    levels = gray.astype(np.int64)
    energy = np.zeros_like(levels)
    energy[:, :-1] += np.diff(levels, axis=1) ** 2
    energy[:-1] += np.diff(levels, axis=0) ** 2
    return energy


def _sums_from_corner(values: Int64[np.ndarray, "h w"]) -> Int64[np.ndarray, "h1 w1"]:
    """Returns the sum of all values above and to the left of each corner of pixels."""
    sums = values.cumsum(axis=0).cumsum(axis=1)
    return np.pad(sums, ((1, 0), (1, 0)))


def _cumulative_energies(sums: Int64[np.ndarray, "h1 w1"], side: int) -> _Cumulative:
    """Returns the cumulative energies of all squares of a side, row by row of their corners."""
    energies = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return energies.ravel().cumsum().astype(np.float64)


def _weighted_place(cumulative: _Cumulative, u: float) -> int:
    """Returns a place in proportion to its share, given a random number `u` in [0, 1)."""
    place = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # A product that is rounded up to the total would lie behind the last place.
    return min(place, len(cumulative) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _ImageSquares:
    index: int
    squares: Squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DrawInImage:
    """Draws the constellations of an image in a worker process."""

    images: ImageSet
    counts: Mapping[int, int]
    choice: SeedChoice

    def __call__(self, index: int, seed: int) -> _ImageSquares:
        gray = np.asarray(self.images.read(index).convert("L"))
        squares = self.choice.squares(gray, self.counts[index], seed)
        return _ImageSquares(index=index, squares=squares)


def draw_constellations(
    images: ImageSet,
    indices: Sequence[int],
    n: int,
    choice: SeedChoice,
    *,
    config: EncodeConfig,
    seed: int,
) -> dict[int, Squares]:
    """Returns up to `n` constellations by the indices of their images, in the order of `indices`.

    All images get the same number of constellations, or one more, by a random choice. They depend
    on images and `seed` alone, and not on the network. Images without any are left out.

    Raises:
        DataError: more images can't be read than `config.unreadable_share` allows.
    """
    counts = _counts(indices, n, seed)
    keys = []
    for index in counts:
        keys.append((index, seed_for(Use.DISCOVERY_SEEDS, seed, index)))
    draw = _DrawInImage(images=images, counts=counts, choice=choice)
    drawn: dict[int, Squares] = {}
    for batch in read_counted(images, draw, keys, "constellations", config=config):
        for sample in batch.samples:
            if len(sample.squares):
                drawn[sample.index] = sample.squares
    return drawn


def _counts(indices: Sequence[int], n: int, seed: int) -> dict[int, int]:
    """Returns how many constellations each image gets, without those that get none."""
    if not indices:
        return {}
    of_each, n_with_one_more = divmod(n, len(indices))
    rng = random.Random(seed_for(Use.DISCOVERY_IMAGES, seed))
    with_one_more = set(rng.sample(range(len(indices)), n_with_one_more))
    counts = {}
    for position, index in enumerate(indices):
        count = of_each + (position in with_one_more)
        if count:
            counts[index] = count
    return counts
