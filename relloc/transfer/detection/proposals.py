"""Proposals: the regions of an image that the region proposal network thinks are objects."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import nms

from relloc.to_device import on_device
from relloc.transfer.detection.anchors import Anchors
from relloc.transfer.detection.boxes import RPN_STDS, clip, decode
from relloc.transfer.resize import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalCounts:
    """How many proposals are kept.

    Attributes:
        before_nms: best anchors of each level of an image that are looked at.
        after_nms: best proposals of an image, of all levels together, that are kept.
        nms_overlap: of two proposals that overlap by more than this the better one is kept.
    """

    before_nms: int
    after_nms: int
    nms_overlap: float = 0.7


# The values of mmdetection 2.28.2 for C4.
C4_TRAINING = ProposalCounts(before_nms=12_000, after_nms=2_000)
C4_TEST = ProposalCounts(before_nms=6_000, after_nms=1_000)


@torch.no_grad()
def propose(
    scores: Float[Tensor, "b a"],
    offsets: Float[Tensor, "b a 4"],
    anchors: Anchors,
    sizes: Sequence[Size],
    counts: ProposalCounts,
) -> list[Float[Tensor, "_ 4"]]:
    """Returns the proposals of each image, best first, clipped to the image of height and width.

    The best anchors are taken of each level, decoded and clipped. Those without width or height are
    dropped, and so are those that are not numbers, with which RoIAlign would read beyond its
    memory. Non-maximum suppression is done within each level.
    """
    # Anchors that the image has only because another one is larger must not be taken.
    own = anchors.of_images(sizes)
    scores = scores.detach().masked_fill(~own, -torch.inf)

    # The best anchors of each level, as large maps would crowd out small ones otherwise.
    top_scores = []
    top_indices = []
    levels = []
    first = 0
    for level, n_anchors in enumerate(anchors.of_levels):
        end = first + n_anchors
        level_scores = scores[:, first:end]
        n_best = min(counts.before_nms, n_anchors)
        best = level_scores.topk(n_best, dim=1)
        top_scores.append(best.values)
        top_indices.append(best.indices + first)
        levels.append(torch.full_like(best.indices, level))
        first = end
    score = torch.cat(top_scores, dim=1)
    anchor = torch.cat(top_indices, dim=1)
    level = torch.cat(levels, dim=1)

    # Only the best anchors are decoded. An index of an anchor holds for its four offsets.
    offset_indices = anchor.unsqueeze(2).expand(-1, -1, 4)
    top_offsets = offsets.detach().gather(1, offset_indices)
    top_anchors = anchors.boxes[anchor]
    boxes = decode(top_anchors, top_offsets, RPN_STDS)
    # One size for all boxes of an image.
    image_sizes = on_device(sizes, boxes).view(len(sizes), 1, 2)
    boxes = clip(boxes, image_sizes)

    sides = boxes[..., 2:] - boxes[..., :2]
    has_area = (sides > 0).all(dim=2)
    # A comparison with nan is false, so nan is not usable either.
    is_usable = has_area & (score > -torch.inf)
    score = score.masked_fill(~is_usable, -torch.inf)
    # In descending order the usable ones come first, so that one number for each image says which
    # they are. To read all numbers at once is the only time that the device is waited for, apart
    # from the suppression itself.
    order = score.argsort(dim=1, descending=True, stable=True)
    n_usable = is_usable.sum(dim=1).tolist()
    proposals = []
    for image, number in enumerate(n_usable):
        indices = order[image, :number]
        image_boxes = boxes[image, indices]
        image_scores = score[image, indices]
        image_levels = level[image, indices].unsqueeze(1)
        # Levels are moved apart, so that boxes of different ones do not overlap. torchvision's
        # batched_nms does the same, but asks the device how far.
        distance = max(sizes[image]) + 1
        moved_boxes = image_boxes + image_levels * distance
        not_suppressed = nms(moved_boxes, image_scores, counts.nms_overlap)
        # They come in the order of falling scores.
        best = not_suppressed[: counts.after_nms]
        proposals.append(image_boxes[best])
    return proposals
