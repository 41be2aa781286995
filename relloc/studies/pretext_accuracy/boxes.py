"""Finds which pairs of patches lie inside an annotated object, and which touch none."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from relloc.data.annotations import ObjectImages, Objects
from relloc.studies.asking import PairBoxes

# Boxes are compared in pixels of the stored image, where corners of resized ones are rounded.
_ROUNDING_PX = 1e-6
_Boxes = Float64[np.ndarray, "objects 4"]  # x1 y1 x2 y2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PairPlaces:
    """Where pairs lie: the box around both patches, compared with the boxes of objects.

    Attributes:
        inside: within the box of an object that counts.
        outside: overlapping with no box of any object.
        of_class: within the box of an object of that class that counts.
    """

    inside: Bool[np.ndarray, "n 8"]
    outside: Bool[np.ndarray, "n 8"]
    of_class: Bool[np.ndarray, "n 8 classes"]

    @property
    def across(self) -> Bool[np.ndarray, "n 8"]:
        """Neither inside nor outside, such as pairs that cross the border of an object."""
        return ~(self.inside | self.outside)


def places_of_pairs(
    images: ObjectImages,
    indices: Int64[np.ndarray, "n"],
    pair_boxes: PairBoxes,
    patch_sides: Float64[np.ndarray, "n 2"],
    *,
    least_patches: float,
) -> PairPlaces:
    """Returns where pairs lie.

    An object counts if it is neither difficult nor a crowd nor, where the annotation says so,
    occluded, and both sides of its box are at least `least_patches` sides of a patch.

    Args:
        images: the images with their objects.
        indices: the number of the image of each grid.
        pair_boxes: the box around both patches of each pair.
        patch_sides: height and width of a patch in each grid.
        least_patches: the least side of a box.
    """
    n = len(indices)
    inside = np.zeros((n, 8), dtype=bool)
    outside = np.zeros((n, 8), dtype=bool)
    of_class = np.zeros((n, 8, len(images.classes)), dtype=bool)
    # Grids of an image follow one another, so that its objects are looked up once.
    last_index = -1
    objects = None
    for grid, index in enumerate(indices.tolist()):
        if objects is None or index != last_index:
            objects = images.objects(index)
            last_index = index
        boxes = np.concatenate([objects.xywh[:, :2], _ends(objects)], axis=1)
        counts = _counting(objects, least_patches * patch_sides[grid])
        is_within = np.logical_and(_within(pair_boxes[grid], boxes), counts)
        inside[grid] = is_within.any(axis=1)
        outside[grid] = ~_overlaps(pair_boxes[grid], boxes).any(axis=1)
        for number, label in enumerate(objects.classes.tolist()):
            of_class[grid, :, label] |= is_within[:, number]
    return PairPlaces(inside=inside, outside=outside, of_class=of_class)


def _ends(objects: Objects) -> Float64[np.ndarray, "objects 2"]:
    return objects.xywh[:, :2] + objects.xywh[:, 2:]


def _counting(
    objects: Objects, least_sides: Float64[np.ndarray, "2"]
) -> Bool[np.ndarray, "objects"]:
    """Returns which objects count; `least_sides` are height and width."""
    least_height, least_width = least_sides
    widths, heights = objects.xywh[:, 2:].T
    is_high = heights >= least_height - _ROUNDING_PX
    is_wide = widths >= least_width - _ROUNDING_PX
    left_out = objects.difficult | objects.crowd
    if objects.occluded is not None:
        left_out = left_out | objects.occluded
    return is_high & is_wide & ~left_out


def _within(pairs: Float64[np.ndarray, "8 4"], boxes: _Boxes) -> Bool[np.ndarray, "8 objects"]:
    starts = pairs[:, None, :2] >= boxes[:, :2] - _ROUNDING_PX
    ends = pairs[:, None, 2:] <= boxes[:, 2:] + _ROUNDING_PX
    return np.all(starts & ends, axis=2)


def _overlaps(pairs: Float64[np.ndarray, "8 4"], boxes: _Boxes) -> Bool[np.ndarray, "8 objects"]:
    starts = np.maximum(pairs[:, None, :2], boxes[:, :2])
    ends = np.minimum(pairs[:, None, 2:], boxes[:, 2:])
    return np.all(ends - starts > _ROUNDING_PX, axis=2)


def classes_with_pairs(places: PairPlaces, classes: Sequence[str]) -> list[tuple[int, str]]:
    """Returns numbers and names of the classes that some pair lies inside an object of."""
    has_pairs = np.any(places.of_class, axis=(0, 1))
    return [(number, name) for number, name in enumerate(classes) if has_pairs[number]]
