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

Size = tuple[int, int]  # height, width


def check_box(setting: str, box: Any) -> None:
    """Checks that `box` is a list of two whole numbers, the longer side first.

    Raises:
        UsageError: it is anything else.
    """
    checks.wholes(setting, box)
    checks.one_of(f"the number of sides in {setting}", len(box), [2])
    checks.whole(f"{setting}'s first side", box[0], at_least=box[1])


def fitted_size(height: int, width: int, box: Sequence[int]) -> Size:
    """Returns the largest size with the image's aspect ratio that fits into a box.

    `box` is (long, short): the longer side of the image has at most `long` pixels, and the shorter
    side at most `short`.

    Example:
        >>> fitted_size(375, 500, (2048, 512))
        (512, 683)
    """
    long_side, short_side = box
    scale = min(long_side / max(height, width), short_side / min(height, width))
    # A very long image would otherwise lose its shorter side altogether.
    new_height = max(1, int(height * scale + 0.5))
    new_width = max(1, int(width * scale + 0.5))
    return new_height, new_width


def nearest_indices(source: int, target: int) -> Int[np.ndarray, "target"]:
    """Returns which of `source` pixels each of `target` pixels shows, as cv2.INTER_NEAREST does."""
    # The product is that of OpenCV's resizeNN: a reciprocal of a quotient, in double precision.
    # target/source could differ from it in the last bit, and at a boundary by a pixel.
    pixels_per_target = 1 / (target / source)
    indices = np.floor(np.arange(target) * pixels_per_target).astype(np.int64)
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
        lower, upper, weight = table.unbind()
        return cls(lower=lower.long(), upper=upper.long(), weight=weight)


def interpolation_table(source: int, target: int) -> Float[Tensor, "3 target"]:
    """Returns lower index, upper index and weight of each of `target` pixels along an axis.

    Pixels are squares of which the centers are interpolated, without antialiasing, as in
    cv2.INTER_LINEAR. All is float32, so that a single copy brings it to a GPU; it holds whole
    numbers up to 2^24 exactly.
    """
    centers = (np.arange(target) + 0.5) * (source / target) - 0.5
    # Beyond the outermost centers the image goes on as it ends.
    centers = np.clip(centers, 0, source - 1)
    lower = np.floor(centers)
    upper = np.minimum(lower + 1, source - 1)
    table = np.stack([lower, upper, centers - lower])
    return torch.from_numpy(table.astype(np.float32))


def interpolated(
    image: UInt8[Tensor, "h w 3"],
    rows: Interpolation,
    columns: Interpolation,
) -> Float[Tensor, "rows columns 3"]:
    """Returns pixels of the resized image, as whole numbers from 0 to 255.

    They are cv2.INTER_LINEAR's within one gray level, as OpenCV rounds its weights to 11 bits.
    """
    upper_left = image[rows.lower].float()
    lower_left = image[rows.upper].float()
    of_rows = torch.lerp(upper_left, lower_left, rows.weight[:, None, None])
    of_columns = torch.lerp(
        of_rows[:, columns.lower],
        of_rows[:, columns.upper],
        columns.weight[:, None],
    )
    # OpenCV rounds halves up.
    return (of_columns + 0.5).floor()


def resized(image: UInt8[Tensor, "h w 3"], size: Size) -> Float[Tensor, "h2 w2 3"]:
    """Returns the whole image at another size, as whole numbers from 0 to 255."""
    height, width = size
    tables = [
        interpolation_table(image.shape[0], height),
        interpolation_table(image.shape[1], width),
    ]
    rows, columns = [Interpolation.from_table(table.to(image.device)) for table in tables]
    return interpolated(image, rows, columns)
