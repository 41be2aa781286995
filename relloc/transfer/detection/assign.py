"""Assignment: which object, if any, an anchor or a region is trained to find."""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

# In the place of an object's number.
BACKGROUND = -1
IGNORED = -2  # neither background nor an object: not trained on
# The overlap to give where a box or an anchor is not to be matched at all.
NO_MATCH = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssignmentRule:
    """Overlaps (intersection over union) that decide.

    Attributes:
        positive: an anchor of this overlap or more with its best box is assigned to it.
        negative: an anchor of less than this overlap with all boxes is background.
        low_quality: the best anchors of each box are assigned to it if they overlap it by this or
            more, also if they are less than `positive`; None for no such rule.
    """

    positive: float
    negative: float
    low_quality: float | None


# The values of mmdetection 2.28.2 for Faster R-CNN.
RPN_RULE = AssignmentRule(positive=0.7, negative=0.3, low_quality=0.3)
ROI_RULE = AssignmentRule(positive=0.5, negative=0.5, low_quality=None)


def assign(
    overlaps: Float[Tensor, "*b n a"],
    rule: AssignmentRule,
) -> Int[Tensor, "*b a"]:
    """Returns for each of `a` anchors the number of its box, BACKGROUND, or IGNORED.

    `overlaps` are those of `n` boxes with the anchors. Rows of boxes that only fill up a batch, and
    columns of anchors that are not used, have to be NO_MATCH. (Such anchors become background.)

    An anchor that overlaps several boxes alike is assigned to the first of them. With the
    low-quality rule a box has all anchors that share its highest overlap. It takes them away from
    the boxes that they overlap more, and a later box takes them from an earlier one.
    """
    *batch_shape, n_boxes, n_anchors = overlaps.shape
    # An image without objects is background everywhere. There is no maximum to take over boxes.
    if not n_boxes:
        return torch.full(
            (*batch_shape, n_anchors),
            BACKGROUND,
            dtype=torch.int64,
            device=overlaps.device,
        )

    # Each anchor by the box that it overlaps most. Between the two limits it is ambiguous, and thus
    # ignored.
    best_overlap, best_box = overlaps.max(dim=-2)
    is_positive = best_overlap >= rule.positive
    is_negative = best_overlap < rule.negative
    assigned = torch.where(is_positive, best_box, IGNORED)
    assigned = assigned.masked_fill(is_negative, BACKGROUND)
    if rule.low_quality is None or not n_anchors:
        return assigned

    # Each box by the anchors that overlap it most, so that an object of an unusual shape is
    # trained too (mmdetection's MaxIoUAssigner with match_low_quality).
    best_of_box = overlaps.amax(dim=-1, keepdim=True)
    is_of_quality = best_of_box >= rule.low_quality
    is_best = (overlaps == best_of_box) & is_of_quality
    # mmdetection goes from box to box, and later ones overwrite earlier ones. The largest number
    # is the last box. Numbers start at 1 here, so that 0 means that the anchor is no box's best.
    numbers = torch.arange(1, n_boxes + 1, device=overlaps.device)
    own_numbers = is_best * numbers.unsqueeze(-1)
    last_number = own_numbers.amax(dim=-2)
    return torch.where(last_number > 0, last_number - 1, assigned)
