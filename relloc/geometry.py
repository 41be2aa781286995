"""The patch grid in whole pixels: plain Python, no tensors, no chance.

Conventions used everywhere: axis order is batch, channel, row, column; pairs are (row, column);
boxes are half-open (top, left, bottom, right). A grid is 3x3, its cells numbered row by row.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

from relloc import checks
from relloc.errors import UsageError

Pair = tuple[int, int]
CELLS = 9
CENTER = 4
NEIGHBORS = (0, 1, 2, 3, 5, 6, 7, 8)  # cell of the neighbor, in the order of the labels
OFFSETS = tuple((cell // 3 - 1, cell % 3 - 1) for cell in NEIGHBORS)  # neighbor minus center
CHANCE_PERCENT = 100 / len(NEIGHBORS)

# mmselfsup 1.x walks the columns first: rows of its 8-way head, taken in this order, are row-major
# (protocols.md 1.4).
ROW_MAJOR_FROM_MMSELFSUP_1X = (0, 3, 5, 1, 6, 2, 4, 7)


def opposite(label: int) -> int:
    """Label of the center as seen from the neighbor that `label` (0..7) names."""
    if not 0 <= label < len(OFFSETS):
        raise ValueError(f"label is {label}, not in 0..{len(OFFSETS) - 1}")
    return len(OFFSETS) - 1 - label


@runtime_checkable
class Resize(Protocol):
    """How large an image becomes before the grid is placed in it."""

    def size(self, height: int, width: int, chance: float) -> Pair:
        """New (height, width) of a `height` x `width` image; `chance` in [0, 1) is the only luck."""
        ...

    def shortest(self) -> int:
        """The shortest side that any image can get, in pixels; 0 where that is not bounded."""
        ...

    def longest_short_side(self) -> int:
        """The longest that the shorter side of any image can get, in pixels."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    """Both sides become `px`, the aspect ratio is lost (google 2019 and mmselfsup 1.x)."""

    px: int

    def __post_init__(self) -> None:
        checks.whole("grid.resize.px", self.px)

    def size(self, height: int, width: int, chance: float) -> Pair:
        return self.px, self.px

    def shortest(self) -> int:
        return self.px

    def longest_short_side(self) -> int:
        return self.px


class ShortSide(Square):
    """The short side becomes `px`, the aspect ratio stays (mmselfsup 0.x; torchvision's rounding)."""

    def size(self, height: int, width: int, chance: float) -> Pair:
        if height <= width:
            return self.px, int(self.px * width / height)
        return int(self.px * height / width), self.px


@dataclasses.dataclass(frozen=True, kw_only=True)
class Area:
    """The area becomes uniform in [low_px2, high_px2], the aspect ratio stays (Doersch 2015)."""

    low_px2: int
    high_px2: int

    def __post_init__(self) -> None:
        if not 0 < self.low_px2 <= self.high_px2:
            raise ValueError(f"area range {self.low_px2}..{self.high_px2} px2 is not a range above 0")

    def size(self, height: int, width: int, chance: float) -> Pair:
        area = self.low_px2 + chance * (self.high_px2 - self.low_px2)
        scale = math.sqrt(area / (height * width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def shortest(self) -> int:
        return 0

    def longest_short_side(self) -> int:
        return math.isqrt(self.high_px2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Nine square patches, 3x3, each moved on its own by the jitter.

    `patch_px` is the side of a patch; `gap_px` the distance between neighbors that have not moved.
    `jitter_px` says how far a patch moves on each axis: a number J means uniformly by -J..J, a
    pair (low, high) uniformly by low..high. (0, 21) around a gap of 21 is the random 64 px crop
    of an 85 px cell of mmselfsup. `resize` acts on the image before; None keeps its size.

    Raises:
        ValueError: a grid that cannot exist, or that no resized image can hold, with the numbers.
    """

    patch_px: int
    gap_px: int
    jitter_px: int | Pair | list[int]
    resize: Resize | None

    def __post_init__(self) -> None:
        checks.whole("grid.patch_px", self.patch_px)
        checks.whole("grid.gap_px", self.gap_px, at_least=0)  # else patches that have not moved would overlap
        if not isinstance(self.jitter_px, list | tuple):
            checks.whole("grid.jitter_px", self.jitter_px, at_least=0)
        elif len(checks.wholes("grid.jitter_px", self.jitter_px, at_least=-math.inf)) != 2:
            raise UsageError(f"grid.jitter_px is {self.jitter_px}: give J, or the pair [low, high], in whole pixels")
        low, high = self.jitter_range
        if low > high:
            raise UsageError(f"grid.jitter_px runs from {low} to {high}: low must not exceed high")
        shortest = self.resize.shortest() if self.resize else 0
        if 0 < shortest < self.span_px:
            raise ValueError(
                f"grid needs {self.span_px} px (3 x {self.patch_px} px patches + 2 x {self.gap_px} px "
                f"gaps + {self.jitter_width} px of jitter), but images are resized to a side of "
                f"{shortest} px: set grid.resize.px to {self.span_px} or more, or make the grid smaller"
            )

    @property
    def jitter_range(self) -> Pair:
        """Lowest and highest displacement of a patch, both included."""
        if isinstance(self.jitter_px, int):
            return -self.jitter_px, self.jitter_px
        return self.jitter_px[0], self.jitter_px[1]

    @property
    def jitter_width(self) -> int:
        low, high = self.jitter_range
        return high - low

    @property
    def pitch_px(self) -> int:
        """Distance between the same corner of two neighbors that have not moved."""
        return self.patch_px + self.gap_px

    @property
    def span_px(self) -> int:
        """Side of the square that holds the grid wherever its patches move: the crop side."""
        return 3 * self.patch_px + 2 * self.gap_px + self.jitter_width

    def lowest_corner(self, cell: int) -> Pair:
        """(row, column) in the span of a cell's top left corner, moved as far up and left as it can."""
        return cell // 3 * self.pitch_px, cell % 3 * self.pitch_px

    def resized(self, height: int, width: int, chance: float) -> Pair:
        """(height, width) of an image after the resize, enlarged where an `Area` is too small.

        Raises:
            ValueError: the image is smaller than the grid and nothing enlarges it.
        """
        if self.resize is None:
            if min(height, width) < self.span_px:
                raise ValueError(f"is {width}x{height} px, the grid needs {self.span_px} px")
            return height, width
        new_height, new_width = self.resize.size(height, width, chance)
        scale = max(1.0, self.span_px / min(new_height, new_width))
        return math.ceil(new_height * scale), math.ceil(new_width * scale)
