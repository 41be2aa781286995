"""Geometry of the patch grid, in whole pixels: plain Python, without tensors or randomness.

Conventions used everywhere: the axis order is batch, channel, row, column; pairs are
(row, column); boxes are half-open (top, left, bottom, right). The cells of a grid are numbered row
by row from 0. Of the 3x3 grid cell 4 is the center. The label of a neighbor, 0 to 7, is its
position among the other eight cells in that order: this is the class that the network predicts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from relloc import checks
from relloc.errors import UsageError
from relloc.neutral import repr_without_defaults

Pair = tuple[int, int]  # (row, column), (height, width) or (low, high), in pixels
# Of the 3x3 grid, about whose center all networks are asked
CELLS = 9
CENTER = 4
NEIGHBORS = (0, 1, 2, 3, 5, 6, 7, 8)  # the cell of each label
OFFSETS = tuple(
    (cell // 3 - 1, cell % 3 - 1) for cell in NEIGHBORS
)  # neighbor minus center, in cells
CHANCE_PERCENT = 100 / len(NEIGHBORS)  # accuracy of a network that guesses

# mmselfsup 1.x numbers its cells column by column: taking the rows of its 8-way output layer in
# this order gives the row-by-row labels used here (protocols.md 1.4).
ROW_MAJOR_FROM_MMSELFSUP_1X = (0, 3, 5, 1, 6, 2, 4, 7)


def opposite(label: int) -> int:
    """Returns the label of the center as seen from the neighbor with this label (0 to 7).

    Example:
        Label 1 is the cell above the center. `opposite(1)` is 6, the cell below it.

    Raises:
        ValueError: there is no such label.
    """
    n_labels = len(OFFSETS)
    if not 0 <= label < n_labels:
        raise ValueError(f"label is {label}, not in 0..{n_labels - 1}")
    # Labels run row by row, so a half turn of the grid reverses their order.
    return n_labels - 1 - label


def check_jitter(setting: str, jitter_px: int | Pair | list[int]) -> None:
    """Raises `UsageError` unless the value of a setting is a jitter, as `PatchGrid` takes it."""
    if isinstance(jitter_px, list | tuple):
        checks.wholes(setting, jitter_px, at_least=-math.inf)
        if len(jitter_px) != 2:
            raise UsageError(
                f"{setting} is {jitter_px}: "
                "give one number J, or two as [low, high], in whole pixels"
            )
    else:
        checks.whole(setting, jitter_px, at_least=0)
    low, high = _jitter_range(jitter_px)
    if low > high:
        raise UsageError(f"{setting} runs from {low} to {high}: low must not exceed high")


def _jitter_range(jitter_px: int | Pair | list[int]) -> Pair:
    if isinstance(jitter_px, int):
        return -jitter_px, jitter_px
    low, high = jitter_px
    return low, high


@runtime_checkable
class Resize(Protocol):
    """A rule for the size that an image is brought to before patches are cut from it."""

    def size(self, height: int, width: int, u: float) -> Pair:
        """Returns the new (height, width) of an image of `height` x `width` pixels.

        `u` is a uniform random number in [0, 1), the only source of randomness.
        """
        ...

    def shortest(self) -> int:
        """Returns the shortest side that any resized image can have, in pixels; 0 if unbounded."""
        ...

    def longest_short_side(self) -> int:
        """Returns the largest length of the shorter side of a resized image, in pixels."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ToSide:
    # What `Square` and `ShortSide` share: the shorter side of every resized image is `px` pixels.

    px: int

    def __post_init__(self) -> None:
        checks.whole("grid.resize.px", self.px)

    def shortest(self) -> int:
        return self.px

    def longest_short_side(self) -> int:
        return self.px


class Square(_ToSide):
    """Resizes both sides to `px` pixels and so loses the aspect ratio.

    Used by google 2019 and mmselfsup 1.x (protocols.md 1.1).
    """

    def size(self, height: int, width: int, u: float) -> Pair:
        return self.px, self.px


class ShortSide(_ToSide):
    """Resizes the shorter side to `px` pixels and keeps the aspect ratio.

    Used by mmselfsup 0.x (protocols.md 1.1). The longer side is rounded down, as torchvision does.
    """

    def size(self, height: int, width: int, u: float) -> Pair:
        if height <= width:
            new_width = int(self.px * width / height)
            return self.px, new_width
        new_height = int(self.px * height / width)
        return new_height, self.px


