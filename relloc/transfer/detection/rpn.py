"""The region proposal network: its head, what its anchors are trained on, and its losses."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu

from relloc.seeds import Use, seed_for
from relloc.transfer.detection.anchors import Anchors
from relloc.transfer.detection.assign import (
    BACKGROUND,
    NO_MATCH,
    RPN_RULE,
    AssignmentRule,
    assign,
)
from relloc.transfer.detection.batch import DetectionBatch
from relloc.transfer.detection.boxes import RPN_STDS, encode, overlaps
from relloc.transfer.detection.groups import mean_over_groups
from relloc.transfer.detection.sampling import choose, priorities

# Of the published head's initial weights (Ren et al. 2015, section 3.1.3).
_INITIAL_STD = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class RpnTraining:
    """What the proposals are trained on. The defaults are those of mmdetection 2.28.2 for C4.

    Attributes:
        rule: which anchors are assigned to which boxes.
        anchors_per_image: number of anchors that each image is trained on.
        positive_share: largest share of them that are assigned to boxes.
        use_crossing_anchors: whether anchors that leave the image are used. The published training
            of detectron2, and those with a feature pyramid, use them.
    """

    rule: AssignmentRule = RPN_RULE
    anchors_per_image: int = 256
    positive_share: float = 0.5
    use_crossing_anchors: bool = False


class RpnHead(nn.Module):
    """Scores each anchor, and moves it: one 3x3 convolution, and two 1x1 convolutions.

    Levels share the weights, which are drawn from N(0, 0.01); biases are zero. There is no norm.
    """

    def __init__(
        self,
        channels: int,
        anchors_per_cell: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.score = nn.Conv2d(channels, anchors_per_cell, kernel_size=1)
        self.move = nn.Conv2d(channels, 4 * anchors_per_cell, kernel_size=1)
        for layer in (self.conv, self.score, self.move):
            nn.init.normal_(layer.weight, std=_INITIAL_STD, generator=generator)
            nn.init.zeros_(torch.as_tensor(layer.bias))

    def forward(
        self,
        maps: Sequence[Float[Tensor, "b _ _ _"]],
    ) -> tuple[Float[Tensor, "b a"], Float[Tensor, "b a 4"]]:
        """Returns the logit of each anchor, and its offsets, in the order of `AnchorGrid.at`."""
        scores = []
        offsets = []
        for level_map in maps:
            hidden = relu(self.conv(level_map))
            # From (image, anchor, row, column) to rows, columns and anchors of a cell.
            level_scores = self.score(hidden).permute(0, 2, 3, 1)
            level_offsets = self.move(hidden).permute(0, 2, 3, 1)
            scores.append(level_scores.flatten(1))
            # A 4-dimensional view first, as a batch may have no images.
            n_images, rows, columns, channels = level_offsets.shape
            n_anchors = rows * columns * channels // 4
            offsets.append(level_offsets.reshape(n_images, n_anchors, 4))
        # Losses and boxes in half precision would be too coarse.
        all_scores = torch.cat(scores, dim=1).float()
        all_offsets = torch.cat(offsets, dim=1).float()
        return all_scores, all_offsets


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AnchorTargets:
    """What the anchors of each image are trained on.

    Attributes:
        positive: anchors that are to find an object.
        negative: anchors that are to find none.
        boxes: the object of each positive anchor; of others any box.
    """

    positive: Bool[Tensor, "b a"]
    negative: Bool[Tensor, "b a"]
    boxes: Float[Tensor, "b a 4"]


@torch.no_grad()
def anchor_targets(
    anchors: Anchors,
    batch: DetectionBatch,
    training: RpnTraining,
) -> AnchorTargets:
    """Assigns the anchors of each image to its boxes, and chooses those that it is trained on."""
    # Anchors over the padding are not trained on. Neither are those that cross the border, whose
    # large errors would prevent convergence (Ren et al. 2015, section 3.3).
    used = anchors.of_images(batch.sizes)
    if not training.use_crossing_anchors:
        used = used & anchors.inside(batch.sizes)

    positive = torch.zeros_like(used)
    negative = torch.zeros_like(used)
    boxes = anchors.boxes.new_zeros(*used.shape, 4)
    # Image by image, as the overlaps of all images at once would fill gigabytes.
    for image, targets in enumerate(batch.targets):
        image_overlaps = overlaps(targets.boxes, anchors.boxes)
        image_overlaps = image_overlaps.masked_fill(~used[image], NO_MATCH)
        assigned = assign(image_overlaps, training.rule)
        positive[image] = assigned >= 0
        negative[image] = assigned == BACKGROUND
        if len(targets.boxes):
            # Anchors without an object get the first one's box, which no loss reads. To leave them
            # out would make the host wait for their number.
            object_numbers = assigned.clamp(min=0)
            boxes[image] = targets.boxes[object_numbers].float()

    # Nearly all anchors are background, so that only a sample of them is trained on.
    seeds = [seed_for(Use.ANCHOR_SAMPLE, seed) for seed in batch.seeds]
    chosen_positive, chosen_negative = choose(
        positive & used,
        negative & used,
        priorities(seeds, anchors.ids),
        number=training.anchors_per_image,
        positive_share=training.positive_share,
    )
    return AnchorTargets(positive=chosen_positive, negative=chosen_negative, boxes=boxes)


def rpn_losses(
    scores: Float[Tensor, "b a"],
    offsets: Float[Tensor, "b a 4"],
    anchors: Anchors,
    targets: AnchorTargets,
    groups: Sequence[int],
) -> dict[str, Float[Tensor, ""]]:
    """Returns the losses `rpn_score` and `rpn_box`: binary cross-entropy, and L1 of offsets.

    Both are sums over the chosen anchors of a group of images, divided by their number. An image
    counts at least one positive and one negative anchor, also if it has none, as in mmdetection.
    `groups` are the numbers of the groups of the images.
    """
    # All anchors have a loss, and those that were not chosen are masked: to select the others
    # would make the host wait for their number.
    is_chosen = targets.positive | targets.negative
    score_losses = binary_cross_entropy_with_logits(
        scores,
        targets.positive.float(),
        reduction="none",
    )
    score_sums = torch.where(is_chosen, score_losses, 0).sum(dim=1)

    # Only positive anchors have an object whose box they are to reach.
    references = anchors.boxes.expand_as(targets.boxes)
    wanted_offsets = encode(references, targets.boxes, RPN_STDS)
    errors = (offsets - wanted_offsets).abs()
    box_losses = errors.sum(dim=2)
    box_sums = torch.where(targets.positive, box_losses, 0).sum(dim=1)

    # Both losses are divided by the number of all chosen anchors, as in mmdetection.
    n_positive = targets.positive.sum(dim=1).clamp(min=1)
    n_negative = targets.negative.sum(dim=1).clamp(min=1)
    counts = n_positive + n_negative
    return {
        "rpn_score": mean_over_groups(score_sums, counts, groups),
        "rpn_box": mean_over_groups(box_sums, counts, groups),
    }
