"""Average precision of detections, by the definitions of PASCAL VOC that published rows use.

They agree in the rule of matching. Detections of a class are sorted by falling score over all
images. Each one takes the true box of its image and class that it overlaps most, and no other: if
that overlap (IoU, intersection over union) is too low, or an earlier detection has taken the box,
the detection is wrong. If the box is difficult, it counts neither way, nor is the box looked for.

Detections with equal scores keep the order of images, and within an image their own, so that no
result depends on the number of processes. The references leave this to an unstable sort.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from relloc.data.annotations import Objects
from relloc.transfer.detections import Detections

# Recalls at which the definition of 2007 reads the precision. As in the references they are
# floats of 64 bits, of which three are a little above their decimal: a recall of exactly 3/10
# does not reach the fourth of them.
_RECALL_POINTS = np.arange(0, 1.001, 0.1)
# Corners x1 y1 x2 y2, in pixels.
_Boxes = Float[np.ndarray, "n 4"]
# One value for each of several boxes: a number, and whether something holds.
_Floats = Float[np.ndarray, "n"]
_Indices = Int[np.ndarray, "n"]
_Mask = Bool[np.ndarray, "n"]
_DTYPES = {"mmdet": np.dtype(np.float32), "detectron2": np.dtype(np.float64)}
_LEAST_UNION = 1e-6  # mmdet's, against a division by zero
# The rounding of the files through which detectron2 evaluates.
_SCORE_DECIMALS = 3
_BOX_DECIMALS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """One definition of average precision.

    Args:
        points: "11" is the mean of the highest precisions at recalls from 0, .1, … to 1 or more,
            the definition of 2007. "area" is the area under the curve after precision is made
            monotone, the one since 2010.
        plus_one: whether x2 and y2 are the last pixels of a box, so that widths are x2 − x1 + 1.
        reference: the code whose details decide. "mmdet" (2.28.2: mean_ap.py, bbox_overlaps.py)
            computes in 32 bits, asks for an IoU of at least the threshold, and of two true boxes
            with the same IoU prefers the one that is not difficult. "detectron2"
            (pascal_voc_evaluation.py) computes in 64 bits, asks for an IoU above the threshold,
            takes the first of such boxes, and rounds scores to 3 decimals and boxes to 1.
    """

    points: Literal["11", "area"]
    plus_one: bool
    reference: Literal["mmdet", "detectron2"]


# The AP50 of mmselfsup's row. True boxes are the annotation minus 1 on all four.
MMDET = Definition(points="11", plus_one=True, reference="mmdet")
# The same by area, as mmdet computes it for VOC2012 (voc.py, use_legacy_coordinate).
MMDET_AREA = Definition(points="area", plus_one=True, reference="mmdet")
# AP, AP50 and AP75 of MoCo's row. True boxes are the annotation minus 1 on xmin and ymin only.
# detectron2 adds these again before it computes widths with + 1, so none is added here.
DETECTRON2 = Definition(points="11", plus_one=False, reference="detectron2")
# The thresholds of which AP is the mean; the loop is detectron2's, so that the floats are equal.
AP_IOUS = tuple(percent / 100 for percent in range(50, 100, 5))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VocImage:
    """What average precision needs of one image: `found` objects and `true` objects."""

    found_boxes: Float[np.ndarray, "found 4"]
    found_scores: Float[np.ndarray, "found"]
    found_classes: Int[np.ndarray, "found"]
    true_boxes: Float[np.ndarray, "true 4"]
    true_classes: Int[np.ndarray, "true"]
    difficult: Bool[np.ndarray, "true"]


def voc_image(detected: Detections, truth: Objects) -> VocImage:
    """Returns what average precision needs of an image, on the CPU."""
    return VocImage(
        found_boxes=detected.boxes.float().cpu().numpy(),
        found_scores=detected.scores.float().cpu().numpy(),
        found_classes=detected.classes.cpu().numpy(),
        true_boxes=truth.boxes,
        true_classes=truth.classes,
        difficult=truth.difficult,
    )


def average_precision(
    images: Sequence[VocImage],
    *,
    n_classes: int,
    definition: Definition,
    ious: Sequence[float] = (0.5,),
) -> Float[np.ndarray, "ious classes"]:
    """Returns the average precision of each class at each IoU threshold, from 0 to 1.

    It is nan for a class without true boxes that are not difficult.

    Args:
        images: all images of the split, in its order, also those without objects.
        n_classes: number of classes.
        definition: MMDET, MMDET_AREA, DETECTRON2 or another one.
        ious: thresholds from which on a detection is right.

    Raises:
        ValueError: a score is nan, as those of a network that diverged.
    """
    found = _found_by_image(images, definition)
    true = _true_by_image(images, definition)
    dtype = _DTYPES[definition.reference]
    shape = (len(ious), n_classes)
    result = np.full(shape, np.nan, dtype=dtype)
    summarize = _at_points if definition.points == "11" else _area
    for class_number in range(n_classes):
        true_rows = np.flatnonzero(true.classes == class_number)
        true_of_class = _select(true, true_rows)
        is_difficult = true_of_class.difficult
        n_to_find = int((~is_difficult).sum())
        # Recall has no value where nothing is to be found.
        if n_to_find == 0:
            continue
        # By falling score; stable, so that equal scores keep the order of images.
        found_rows = np.flatnonzero(found.classes == class_number)
        by_score = np.argsort(-found.scores[found_rows], kind="stable")
        found_of_class = _select(found, found_rows[by_score])

        # Which true box a detection may take does not depend on the threshold.
        overlaps, nearest = _nearest_true_boxes(found_of_class, true_of_class, definition)
        for row, iou in enumerate(ious):
            is_near = overlaps >= iou
            if definition.reference == "detectron2":
                is_near = overlaps > iou
            right, wrong = _judge(is_near, nearest, is_difficult)
            recall, precision = _curve(right, wrong, n_to_find, dtype)
            result[row, class_number] = summarize(recall, precision)
    return result


def mean_ap(by_class: Float[np.ndarray, "classes"]) -> float:
    """Returns the mean over the classes that have true boxes, or 0 if none has.

    What mmdet prints is this number rounded to 3 decimals (`printed_ap`).
    """
    is_measured = ~np.isnan(by_class)
    measured = by_class[is_measured]
    if len(measured) == 0:
        return 0.0
    return measured.mean().item()


def printed_ap(mean: float) -> float:
    """Returns a mean average precision as mmdet prints it: a share rounded to 3 decimals."""
    return round(mean, 3)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """Found objects of several images."""

    images: _Indices
    classes: _Indices
    boxes: _Boxes
    scores: _Floats


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _True:
    """True objects of several images, in the order of images."""

    images: _Indices
    classes: _Indices
    boxes: _Boxes
    difficult: _Mask


_Objects = TypeVar("_Objects", _Found, _True)


def _select(objects: _Objects, indices: Int[np.ndarray, "m"]) -> _Objects:
    """Returns the objects with the given indices, in their order."""
    selected = {}
    for field in dataclasses.fields(objects):
        values = getattr(objects, field.name)
        selected[field.name] = values.take(indices, axis=0)
    return dataclasses.replace(objects, **selected)


def _found_by_image(images: Sequence[VocImage], definition: Definition) -> _Found:
    """Returns the found objects of all images, in the numbers that the reference computes with."""
    dtype = _DTYPES[definition.reference]
    boxes_by_image = [image.found_boxes for image in images]
    scores_by_image = [image.found_scores for image in images]
    classes_by_image = [image.found_classes for image in images]
    counts = [len(boxes) for boxes in boxes_by_image]

    boxes = _joined(boxes_by_image, dtype).reshape(-1, 4)
    scores = _joined(scores_by_image, dtype)
    # numpy sorts nan last, like a low score, so that the result would look plausible.
    is_nan = np.isnan(scores)
    if is_nan.any():
        n_nan = int(is_nan.sum())
        raise ValueError(f"{n_nan} of {len(scores)} detections have nan as their score")
    if definition.reference == "detectron2":
        scores = scores.round(_SCORE_DECIMALS)
        boxes = boxes.round(_BOX_DECIMALS)
    return _Found(
        images=_image_numbers(counts),
        classes=_joined(classes_by_image, np.dtype(np.int64)),
        boxes=boxes,
        scores=scores,
    )


def _true_by_image(images: Sequence[VocImage], definition: Definition) -> _True:
    """Returns the true objects of all images, in the order in which the reference meets them."""
    dtype = _DTYPES[definition.reference]
    boxes_by_image = [image.true_boxes for image in images]
    classes_by_image = [image.true_classes for image in images]
    difficult_by_image = [image.difficult for image in images]
    counts = [len(boxes) for boxes in boxes_by_image]
    true = _True(
        images=_image_numbers(counts),
        classes=_joined(classes_by_image, np.dtype(np.int64)),
        boxes=_joined(boxes_by_image, dtype).reshape(-1, 4),
        difficult=_joined(difficult_by_image, np.dtype(bool)),
    )
    if definition.reference == "detectron2":
        return true
    # The difficult boxes of each image last, so that the others win where overlaps are equal.
    difficult_last = np.lexsort((true.difficult, true.images))
    return _select(true, difficult_last)


def _joined(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Returns arrays of images as one of the given type, flat, also where there is no image."""
    flat = [np.zeros(0, dtype=dtype)]
    for part in parts:
        values = part.reshape(-1)
        flat.append(values.astype(dtype))
    return np.concatenate(flat)


