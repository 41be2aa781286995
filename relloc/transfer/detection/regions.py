"""The regions that a detector's heads are trained on: proposals, with the objects themselves."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from relloc.seeds import Use, seed_for
from relloc.transfer.detection.assign import (
    BACKGROUND,
    NO_MATCH,
    ROI_RULE,
    AssignmentRule,
    assign,
)
from relloc.transfer.detection.batch import DetectionBatch, stack_boxes
from relloc.transfer.detection.boxes import overlaps
from relloc.transfer.detection.sampling import choose, priorities

# Ids of proposals start here, and those of objects at 0, so that neither depend on how many objects
# another image has.
_FIRST_ID_OF_PROPOSALS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionTraining:
    """Which regions are trained on. The defaults are those of mmdetection 2.28.2.

    Attributes:
        rule: which regions are assigned to which objects.
        regions_per_image: number of regions that each image is trained on.
        positive_share: largest share of them that are assigned to objects.
    """

    rule: AssignmentRule = ROI_RULE
    regions_per_image: int = 512
    positive_share: float = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """Regions of all images of a batch, and what they are trained to find.

    Attributes:
        boxes: the regions, x1, y1, x2, y2 in pixels of the resized image.
        images: the image of each region, in ascending order.
        objects: number of the object in its image's targets; any number where there is none.
        classes: class of the object; the number of classes, which is background, where there is
            none.
        object_boxes: box of the object; any box where there is none.
        positive: whether there is an object.
    """

    boxes: Float[Tensor, "n 4"]
    images: Int[Tensor, "n"]
    objects: Int[Tensor, "n"]
    classes: Int[Tensor, "n"]
    object_boxes: Float[Tensor, "n 4"]
    positive: Bool[Tensor, "n"]


@torch.no_grad()
def choose_regions(
    proposals: Sequence[Float[Tensor, "_ 4"]],
    batch: DetectionBatch,
    n_classes: int,
    training: RegionTraining,
) -> Regions:
    """Chooses the regions that each image is trained on, of its proposals and its objects' boxes.

    The box of an object is a region that is assigned to that object, as in mmdetection, also if an
    equal box stands before it.
    """
    device = batch.images.device
    own_boxes = [targets.boxes.float() for targets in batch.targets]
    object_boxes, is_object = stack_boxes(own_boxes, device)
    proposal_boxes, is_proposal = stack_boxes(proposals, device)
    n_images, n_objects = is_object.shape

    pair_overlaps = overlaps(object_boxes, proposal_boxes)
    # Boxes that only fill up the batch match nothing.
    is_pair = is_object.unsqueeze(2) & is_proposal.unsqueeze(1)
    pair_overlaps = pair_overlaps.masked_fill(~is_pair, NO_MATCH)
    assigned_proposals = assign(pair_overlaps, training.rule)

    # Objects first, each assigned to itself; then the proposals. Without objects among the regions
    # an untrained proposal network would leave the heads without positive ones (mmdetection's
    # add_gt_as_proposals).
    object_numbers = torch.arange(n_objects, device=device)
    assigned_objects = object_numbers.expand(n_images, -1)
    boxes = torch.cat([object_boxes, proposal_boxes], dim=1)
    is_real = torch.cat([is_object, is_proposal], dim=1)
    assigned = torch.cat([assigned_objects, assigned_proposals], dim=1)

    proposal_numbers = torch.arange(is_proposal.shape[1], device=device)
    ids = torch.cat([object_numbers, proposal_numbers + _FIRST_ID_OF_PROPOSALS])
    seeds = [seed_for(Use.REGION_SAMPLE, seed) for seed in batch.seeds]
    positive, negative = choose(
        (assigned >= 0) & is_real,
        (assigned == BACKGROUND) & is_real,
        priorities(seeds, ids),
        number=training.regions_per_image,
        positive_share=training.positive_share,
    )
    # The only wait for the device: how many regions there are.
    is_chosen = positive | negative
    image, index = is_chosen.nonzero(as_tuple=True)
    is_positive = positive[image, index]
    # Background has no object: the first one stands in its place, which no loss reads.
    number = assigned[image, index].clamp(min=0)
    if n_objects:
        classes = pad_sequence([targets.classes for targets in batch.targets], batch_first=True)
        region_classes = classes[image, number]
        region_object_boxes = object_boxes[image, number]
    else:
        region_classes = torch.zeros_like(image)
        region_object_boxes = object_boxes.new_zeros(len(image), 4)
    return Regions(
        boxes=boxes[image, index],
        images=image,
        objects=number,
        classes=torch.where(is_positive, region_classes, n_classes),
        object_boxes=region_object_boxes,
        positive=is_positive,
    )
