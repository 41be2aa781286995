"""Which classes of objects a detector takes for which."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import box_iou

from relloc.transfer.metrics.voc_ap import VocImage


def box_confusion(
    images: Sequence[VocImage],
    *,
    n_classes: int,
    iou: float = 0.5,
    least_score: float = 0.3,
) -> Int[Tensor, "classes_and_none classes_and_none"]:
    """Returns the numbers of objects by true class (row) and found class (column).

    The last row counts detections that overlap no true box, the last column true boxes that no
    detection found. Classes play no part in the matching: in the order of falling scores, each
    detection takes the box that it overlaps most of those that are left. Boxes that are difficult
    are counted only where they are taken.

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
        overlaps = _overlaps(found_boxes, image.true_boxes)
        taken_by = _match(overlaps, iou)

        # True boxes that a detection takes.
        is_taken = taken_by >= 0
        takers = taken_by[is_taken]
        rows.append(image.true_classes[is_taken])
        columns.append(found_classes[takers])

        # True boxes that none takes. Nothing has to find difficult ones.
        is_missed = ~is_taken & ~image.difficult
        missed = image.true_classes[is_missed]
        rows.append(missed)
        columns.append(np.full(len(missed), none))

        # Detections that take no box.
        without_box = np.delete(found_classes, takers)
        rows.append(np.full(len(without_box), none))
        columns.append(without_box)

    # Each pair of classes has one bin, row after row.
    row_of_each = np.concatenate(rows)
    column_of_each = np.concatenate(columns)
    cells = row_of_each * n_rows + column_of_each
    counts = np.bincount(cells, minlength=n_rows**2)
    table = counts.reshape(n_rows, n_rows)
    return torch.from_numpy(table)


def _overlaps(
    found: Float[np.ndarray, "found 4"],
    true: Float[np.ndarray, "true 4"],
) -> Float[np.ndarray, "found true"]:
    """Returns the IoU of each found box with each true one, in 64 bits."""
    found_boxes = torch.from_numpy(found).double()
    true_boxes = torch.from_numpy(true).double()
    return box_iou(found_boxes, true_boxes).numpy()


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
