"""The published algorithms of detection written out in plain loops, in float64, as oracles."""

import math
from collections.abc import Sequence

import numpy as np

Box = Sequence[float]
BACKGROUND, IGNORED = -1, -2


def overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    union = -intersection
    for box in (one, other):
        union += (box[2] - box[0]) * (box[3] - box[1])
    return intersection / union


def overlap_table(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    table = np.zeros((len(boxes), len(others)))
    for row, box in enumerate(boxes):
        for column, other in enumerate(others):
            table[row, column] = overlap(box, other)
    return table


def encode(reference: Box, box: Box, stds: Sequence[float]) -> list[float]:
    offsets = []
    for axis in (0, 1):
        reference_side = reference[axis + 2] - reference[axis]
        shift = (box[axis] + box[axis + 2] - reference[axis] - reference[axis + 2]) / 2
        offsets.append(shift / reference_side / stds[axis])
    for axis in (0, 1):
        ratio = (box[axis + 2] - box[axis]) / (reference[axis + 2] - reference[axis])
        offsets.append(math.log(ratio) / stds[axis + 2])
    return offsets


def decode(reference: Box, offsets: Sequence[float], stds: Sequence[float]) -> list[float]:
    limit = math.log(1000 / 16)
    low, high = [], []
    for axis in (0, 1):
        side = reference[axis + 2] - reference[axis]
        center = (reference[axis] + reference[axis + 2]) / 2 + offsets[axis] * stds[axis] * side
        exponent = min(max(offsets[axis + 2] * stds[axis + 2], -limit), limit)
        low.append(center - side * math.exp(exponent) / 2)
        high.append(center + side * math.exp(exponent) / 2)
    return [*low, *high]


def clip(box: Box, size: tuple[int, int]) -> list[float]:
    height, width = size
    limits = (width, height, width, height)
    return [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]


def anchors(
    rows: int, columns: int, stride: int, sizes: Sequence[float], ratios: Sequence[float]
) -> list[list[float]]:
    boxes = []
    for row in range(rows):
        for column in range(columns):
            for ratio in ratios:
                for size in sizes:
                    height = size * ratio**0.5
                    width = size / ratio**0.5
                    x, y = column * stride, row * stride
                    boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return boxes


def assign(
    table: np.ndarray, positive: float, negative: float, low_quality: float | None
) -> list[int]:
    """As mmdetection's MaxIoUAssigner does it: the boxes one after the other for low quality."""
    n_boxes, n_anchors = table.shape
    assigned = [IGNORED] * n_anchors
    for anchor in range(n_anchors):
        best = max((table[box, anchor] for box in range(n_boxes)), default=0)
        if best < negative:
            assigned[anchor] = BACKGROUND
        elif best >= positive:
            assigned[anchor] = table[:, anchor].tolist().index(best)
    if low_quality is not None and n_anchors:
        for box in range(n_boxes):
            best = max(table[box])
            for anchor in range(n_anchors):
                if best >= low_quality and table[box, anchor] == best:
                    assigned[anchor] = box
    return assigned


def suppress(boxes: Sequence[Box], scores: Sequence[float], limit: float) -> list[int]:
    """Returns the places of the boxes that non-maximum suppression keeps, best first."""
    kept: list[int] = []
    for place in np.argsort(-np.asarray(scores), kind="stable").tolist():
        if all(overlap(boxes[place], boxes[other]) <= limit for other in kept):
            kept.append(place)
    return kept


def roi_align(features: np.ndarray, box: Box, side: int, stride: int) -> np.ndarray:
    """RoIAlign, aligned, with ceil(side of a bin in cells) sample points in each direction."""
    channels, rows, columns = features.shape
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box)
    width, height = (x2 - x1) / side, (y2 - y1) / side
    points_x, points_y = math.ceil(width), math.ceil(height)
    result = np.zeros((channels, side, side))
    for bin_row in range(side):
        for bin_column in range(side):
            for point_row in range(points_y):
                for point_column in range(points_x):
                    y = y1 + (bin_row + (point_row + 0.5) / points_y) * height
                    x = x1 + (bin_column + (point_column + 0.5) / points_x) * width
                    if y < -1 or y > rows or x < -1 or x > columns:
                        continue
                    value = _bilinear(
                        features, min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
                    )
                    result[:, bin_row, bin_column] += value / (points_x * points_y)
    return result


def _bilinear(features: np.ndarray, y: float, x: float) -> np.ndarray:
    top, left = int(y), int(x)
    bottom = min(top + 1, features.shape[1] - 1)
    right = min(left + 1, features.shape[2] - 1)
    down, across = y - top, x - left
    upper = features[:, top, left] * (1 - across) + features[:, top, right] * across
    lower = features[:, bottom, left] * (1 - across) + features[:, bottom, right] * across
    return upper * (1 - down) + lower * down
