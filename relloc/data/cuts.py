"""How a square is made of an image: resampled once or several times, and perhaps mirrored.

A `Cut` is what a view or a crop draws of an image's size alone, before any pixel is known. `apply`
makes the square of one image by Pillow; `relloc.data.resampling` makes those of a batch on a
device, from the cuts of all of its images as arrays (`BatchCuts`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import PIL
from jaxtyping import Bool, Float64, Int64
from PIL import Image

from relloc.geometry import Pair

T = TypeVar("T")

# The major version of Pillow, and the first one that may resize columns before rows
_PILLOW_VERSION = int(PIL.__version__.partition(".")[0])
_FIRST_VERTICAL = 13

# Types of the arrays of `BatchResampling` that do not hold whole numbers
_TYPES: dict[str, Any] = {
    "start": np.float64,
    "scale": np.float64,
    "reach": np.float64,
    "is_vertical_first": np.bool_,
}

Box = tuple[float, float, float, float]  # (top, left, bottom, right), in pixels
WholeBox = tuple[int, int, int, int]  # the same in whole pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """A box of an image resized to `size` (height, width) by Pillow's BILINEAR.

    That is linear interpolation with antialiasing: the filter is as wide as the box is reduced.

    The image is cut to the pixels `within` first, and none outside of them is read. `box` counts
    from there. `origin` is the place (row, column) of the first pixel where only a part of the
    image is at hand.
    """

    box: Box
    within: WholeBox
    size: Pair
    origin: Pair = (0, 0)

    @property
    def is_copy(self) -> bool:
        """Whether the box is only cut, since it has whole pixels and the size of the result."""
        top, left, bottom, right = self.box
        return self.box == self.whole_box and self.size == (bottom - top, right - left)

    @property
    def whole_box(self) -> WholeBox:
        """The box with its borders rounded to whole pixels."""
        top, left, bottom, right = map(round, self.box)
        return top, left, bottom, right

    @property
    def is_vertical_first(self) -> bool:
        """Whether Pillow resizes columns before rows, between which it rounds to 8 bits.

        Pillow does so from version 13 on where the height is reduced by more than twice as many
        pixels as the width (https://github.com/python-pillow/Pillow/pull/9549). The size of the
        image counts, not that of the box.
        """
        if _PILLOW_VERSION < _FIRST_VERTICAL:
            return False
        top, left, bottom, right = self.within
        less_height = bottom - top - self.size[0]
        less_width = right - left - self.size[1]
        return less_height > max(0, 2 * less_width)

    def filter_of_axis(self, axis: int) -> tuple[float, float]:
        """Returns the pixels of the box per pixel of the result, and how far the filter reaches.

        `axis` is 0 for rows and 1 for columns.
        """
        # Pillow subtracts in float32.
        length = float(np.float32(self.box[axis + 2] - self.box[axis]))
        scale = length / self.size[axis]
        return scale, max(scale, 1.0)

    def needed(self) -> WholeBox:
        """Returns the box of those pixels of the image that the result depends on."""
        top, bottom = self._needed_of_axis(0)
        left, right = self._needed_of_axis(1)
        return top, left, bottom, right

    def _needed_of_axis(self, axis: int) -> tuple[int, int]:
        start, end = self.box[axis], self.box[axis + 2]
        lowest, highest = self.within[axis], self.within[axis + 2]
        scale, reach = self.filter_of_axis(axis)
        # The filter of the first and of the last pixel reaches so far from their centers.
        first = lowest + math.floor(start + scale / 2 - reach)
        last = lowest + math.floor(end - scale / 2 + reach) + 1
        return max(lowest, first), min(highest, last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How a square is made of an image: by `steps`, one after the other, then mirrored or not."""

    steps: tuple[Resampling, ...]
    mirrored: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchResampling:
    """One `Resampling` of each image of a batch, as arrays with a row for each image.

    The two columns are those of rows and of columns of an image. Numbers are in pixels.

    Attributes:
        start: where the box begins, counted from `within`.
        scale: pixels of the box per pixel of the result.
        reach: how far the filter reaches from the center of a pixel of the result.
        length: how many pixels lie `within`.
        first: the first pixel that the result depends on, counted from `within`.
        offset: the same pixel, counted from the first one at hand.
        needed: how many pixels the result depends on, from that one on.
        size: the size of the result.
        is_vertical_first: whether columns are resized before rows.
    """

    start: Float64[np.ndarray, "b 2"]
    scale: Float64[np.ndarray, "b 2"]
    reach: Float64[np.ndarray, "b 2"]
    length: Int64[np.ndarray, "b 2"]
    first: Int64[np.ndarray, "b 2"]
    offset: Int64[np.ndarray, "b 2"]
    needed: Int64[np.ndarray, "b 2"]
    size: Int64[np.ndarray, "b 2"]
    is_vertical_first: Bool[np.ndarray, "b"]

    def taps(self) -> Int64[np.ndarray, "b 2"]:
        """Returns the most pixels that the filter reaches around one pixel of the result."""
        return (2 * self.reach).astype(np.int64) + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchCuts:
    """The cuts of the images of a batch, all of which are of one view.

    So they have as many steps, and end in squares of one size.
    """

    steps: tuple[BatchResampling, ...]
    mirrored: Bool[np.ndarray, "b"]

    def at(self, places: Sequence[int]) -> "BatchCuts":
        """Returns the cuts of some of the images."""
        rows = np.array(places, dtype=np.int64)
        steps = []
        for step in self.steps:
            arrays = {name: array[rows] for name, array in vars(step).items()}
            steps.append(BatchResampling(**arrays))
        return BatchCuts(steps=tuple(steps), mirrored=self.mirrored[rows])


def batch_cuts(cuts: Sequence[Cut]) -> BatchCuts:
    """Returns the cuts of a batch as arrays."""
    steps = []
    # Without images there are no steps.
    for of_step in zip(*(cut.steps for cut in cuts), strict=True):
        steps.append(_batch_resampling(of_step))
    return BatchCuts(
        steps=tuple(steps),
        mirrored=np.array([cut.mirrored for cut in cuts], dtype=np.bool_),
    )


def _batch_resampling(steps: Sequence[Resampling]) -> BatchResampling:
    columns: dict[str, list[Any]] = {
        field.name: [] for field in dataclasses.fields(BatchResampling)
    }
    for step in steps:
        needed = step.needed()
        filters = [step.filter_of_axis(axis) for axis in (0, 1)]
        columns["start"].append(step.box[:2])
        columns["scale"].append([scale for scale, _ in filters])
        columns["reach"].append([reach for _, reach in filters])
        columns["length"].append([step.within[axis + 2] - step.within[axis] for axis in (0, 1)])
        columns["first"].append([needed[axis] - step.within[axis] for axis in (0, 1)])
        columns["offset"].append([needed[axis] - step.origin[axis] for axis in (0, 1)])
        columns["needed"].append([needed[axis + 2] - needed[axis] for axis in (0, 1)])
        columns["size"].append(step.size)
        columns["is_vertical_first"].append(step.is_vertical_first)
    arrays = {}
    for name, column in columns.items():
        arrays[name] = np.array(column, dtype=_TYPES.get(name, np.int64))
    return BatchResampling(**arrays)


def whole(height: int, width: int, size: Pair) -> Resampling:
    """Returns the resize of a whole image of `height` x `width` px to `size` (height, width)."""
    box = (0, 0, height, width)
    return Resampling(box=box, within=box, size=size)


def square_of_resized(
    height: int, width: int, size: Pair, corner: Pair, side_px: int
) -> Resampling:
    """Returns what makes a square of an image of `height` x `width` px that is resized to `size`.

    The square has its top left corner at `corner` (row, column) of the resized image, and
    `side_px` pixels a side. Resizing is bilinear with antialiasing, as torchvision does on Pillow
    images. Only the square is computed, so a very long image costs no more than another.
    """
    top, left = corner
    within = (0, 0, height, width)
    square = (side_px, side_px)
    # An image of that size already is only cut.
    if size == (height, width):
        box = (top, left, top + side_px, left + side_px)
        return Resampling(box=box, within=within, size=square)
    # The square in pixels of the original image, in float32 as Pillow takes it
    scale_row = height / size[0]
    scale_column = width / size[1]
    bottom = (top + side_px) * scale_row
    right = (left + side_px) * scale_column
    # Rounding may not lead beyond the border.
    box = (
        float(np.float32(top * scale_row)),
        float(np.float32(left * scale_column)),
        min(float(np.float32(bottom)), height),
        min(float(np.float32(right)), width),
    )
    return Resampling(box=box, within=within, size=square)


def apply(image: Image.Image, cut: Cut) -> Image.Image:
    """Returns the square of an image."""
    for step in cut.steps:
        image = resample(image, step)
    if cut.mirrored:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def resample(image: Image.Image, step: Resampling) -> Image.Image:
    """Returns the part of an image that a step shows, resized."""
    # Pillow reads beyond the border of a box, but not beyond that of an image.
    if step.within != (0, 0, image.height, image.width):
        image = image.crop(_as_pillow(step.within))
    if step.is_copy:
        return image.crop(_as_pillow(step.whole_box))
    new_height, new_width = step.size
    return image.resize(
        (new_width, new_height), Image.Resampling.BILINEAR, box=_as_pillow(step.box)
    )


def _as_pillow(box: tuple[T, T, T, T]) -> tuple[T, T, T, T]:
    """Returns a box in Pillow's order: left, top, right, bottom."""
    top, left, bottom, right = box
    return left, top, right, bottom