@dataclasses.dataclass(frozen=True, kw_only=True)
class Area:
    """Resizes to a random area, uniform in [low_px2, high_px2], and keeps the aspect ratio.

    Used by the paper (Doersch 2015, protocols.md 1.1). Areas are in square pixels.

    Raises:
        ValueError: the range is empty or does not lie above 0.
    """

    low_px2: int
    high_px2: int

    def __post_init__(self) -> None:
        if not 0 < self.low_px2 <= self.high_px2:
            raise ValueError(
                f"area range {self.low_px2}..{self.high_px2} px2 is not valid: "
                "give grid.resize.low_px2 above 0 and grid.resize.high_px2 of at least low_px2"
            )

    def size(self, height: int, width: int, u: float) -> Pair:
        width_of_range = self.high_px2 - self.low_px2
        area = self.low_px2 + u * width_of_range
        scale = math.sqrt(area / (height * width))
        # A very long image could otherwise round to a side of 0 pixels.
        new_height = max(1, round(height * scale))
        new_width = max(1, round(width * scale))
        return new_height, new_width

    def shortest(self) -> int:
        return 0

    def longest_short_side(self) -> int:
        # The shorter side is longest when the image is a square of the largest area.
        return math.isqrt(self.high_px2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Square patches in a grid, nine in 3x3 by default, each displaced on its own by random jitter.

    Args:
        patch_px: side of a patch.
        gap_px: distance between two neighboring patches before the jitter.
        jitter_px: range of the displacement on each axis, uniform over whole pixels. A number J
            means -J to J, a pair [low, high] means low to high, ends included. For example [0, 21]
            with a gap of 21 is the random 64 px crop of an 85 px cell of mmselfsup.
        resize: how an image is resized before the patches are cut; None keeps its size.
        yoked_jitter: whether all patches of an image are displaced by the same jitter, as in
            Mundhenk et al. (CVPR 2018), and not each by its own.
        scale: smallest and largest factor by which what a patch shows is enlarged, drawn uniformly.
            A patch is then cut as a larger or smaller square around the same center, and resized to
            `patch_px`. The gap is that between the largest such squares. None enlarges nothing.
        yoked_scale: whether all patches of an image are enlarged by the same factor.
        rows: number of rows of the grid, and of columns.

    Example:
        >>> grid = PatchGrid(patch_px=64, gap_px=21, jitter_px=(0, 21), resize=ShortSide(px=292))
        >>> grid.span_px
        255

    Raises:
        ValueError: a value is not valid, or no resized image can hold the grid.
    """

    patch_px: int
    gap_px: int
    jitter_px: int | Pair | list[int]
    resize: Resize | None
    yoked_jitter: bool = False
    scale: Sequence[float] | None = None
    yoked_scale: bool = False
    rows: int = 3

    def __repr__(self) -> str:
        return repr_without_defaults(self)

    def __hash__(self) -> int:
        # Settings may be lists, which have no hash.
        return hash(repr(self))

    def __post_init__(self) -> None:
        checks.whole("grid.patch_px", self.patch_px)
        checks.whole("grid.rows", self.rows, at_least=2)
        checks.true_or_false("grid.yoked_jitter", self.yoked_jitter)
        self._check_scale()
        # A negative gap would make patches overlap, and shared pixels give the answer away.
        checks.whole("grid.gap_px", self.gap_px, at_least=0)
        check_jitter("grid.jitter_px", self.jitter_px)
        self._check_fits()

    def _check_scale(self) -> None:
        checks.true_or_false("grid.yoked_scale", self.yoked_scale)
        if self.scale is None:
            if self.yoked_scale:
                raise UsageError(
                    "grid.yoked_scale=true changes nothing while grid.scale is null: "
                    "give grid.scale=[LOW,HIGH], such as [0.8,1.2], or leave both out"
                )
            return
        checks.numbers("grid.scale", self.scale, above=0)
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            raise UsageError(
                f"grid.scale is {self.scale}: give the smallest and the largest factor, "
                "such as [0.8,1.2]"
            )

    def _check_fits(self) -> None:
        if self.resize is None:
            return
        shortest = self.resize.shortest()
        # 0 means no bound: `resized` then enlarges each image that is too small.
        if 0 < shortest < self.span_px:
            parts = (
                f"{self.rows} x {self.cell_px} px patches + {self.rows - 1} x {self.gap_px} px "
                "gaps + "
                f"{self.jitter_width} px of jitter"
            )
            raise UsageError(
                f"the grid needs {self.span_px} px ({parts}), "
                f"but images are resized to a side of {shortest} px: "
                f"set grid.resize.px to {self.span_px} or more, or make the grid smaller"
            )

    @property
    def cells(self) -> int:
        """The number of patches of an image."""
        return self.rows**2

    @property
    def jitter_range(self) -> Pair:
        """The smallest and the largest displacement of a patch, both included."""
        return _jitter_range(self.jitter_px)

    @property
    def jitter_width(self) -> int:
        """The largest minus the smallest displacement of a patch."""
        low, high = self.jitter_range
        return high - low

    @property
    def cell_px(self) -> int:
        """The side of the largest square that is cut for a patch: `patch_px` without `scale`."""
        if self.scale is None:
            return self.patch_px
        largest = self.patch_px / self.scale[0]
        # Without the last digits of the division, so that 96 / (96 / 110) stays 110.
        return math.ceil(round(largest, 6))

    @property
    def pitch_px(self) -> int:
        """The distance between the left sides of neighboring cells before the jitter."""
        return self.cell_px + self.gap_px

    @property
    def span_px(self) -> int:
        """The side of a crop: it holds the grid wherever the jitter moves its patches."""
        patches_and_gaps = self.rows * self.cell_px + (self.rows - 1) * self.gap_px
        return patches_and_gaps + self.jitter_width

    def lowest_corner(self, cell: int) -> Pair:
        """Returns a cell's top left corner (row, column) at the smallest displacement."""
        row, column = divmod(cell, self.rows)
        return row * self.pitch_px, column * self.pitch_px

    def resized(self, height: int, width: int, u: float) -> Pair:
        """Returns the (height, width) of an image after the resize, large enough for the grid.

        `u` is a uniform random number in [0, 1), the only source of randomness. An image that
        `Area` makes too small is enlarged until the grid fits; its aspect ratio stays.

        Raises:
            ValueError: the image is smaller than the grid, and there is no resize to enlarge it.
                The caller puts the image's name before the message.
        """
        if self.resize is None:
            if min(height, width) < self.span_px:
                size = f"{width}x{height} px"
                raise ValueError(f"is {size}, the grid needs {self.span_px} px")
            return height, width
        new_height, new_width = self.resize.size(height, width, u)
        short_side = min(new_height, new_width)
        scale = max(1.0, self.span_px / short_side)
        # Rounded up, since one pixel less would be too small for the grid.
        enlarged_height = math.ceil(new_height * scale)
        enlarged_width = math.ceil(new_width * scale)
        return enlarged_height, enlarged_width
