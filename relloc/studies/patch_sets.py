"""Sets of patches: which squares of images a study looks at.

A patch of an image is what its box holds, in pixels of the image as it is stored. Boxes are drawn
at random, lie on a grid, or are given; a study may choose them in a way of its own (`MakeBoxes`).

Batch norm that is recalibrated should see patches as well: `RandomPatch` is a view for that.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from relloc import checks
from relloc.features.source import SeededIndex
from relloc.seeds import Use, seed_for

# Of boxes: x1 y1 x2 y2 in whole pixels of the stored image; x2 and y2 are the first ones outside.
Boxes = Int64[np.ndarray, "n 4"]

_UNBOUNDED = 2**62


@runtime_checkable
class MakeBoxes(Protocol):
    """Chooses the boxes of the patches of an image, in a worker process: it has to be picklable.

    Frozen dataclasses are. `most` is the largest number of boxes that it returns for any image.
    """

    @property
    def most(self) -> int: ...

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        """Returns boxes within an image of `height` x `width` px, or none where none fits.

        `seed` is the number that the caller has given beside the image's index: usually a seed, but
        it may also say which of several lists of boxes is meant.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSquares:
    """Returns `n` random squares of an image, which may overlap.

    The side of each is one of `sides_px` that fit into the image, each equally likely, and its
    place is uniform over whole pixels. An image into which none fits has no boxes.
    """

    n: int
    sides_px: Sequence[int]

    @property
    def most(self) -> int:
        return self.n

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        fitting = [side for side in self.sides_px if side <= min(height, width)]
        if not fitting:
            return np.zeros((0, 4), dtype=np.int64)
        rng = random.Random(seed)
        boxes = []
        for _ in range(self.n):
            # The order of the draws is fixed: another one would give other boxes.
            side = rng.choice(fitting)
            left = rng.randint(0, width - side)
            top = rng.randint(0, height - side)
            boxes.append((left, top, left + side, top + side))
        return np.array(boxes, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseGrid:
    """Boxes (`MakeBoxes`) at a grid of places, at several sizes.

    Steps between places are at most `stride` times the side of the box. They are as even as whole
    pixels allow, and the first and last boxes touch the borders of the image.
    """

    sides_px: Sequence[int]
    stride: float

    @property
    def most(self) -> int:
        return _UNBOUNDED  # large images have many

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        boxes = [np.zeros((0, 4), dtype=np.int64)]
        for side in self.sides_px:
            if side > min(height, width):
                continue
            lefts = _even_starts(width - side, self.stride * side)
            tops = _even_starts(height - side, self.stride * side)
            top, left = np.meshgrid(tops, lefts, indexing="ij")
            corners = (left.ravel(), top.ravel(), left.ravel() + side, top.ravel() + side)
            boxes.append(np.stack(corners, axis=1))
        return np.concatenate(boxes)


def _even_starts(extent: int, largest_step: float) -> Int64[np.ndarray, "n"]:
    """Returns whole numbers from 0 to `extent`, of steps of at most `largest_step` or 1 px."""
    n_steps = int(np.ceil(extent / max(1.0, largest_step)))
    starts = np.linspace(0, extent, n_steps + 1)
    # Rounding may lengthen a step by a pixel.
    return np.rint(starts).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenBoxes:
    """Boxes (`MakeBoxes`) by the number that stands beside an image."""

    lists: Sequence[Int64[np.ndarray, "_ 4"]]

    @property
    def most(self) -> int:
        return max(map(len, self.lists), default=0)

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        return self.lists[seed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPatch:
    """A view (`relloc.data.views.View`) of one random square, resized to `patch_px` a side.

    Its side is one of `sides_px` that fit into the image; of an image into which none fits it is
    the largest square. Batch norm is recalibrated on such views, in place of whole images.

    Raises:
        UsageError: a number of pixels is wrong.
    """

    sides_px: Sequence[int]
    patch_px: int

    def __post_init__(self) -> None:
        # Studies give their own sides and pixels, so that these are the settings to change; the
        # builder puts the study's name in place of this one.
        checks.wholes("study.patches.sides_px", self.sides_px)
        checks.whole("study.patches.patch_px", self.patch_px)

    def __str__(self) -> str:
        sides = " or ".join(map(str, self.sides_px))
        return f"patches of {sides} px of the stored image, seen at {self.patch_px} px"

    def __call__(self, image: Image.Image, rng: random.Random) -> UInt8[np.ndarray, "s s 3"]:
        short_side = min(image.size)
        fitting = [side for side in self.sides_px if side <= short_side]
        side = rng.choice(fitting or [short_side])
        left = rng.randint(0, image.width - side)
        top = rng.randint(0, image.height - side)
        patch = image.crop((left, top, left + side, top + side))
        resized = patch.resize((self.patch_px, self.patch_px), Image.Resampling.BILINEAR)
        return np.asarray(resized)


def patch_keys(indices: Iterable[int], seed: int) -> list[SeededIndex]:
    """Returns the indices of images, each with a seed for its boxes that depends on it alone."""
    return [(index, seed_for(Use.STUDY_PATCHES, seed, index)) for index in indices]
