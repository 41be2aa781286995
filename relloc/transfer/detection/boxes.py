"""Geometry of boxes x1, y1, x2, y2 in continuous pixel coordinates: a width is x2 - x1.

Everything is computed in float32: bfloat16 knows coordinates of 500 px to within 2 px only.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from relloc.transfer.detection.batch import on_device

# Standard deviations by which offsets are divided, as in mmdetection 2.28.2.
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)
# A decoded side is at most 1000/16 times that of the reference box, and at least 16/1000 times.
_LOG_SIDE_LIMIT = math.log(1000 / 16)
# An area in square pixels, and a side in pixels, so small that no real box has it: with them no
# division by zero and no logarithm of zero can occur.
_LEAST_UNION = 1e-6
_LEAST_SIDE = 1e-6


def overlaps(
    boxes: Float[Tensor, "*b n 4"],
    others: Float[Tensor, "*b m 4"],
) -> Float[Tensor, "*b n m"]:
    """Returns the intersection over union of each box with each other box.

    Two boxes without area have an overlap of 0, also if they are equal.
    """
    boxes, others = boxes.float(), others.float()
    top_left = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    bottom_right = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    area_sums = areas(boxes).unsqueeze(-1) + areas(others).unsqueeze(-2)
    union = area_sums - intersection
    return intersection / union.clamp(min=_LEAST_UNION)


def areas(boxes: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b"]:
    """Returns the area of each box in square pixels."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]


def encode(
    references: Float[Tensor, "*b 4"],
    boxes: Float[Tensor, "*b 4"],
    stds: Sequence[float],
) -> Float[Tensor, "*b 4"]:
    """Returns the offsets that lead from each reference box to its box.

    They are the distances of the centers in sides of the reference, and the logarithms of the
    ratios of sides, divided by `stds` (Girshick et al. 2014, appendix C).
    """
    reference_centers, reference_sides = _centers_and_sides(references)
    centers, sides = _centers_and_sides(boxes)
    shifts = (centers - reference_centers) / reference_sides
    log_ratios = torch.log(sides / reference_sides)
    shift_stds, log_stds = _scales(stds, shifts)
    return torch.cat([shifts / shift_stds, log_ratios / log_stds], dim=-1)


def decode(
    references: Float[Tensor, "*b 4"],
    offsets: Float[Tensor, "*b 4"],
    stds: Sequence[float],
) -> Float[Tensor, "*b 4"]:
    """Returns the boxes to which the offsets lead: the inverse of `encode`.

    Ratios of sides are limited to between 16/1000 and 1000/16.
    """
    reference_centers, reference_sides = _centers_and_sides(references)
    offsets = offsets.float()
    shift_stds, log_stds = _scales(stds, offsets[..., :2])
    shifts = offsets[..., :2] * shift_stds
    log_ratios = offsets[..., 2:] * log_stds
    log_ratios = log_ratios.clamp(-_LOG_SIDE_LIMIT, _LOG_SIDE_LIMIT)
    centers = reference_centers + shifts * reference_sides
    half_sides = reference_sides * log_ratios.exp() / 2
    return torch.cat([centers - half_sides, centers + half_sides], dim=-1)


def clip(
    boxes: Float[Tensor, "*b 4"],
    sizes: Shaped[Tensor, "*#b 2"],
) -> Float[Tensor, "*b 4"]:
    """Returns the parts of boxes that lie inside of their images of height and width `sizes`."""
    # Coordinates are x, y, x, y, and sizes are height, width.
    widths_and_heights = sizes.flip(-1).to(boxes.dtype)
    limits = torch.cat([widths_and_heights, widths_and_heights], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limits)


def _centers_and_sides(
    boxes: Float[Tensor, "*b 4"],
) -> tuple[Float[Tensor, "*b 2"], Float[Tensor, "*b 2"]]:
    boxes = boxes.float()
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    centers = (top_left + bottom_right) / 2
    sides = (bottom_right - top_left).clamp(min=_LEAST_SIDE)
    return centers, sides


def _scales(stds: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the standard deviations of shifts and those of logarithms."""
    scales = on_device(stds, like)
    return scales[:2], scales[2:]