def _image_numbers(counts: list[int]) -> _Indices:
    """Returns for each object the number of its image; `counts` says how many each image has."""
    numbers = np.arange(len(counts))
    return np.repeat(numbers, counts)


def _nearest_true_boxes(
    found: _Found,
    true: _True,
    definition: Definition,
) -> tuple[_Floats, _Indices]:
    """Returns for each found box its largest IoU with a true box of its image, and which that is.

    Both are of one class. The first one counts where several true boxes have the largest IoU. In an
    image without true boxes the IoU is -1, and the number of the box means nothing.
    """
    n_found = len(found.boxes)
    overlaps = np.full(n_found, -1, dtype=found.boxes.dtype)
    nearest = np.zeros(n_found, dtype=np.int64)
    # The true boxes of an image follow one another: from `first` on there are `count`.
    last_found = found.images.max(initial=0)
    last_true = true.images.max(initial=0)
    last_image = max(last_found, last_true)
    count_in_image = np.bincount(true.images, minlength=last_image + 1)
    first_in_image = np.cumsum(count_in_image) - count_in_image
    count_of_found = count_in_image[found.images]
    with_true_boxes = np.flatnonzero(count_of_found)
    if len(with_true_boxes) == 0:
        return overlaps, nearest
    images = found.images[with_true_boxes]
    first = first_in_image[images]
    count = count_in_image[images]

    # All pairs of a found and a true box of the same image, one after another by found box. The
    # running number of a pair, less that of its found box's first pair, counts the true boxes.
    pair_starts = np.cumsum(count) - count
    pairs = np.arange(count.sum())
    number_in_image = pairs - np.repeat(pair_starts, count)
    true_of_pair = np.repeat(first, count) + number_in_image
    found_of_pair = np.repeat(with_true_boxes, count)
    found_boxes = found.boxes[found_of_pair]
    true_boxes = true.boxes[true_of_pair]
    of_pairs = _iou(found_boxes, true_boxes, definition)

    # The largest IoU of each found box, over its own pairs.
    largest = np.maximum.reduceat(of_pairs, pair_starts)
    # Of the pairs with the largest IoU the one with the smallest number: the first true box.
    is_largest = of_pairs == np.repeat(largest, count)
    candidates = np.where(is_largest, true_of_pair, len(true.boxes))
    overlaps[with_true_boxes] = largest
    nearest[with_true_boxes] = np.minimum.reduceat(candidates, pair_starts)
    return overlaps, nearest


