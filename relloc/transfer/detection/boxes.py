"""Geometry of boxes x1, y1, x2, y2 in continuous pixel coordinates: a width is x2 - x1.

Everything is computed in float32: bfloat16 knows coordinates of 500 px to within 2 px only.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from relloc.to_device import on_device

# Standard deviations by which offsets are divided, as in mmdetection 2.28.2.
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)
# A decoded side is at most 1000/16 times that of the reference box, and at least 16/1000 times.
_LOG_SIDE_LIMIT = math.log(1000 / 16)
# An area in square pixels, and a side in pixels, so small that no real box has it: with them no
# division by zero and no logarithm of zero can occur.
_LEAST_UNION = 1e-6
_LEAST_SIDE = 1e-6

# Corners x1, y1, x2, y2, or offsets in x, y, width and height, of any number of boxes.
_Boxes = Float[Tensor, "*b 4"]
# x and y of any number of points, or widths and heights.
_Pairs = Float[Tensor, "*b 2"]


def overlaps(
    boxes: Float[Tensor, "*b n 4"],
    others: Float[Tensor, "*b m 4"],
) -> Float[Tensor, "*b n m"]:
    """Returns the intersection over union of each box with each other box.

    Two boxes without area have an overlap of 0, also if they are equal.
    """
    # Boxes are the rows of the result and others are its columns.
    rows = boxes.float().unsqueeze(-2)
    columns = others.float().unsqueeze(-3)

    # The intersection of two boxes starts where the later one starts and ends where the earlier
    # one ends. Its sides are negative where boxes lie apart.
    top_left = torch.maximum(rows[..., :2], columns[..., :2])
    bottom_right = torch.minimum(rows[..., 2:], columns[..., 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    widths, heights = sides.unbind(-1)
    intersection = widths * heights

    # The sum of both areas has the intersection twice.
    area_sums = areas(rows) + areas(columns)
    union = area_sums - intersection
    return intersection / union.clamp(min=_LEAST_UNION)


def areas(boxes: _Boxes) -> Float[Tensor, "*b"]:
    """Returns the area of each box in square pixels."""
    sides = boxes[..., 2:] - boxes[..., :2]
    widths, heights = sides.unbind(-1)
    return widths * heights


def encode(
    references: _Boxes,
    boxes: _Boxes,
    stds: Sequence[float],
) -> _Boxes:
    """Returns the offsets that lead from each reference box to its box.

    They are the distances of the centers in sides of the reference, and the logarithms of the
    ratios of sides, divided by `stds` (Girshick et al. 2014, appendix C).
    """
    reference_centers, reference_sides = _centers_and_sides(references)
    centers, sides = _centers_and_sides(boxes)

    # Measured in sides of the reference, offsets of small and of large boxes are alike.
    distances = centers - reference_centers
    shifts = distances / reference_sides
    log_ratios = torch.log(sides / reference_sides)

    # Division by typical values brings the losses of all four offsets to one scale.
    shift_stds, log_stds = _scales(stds, shifts)
    scaled_shifts = shifts / shift_stds
    scaled_ratios = log_ratios / log_stds
    return torch.cat([scaled_shifts, scaled_ratios], dim=-1)


def decode(
    references: _Boxes,
    offsets: _Boxes,
    stds: Sequence[float],
) -> _Boxes:
    """Returns the boxes to which the offsets lead: the inverse of `encode`.

    Ratios of sides are limited to between 16/1000 and 1000/16.
    """
    reference_centers, reference_sides = _centers_and_sides(references)
    offsets = offsets.float()
    shift_stds, log_stds = _scales(stds, offsets)
    shifts = offsets[..., :2] * shift_stds
    log_ratios = offsets[..., 2:] * log_stds

    # The exponential of what an untrained network says may be infinite (mmdetection's
    # wh_ratio_clip).
    log_ratios = log_ratios.clamp(-_LOG_SIDE_LIMIT, _LOG_SIDE_LIMIT)
    sides = reference_sides * log_ratios.exp()
    half_sides = sides / 2

    distances = shifts * reference_sides
    centers = reference_centers + distances
    top_left = centers - half_sides
    bottom_right = centers + half_sides
    return torch.cat([top_left, bottom_right], dim=-1)


def clip(
    boxes: _Boxes,
    sizes: Shaped[Tensor, "*#b 2"],
) -> _Boxes:
    """Returns the parts of boxes that lie inside of their images of height and width `sizes`."""
    # Coordinates are x, y, x, y, and sizes are height, width.
    lower_right = sizes.flip(-1).to(boxes.dtype)
    limits = torch.cat([lower_right, lower_right], dim=-1)
    at_least_zero = boxes.clamp(min=0)
    return torch.minimum(at_least_zero, limits)


def _centers_and_sides(boxes: _Boxes) -> tuple[_Pairs, _Pairs]:
    """Returns x and y of the boxes' centers, and their widths and heights, in float32."""
    boxes = boxes.float()
    top_left = boxes[..., :2]
    bottom_right = boxes[..., 2:]
    corner_sums = top_left + bottom_right
    centers = corner_sums / 2
    sides = bottom_right - top_left
    return centers, sides.clamp(min=_LEAST_SIDE)


def _scales(stds: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the standard deviations of shifts and those of logarithms."""
    scales = on_device(stds, like)
    shift_stds = scales[:2]
    log_stds = scales[2:]
    return shift_stds, log_stds
