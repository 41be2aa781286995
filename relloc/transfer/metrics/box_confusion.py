"""Which classes of objects a detector takes for which."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import box_iou

from relloc.transfer.metrics.class_confusion import save_class_confusion
from relloc.transfer.metrics.voc_ap import VocImage

# Which detections are shown: those with this score. And which find an object: those with this IoU.
LEAST_SCORE = 0.3
LEAST_IOU = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BoxesOfImage:
    """The boxes of one image: `found` objects and `true` objects, as x1 y1 x2 y2 in pixels.

    Nothing has to find true objects that are `difficult`. A `crowd` is a region with many objects
    of its class: what is found there is neither right nor wrong.
    """

    found_boxes: Float[np.ndarray, "found 4"]
    found_scores: Float[np.ndarray, "found"]
    found_classes: Int[np.ndarray, "found"]
    true_boxes: Float[np.ndarray, "true 4"]
    true_classes: Int[np.ndarray, "true"]
    difficult: Bool[np.ndarray, "true"]
    crowd: Bool[np.ndarray, "true"]


def boxes_of_voc(image: VocImage) -> BoxesOfImage:
    """Returns the boxes of an image of VOC, which knows no crowds."""
    return BoxesOfImage(
        found_boxes=image.found_boxes,
        found_scores=image.found_scores,
        found_classes=image.found_classes,
        true_boxes=image.true_boxes,
        true_classes=image.true_classes,
        difficult=image.difficult,
        crowd=np.zeros(len(image.true_classes), dtype=bool),
    )


def box_confusion(
    images: Iterable[BoxesOfImage],
    *,
    n_classes: int,
    iou: float = LEAST_IOU,
    least_score: float = LEAST_SCORE,
) -> Int[Tensor, "classes_and_none classes_and_none"]:
    """Returns the numbers of objects by true class (row) and found class (column).

    The last row counts detections that overlap no true box, the last column true boxes that no
    detection found. Classes play no part in the matching: in the order of falling scores, each
    detection takes the box that it overlaps most of those that are left. Boxes that are difficult
    are counted only where they are taken. Crowds are no boxes, and a detection that takes no box
    is left out where a crowd of its class covers it.

    Args:
        images: the images to count in.
        n_classes: number of classes.
        iou: the least overlap with a box to take it.
        least_score: detections with a lower score are left out.
    """
    n_rows = n_classes + 1
    none = n_classes
    # True and found class of each object, with `none` for what has only one of them. They begin
    # empty, so that there is something to join where no image is given.
    rows = [np.zeros(0, dtype=np.int64)]
    columns = [np.zeros(0, dtype=np.int64)]
    for image in images:
        # The surest detections choose their boxes first.
        by_score = np.argsort(-image.found_scores, kind="stable")
        is_shown = image.found_scores[by_score] >= least_score
        shown = by_score[is_shown]
        found_classes = image.found_classes[shown]
        found_boxes = image.found_boxes[shown]
        is_one_object = ~image.crowd
        true_classes = image.true_classes[is_one_object]
        overlaps = _overlaps(found_boxes, image.true_boxes[is_one_object])
        taken_by = _match(overlaps, iou)

        # True boxes that a detection takes.
        is_taken = taken_by >= 0
        takers = taken_by[is_taken]
        rows.append(true_classes[is_taken])
        columns.append(found_classes[takers])

        # True boxes that none takes. Nothing has to find difficult ones.
        is_missed = ~is_taken & ~image.difficult[is_one_object]
        missed = true_classes[is_missed]
        rows.append(missed)
        columns.append(np.full(len(missed), none))

        # Detections that take no box.
        is_alone = ~_lie_in_crowds(found_boxes, found_classes, image, iou)
        is_alone[takers] = False
        without_box = found_classes[is_alone]
        rows.append(np.full(len(without_box), none))
        columns.append(without_box)

    # Each pair of classes has one bin, row after row.
    row_of_each = np.concatenate(rows)
    column_of_each = np.concatenate(columns)
    cells = row_of_each * n_rows + column_of_each
    counts = np.bincount(cells, minlength=n_rows**2)
    table = counts.reshape(n_rows, n_rows)
    return torch.from_numpy(table)


def save_box_confusion(
    images: Iterable[BoxesOfImage],
    class_names: Sequence[str],
    folder: Path,
    *,
    name: str,
) -> None:
    """Saves which classes of objects are taken for which, as `save_class_confusion` does.

    Args:
        images: the images to count in.
        class_names: names by class.
        folder: where the files are saved.
        name: what the images are called, such as "voc2007 test".
    """
    save_class_confusion(
        box_confusion(images, n_classes=len(class_names)),
        class_names,
        folder,
        title=f"objects of {name} (score {LEAST_SCORE:g} or more, IoU {LEAST_IOU:g} or more)",
    )


def _overlaps(
    found: Float[np.ndarray, "found 4"],
    true: Float[np.ndarray, "true 4"],
) -> Float[np.ndarray, "found true"]:
    """Returns the IoU of each found box with each true one, in 64 bits."""
    found_boxes = torch.from_numpy(found).double()
    true_boxes = torch.from_numpy(true).double()
    return box_iou(found_boxes, true_boxes).numpy()


def _lie_in_crowds(
    found_boxes: Float[np.ndarray, "found 4"],
    found_classes: Int[np.ndarray, "found"],
    image: BoxesOfImage,
    share: float,
) -> Bool[np.ndarray, "found"]:
    """Returns of each found box whether a crowd of its class covers at least this share of it.

    This is how COCO's evaluation compares with crowds, since a box in a large one has a small IoU.
    """
    crowd_boxes = image.true_boxes[image.crowd]
    crowd_classes = image.true_classes[image.crowd]
    upper_left = np.maximum(found_boxes[:, None, :2], crowd_boxes[None, :, :2])
    lower_right = np.minimum(found_boxes[:, None, 2:], crowd_boxes[None, :, 2:])
    covered_sides = np.clip(lower_right - upper_left, 0, None)
    covered_areas = covered_sides.prod(axis=2)
    sides = np.clip(found_boxes[:, 2:] - found_boxes[:, :2], 0, None)
    areas = sides.prod(axis=1)
    # Multiplied, as a box that a network shrank to nothing has no share.
    is_covered = (covered_areas > 0) & (covered_areas >= share * areas[:, None])
    is_of_class = found_classes[:, None] == crowd_classes[None, :]
    return (is_covered & is_of_class).any(axis=1)


def _match(overlaps: Float[np.ndarray, "found true"], iou: float) -> Int[np.ndarray, "true"]:
    """Returns the number of the detection that takes each true box, or -1 for none."""
    n_true = overlaps.shape[1]
    taken_by = np.full(n_true, -1)
    for number, of_found in enumerate(overlaps):
        # Boxes that an earlier detection has taken are out of reach.
        is_free = taken_by < 0
        of_free = np.where(is_free, of_found, 0)
        best_overlap = of_free.max(initial=0)
        if best_overlap >= iou:
            best = of_free.argmax()
            taken_by[best] = number
    return taken_by