def _iou(first: _Boxes, second: _Boxes, definition: Definition) -> _Floats:
    """Returns the IoU of each box of `first` with the box of `second` in the same row."""
    # In the type of the boxes, as 64 bits would round otherwise than the reference.
    to_dtype = first.dtype.type
    more = to_dtype(1 if definition.plus_one else 0)
    left1, top1, right1, bottom1 = first.T
    left2, top2, right2, bottom2 = second.T

    # The intersection starts where the later box starts and ends where the earlier one ends.
    left = np.maximum(left1, left2)
    top = np.maximum(top1, top2)
    right = np.minimum(right1, right2)
    bottom = np.minimum(bottom1, bottom2)
    # Sides are negative where boxes lie apart.
    width = np.maximum(right - left + more, 0)
    height = np.maximum(bottom - top + more, 0)
    shared = width * height

    area_sum = _areas(first, more) + _areas(second, more)
    union = area_sum - shared
    least_union = to_dtype(_LEAST_UNION)
    return shared / np.maximum(union, least_union)


def _areas(boxes: _Boxes, more: np.floating) -> _Floats:
    """Returns areas of boxes; `more` is added to each side."""
    left, top, right, bottom = boxes.T
    widths = right - left + more
    heights = bottom - top + more
    return widths * heights


