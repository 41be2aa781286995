"""Resizing of images and class maps as OpenCV does it, for a part of the resized image alone.

Only the pixels that a crop shows are computed, so that its cost does not depend on the size of the
resized image. Sizes are rounded as mmcv 1.7 does in `rescale_size` (mmcv/image/geometric.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from relloc import checks
from relloc.patches.normalize import ByDataset
from relloc.to_device import to_device

Size = tuple[int, int]  # height, width
# RGB pixels, as they are decoded, and after interpolation: whole numbers from 0 to 255 in float32.
_Pixels = UInt8[Tensor, "h w 3"]
_Resized = Float[Tensor, "rows columns 3"]


def check_box(setting: str, box: Any) -> None:
    """Checks that `box` is a list of two whole numbers, the longer side first.

    Raises:
        UsageError: it is anything else.
    """
    checks.wholes(setting, box)
    checks.one_of(f"the number of sides in {setting}", len(box), [2])
    long_side, short_side = box
    checks.whole(f"{setting}'s first side", long_side, at_least=short_side)


def fitted_size(height: int, width: int, box: Sequence[int]) -> Size:
    """Returns the largest size with the image's aspect ratio that fits into a box.

    `box` is (long, short): the longer side of the image has at most `long` pixels, and the shorter
    side at most `short`.

    Example:
        >>> fitted_size(375, 500, (2048, 512))
        (512, 683)
    """
    long_side, short_side = box
    # The side that leaves less room decides.
    longer = max(height, width)
    shorter = min(height, width)
    long_scale = long_side / longer
    short_scale = short_side / shorter
    scale = min(long_scale, short_scale)
    # Halves are rounded up, as in mmcv; Python's round takes them to the even number.
    new_height = int(height * scale + 0.5)
    new_width = int(width * scale + 0.5)
    # A very long image would otherwise lose its shorter side altogether.
    return max(1, new_height), max(1, new_width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedImage:
    """The whole image, resized so that it fits into the box (long, short) of pixels.

    Raises:
        UsageError: `box` is no such box.
    """

    box: Sequence[int]

    def __post_init__(self) -> None:
        check_box("view.box", self.box)

    def __str__(self) -> str:
        return f"whole image fitted into {self.box[0]} x {self.box[1]} px"

    def size(self, height: int, width: int) -> Size:
        """Returns the size of an image after it was resized."""
        return fitted_size(height, width, self.box)


def nearest_indices(source: int, target: int) -> Int[np.ndarray, "target"]:
    """Returns which of `source` pixels each of `target` pixels shows, as cv2.INTER_NEAREST does."""
    # The product is that of OpenCV's resizeNN: a reciprocal of a quotient, in double precision.
    # target/source could differ from it in the last bit, and at a boundary by a pixel.
    pixels_per_target = 1 / (target / source)
    positions = np.arange(target) * pixels_per_target
    indices = np.floor(positions).astype(np.int64)
    return np.minimum(indices, source - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Interpolation:
    """For each pixel along one axis of the result, the two source pixels it is interpolated from.

    The pixel is (1 - weight) * source[lower] + weight * source[upper].
    """

    lower: Int[Tensor, "n"]
    upper: Int[Tensor, "n"]
    weight: Float[Tensor, "n"]

    @classmethod
    def from_table(cls, table: Float[Tensor, "3 n"]) -> "Interpolation":
        """Returns the interpolation of a table of `interpolation_table`, on its device."""
        # Indices were written as floats, which torch does not index with.
        lower, upper, weight = table.unbind()
        return cls(
            lower=lower.long(),
            upper=upper.long(),
            weight=weight,
        )


def interpolation_table(source: int, target: int) -> Float[Tensor, "3 target"]:
    """Returns lower index, upper index and weight of each of `target` pixels along an axis.

    Pixels are squares of which the centers are interpolated, without antialiasing, as in
    cv2.INTER_LINEAR. All is float32, so that a single copy brings it to a GPU; it holds whole
    numbers up to 2^24 exactly.
    """
    # The center of pixel i lies at i + 1/2 of its own grid.
    target_centers = np.arange(target) + 0.5
    pixels_per_target = source / target
    positions = target_centers * pixels_per_target - 0.5
    # Beyond the outermost centers the image goes on as it ends.
    last = source - 1
    positions = np.clip(positions, 0, last)
    lower = np.floor(positions)
    upper = np.minimum(lower + 1, last)
    weights = positions - lower
    table = np.stack([lower, upper, weights])
    return torch.from_numpy(table.astype(np.float32))


def interpolated(
    image: _Pixels,
    rows: Interpolation,
    columns: Interpolation,
) -> _Resized:
    """Returns pixels of the resized image, as whole numbers from 0 to 255.

    They are cv2.INTER_LINEAR's within one gray level, as OpenCV rounds its weights to 11 bits.
    """
    # First down the columns, at the full width of the image. `rows.lower` has the lower index,
    # which is the upper row.
    upper_rows = image[rows.lower].float()
    lower_rows = image[rows.upper].float()
    row_weights = rows.weight[:, None, None]
    of_rows = torch.lerp(upper_rows, lower_rows, row_weights)

    # Then along the rows.
    left_columns = of_rows[:, columns.lower]
    right_columns = of_rows[:, columns.upper]
    column_weights = columns.weight[:, None]
    of_columns = torch.lerp(left_columns, right_columns, column_weights)
    # OpenCV rounds halves up.
    return (of_columns + 0.5).floor()


def all_resized(
    images: Sequence[UInt8[Tensor, "_ _ 3"]],
    sizes: Sequence[Size],
) -> list[Float[Tensor, "_ _ 3"]]:
    """Returns whole images, all on one device, at other sizes, as whole numbers from 0 to 255."""
    if not images:
        return []
    tables = []
    for image, (height, width) in zip(images, sizes, strict=True):
        tables.append(interpolation_table(image.shape[0], height))
        tables.append(interpolation_table(image.shape[1], width))
    lengths = [table.shape[1] for table in tables]
    # A single copy brings all tables to the device.
    on_device = to_device(torch.cat(tables, dim=1), images[0].device).split(lengths, dim=1)
    axes = [Interpolation.from_table(table) for table in on_device]
    results = []
    for image, rows, columns in zip(images, axes[::2], axes[1::2], strict=True):
        results.append(interpolated(image, rows, columns))
    return results


def resized_and_normalized(
    images: Sequence[UInt8[Tensor, "_ _ 3"]],
    sizes: Sequence[Size],
) -> list[Float[Tensor, "3 _ _"]]:
    """Returns whole images, all on one device, at other sizes and as networks take them."""
    normalize = ByDataset()
    results = []
    for image in all_resized(images, sizes):
        # The result of a permutation is not laid out as convolutions expect it.
        channels_first = image.permute(2, 0, 1).contiguous()
        # Normalization takes batches: here one of a single image.
        batch = normalize(channels_first.unsqueeze(0))
        results.append(batch[0])
    return results
