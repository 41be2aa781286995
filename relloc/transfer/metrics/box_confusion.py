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
    # True and found class of each object, with `none` for what has only one of them.
    rows, columns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for image in images:
        by_score = np.argsort(-image.found_scores, kind="stable")
        shown = by_score[image.found_scores[by_score] >= least_score]
        found_classes = image.found_classes[shown]
        taken_by = _match(_overlaps(image.found_boxes[shown], image.true_boxes), iou)
        is_taken = taken_by >= 0
        rows.append(image.true_classes[is_taken])
        columns.append(found_classes[taken_by[is_taken]])
        missed = image.true_classes[~is_taken & ~image.difficult]
        rows.append(missed)
        columns.append(np.full(len(missed), none))
        without_box = np.delete(found_classes, taken_by[is_taken])
        rows.append(np.full(len(without_box), none))
        columns.append(without_box)
    cells = np.concatenate(rows) * n_rows + np.concatenate(columns)
    counts = np.bincount(cells, minlength=n_rows**2)
    return torch.from_numpy(counts.reshape(n_rows, n_rows))


def _overlaps(
    found: Float[np.ndarray, "found 4"],
    true: Float[np.ndarray, "true 4"],
) -> Float[np.ndarray, "found true"]:
    return box_iou(torch.from_numpy(found).double(), torch.from_numpy(true).double()).numpy()


def _match(overlaps: Float[np.ndarray, "found true"], iou: float) -> Int[np.ndarray, "true"]:
    """Returns the number of the detection that takes each true box, or -1 for none."""
    taken_by = np.full(overlaps.shape[1], -1)
    for number, of_found in enumerate(overlaps):
        of_free = np.where(taken_by < 0, of_found, 0)
        if of_free.max(initial=0) >= iou:
            taken_by[of_free.argmax()] = number
    return taken_by