def _judge(
    is_near: _Mask,
    nearest: _Indices,
    is_difficult: Bool[np.ndarray, "m"],
) -> tuple[_Mask, _Mask]:
    """Returns which found boxes are right, and which are wrong; some are neither.

    Args:
        is_near: whether each found box overlaps its nearest true box enough, by falling score.
        nearest: the number of that true box.
        is_difficult: of each true box.
    """
    # Those that are nearest to a difficult box count neither way.
    takes_difficult = np.zeros_like(is_near)
    true_boxes = nearest[is_near]
    takes_difficult[is_near] = is_difficult[true_boxes]

    # Of the found boxes that are nearest to the same true box, the first one takes it.
    candidates = np.flatnonzero(is_near & ~takes_difficult)
    wanted = nearest[candidates]
    _, first_candidates = np.unique(wanted, return_index=True)
    takers = candidates[first_candidates]
    right = np.zeros_like(is_near)
    right[takers] = True
    wrong = ~right & ~takes_difficult
    return right, wrong


def _curve(
    right: _Mask,
    wrong: _Mask,
    n_to_find: int,
    dtype: np.dtype,
) -> tuple[_Floats, _Floats]:
    """Returns recall, in 64 bits, and precision, in the given type, after each found box.

    Precision is already the highest one at this or any higher recall.
    """
    n_right = np.cumsum(right)
    n_judged = n_right + np.cumsum(wrong)
    recall = n_right / n_to_find
    # Before the first box that is judged precision is 0, not 0 / 0.
    n_at_least_one = np.maximum(n_judged, 1)
    precision = n_right.astype(dtype) / n_at_least_one.astype(dtype)
    # The running maximum from the end.
    backwards = precision[::-1]
    highest = np.maximum.accumulate(backwards)
    return recall, highest[::-1]


def _at_points(recall: _Floats, precision: _Floats) -> np.floating:
    """Returns the mean precision at the eleven recalls; it is 0 at one that is not reached."""
    # Added one after the other in the type of the precisions, as the references do: numpy's sum
    # would add in another order.
    to_dtype = precision.dtype.type
    total = to_dtype(0)
    for index in np.searchsorted(recall, _RECALL_POINTS, side="left"):
        if index < len(precision):
            total += precision[index]
    return total / to_dtype(len(_RECALL_POINTS))


def _area(recall: _Floats, precision: _Floats) -> np.floating:
    """Returns the area under the curve, of which the part beyond the last recall is 0."""
    # Only where recall rises is there an area. The last step, to a recall of 1, is of height 0.
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([precision, [0.0]])
    steps = np.diff(recall)
    rises = np.flatnonzero(steps)
    widths = steps[rises]
    heights = precision[rises]
    return np.sum(widths * heights)
