"""Faster R-CNN on the fourth stage of a backbone, whose fifth stage is the head of its regions."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relloc.models.backbone import Backbone
from relloc.transfer.detection.align import align
from relloc.transfer.detection.anchors import AnchorGrid
from relloc.transfer.detection.batch import DetectionBatch
from relloc.transfer.detection.box_head import (
    BoxPredictor,
    DetectionRule,
    box_losses,
    detections,
)
from relloc.transfer.detection.new_network import copied_stages, weights_generator
from relloc.transfer.detection.proposals import C4_TEST, C4_TRAINING, ProposalCounts, propose
from relloc.transfer.detection.regions import RegionTraining, choose_regions
from relloc.transfer.detection.rpn import RpnHead, RpnTraining, anchor_targets, rpn_losses
from relloc.transfer.detection.strides import stride_of
from relloc.transfer.detections import Detections
from relloc.transfer.resize import Size

# Square roots of the anchors' areas, in pixels.
ANCHOR_SIZES = (32, 64, 128, 256, 512)
# Cells of a region along each side. The fifth stage halves them to 7.
_ALIGNED_SIDE = 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4Settings:
    """Settings of Faster R-CNN C4. The defaults are those of mmdetection 2.28.2.

    Attributes:
        rpn: what the proposals are trained on. The published training by detectron2 sets
            `use_crossing_anchors`.
        training_proposals: number of proposals in training.
        test_proposals: number of proposals otherwise.
        regions: what the heads of regions are trained on.
        detection: which boxes become detections.
    """

    rpn: RpnTraining = dataclasses.field(default_factory=RpnTraining)
    training_proposals: ProposalCounts = C4_TRAINING
    test_proposals: ProposalCounts = C4_TEST
    regions: RegionTraining = dataclasses.field(default_factory=RegionTraining)
    detection: DetectionRule = dataclasses.field(default_factory=DetectionRule)


class FasterRCNNC4(nn.Module):
    """Faster R-CNN whose trunk are the first four stages of a backbone, and its head the fifth.

    Regions of the fourth stage's map are brought to 14 x 14 cells, pass the fifth stage and one
    more batch norm without ReLU, are averaged, and classified and moved by two linear layers. All
    weights of the backbone are copied, those of the fifth stage too, and all of them are trained.

    The parts with weights are `trunk`, `rpn`, `stage5`, `norm` and `predictor`.

    Args:
        backbone: copied, with its weights.
        n_classes: number of classes without background.
        settings: everything that is not a weight.
        seed: decides the initial weights of the layers that the backbone does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        settings: C4Settings,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.n_classes = n_classes
        generator = weights_generator(seed)
        stages = copied_stages(backbone)
        self.trunk = nn.Sequential(*stages[:4])
        self.stage5 = stages[4]
        self.stride = stride_of(self.trunk)
        self._grid = AnchorGrid(strides=[self.stride], sizes=[ANCHOR_SIZES])

        map_channels, region_channels = backbone.stage_channels[3:]
        self.rpn = RpnHead(map_channels, self._grid.per_cell, generator)
        self.norm = nn.BatchNorm2d(region_channels)
        self.predictor = BoxPredictor(region_channels, n_classes, generator)

    def losses(self, batch: DetectionBatch) -> dict[str, Float[Tensor, ""]]:
        """Returns the four losses, by name, whose sum is trained."""
        settings = self.settings
        features = self.trunk(batch.images)

        # First the proposal network, on anchors.
        scores, offsets = self.rpn([features])
        map_size = features.shape[-2:]
        anchors = self._grid.at([map_size], features.device)
        targets = anchor_targets(anchors, batch, settings.rpn)
        losses = rpn_losses(scores, offsets, anchors, targets, batch.groups)

        # Proposals are a given for the heads: no gradient passes through their boxes.
        proposals = propose(
            scores,
            offsets,
            anchors,
            batch.sizes,
            settings.training_proposals,
        )
        # Then the heads, on a sample of its proposals.
        regions = choose_regions(proposals, batch, self.n_classes, settings.regions)
        logits, box_offsets = self._look_at(features, regions.boxes, regions.images)
        losses |= box_losses(logits, box_offsets, regions, batch.groups)
        return losses

    @torch.no_grad()
    def detect(
        self,
        images: Float[Tensor, "b 3 h w"],
        sizes: Sequence[Size],
    ) -> list[Detections]:
        """Returns the detections in each image, in pixels of the images as they are given.

        `sizes` are height and width of each image before padding.
        """
        features = self.trunk(images)
        scores, offsets = self.rpn([features])
        map_size = features.shape[-2:]
        anchors = self._grid.at([map_size], features.device)
        proposals = propose(
            scores,
            offsets,
            anchors,
            sizes,
            self.settings.test_proposals,
        )
        # The regions of all images pass the head at once, each with the number of its image.
        counts = [len(boxes) for boxes in proposals]
        numbers = []
        for image, count in enumerate(counts):
            number = torch.full((count,), image, device=features.device)
            numbers.append(number)
        boxes = torch.cat(proposals)
        image_numbers = torch.cat(numbers)
        logits, box_offsets = self._look_at(features, boxes, image_numbers)
        return detections(
            logits,
            box_offsets,
            boxes,
            counts,
            sizes,
            self.settings.detection,
        )

    def _look_at(
        self,
        features: Float[Tensor, "b c h w"],
        boxes: Float[Tensor, "n 4"],
        images: Int[Tensor, "n"],
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _ 4"]]:
        """Returns logits and offsets of the regions `boxes` of `images`."""
        regions = align(features, boxes, images, side=_ALIGNED_SIDE, stride=self.stride)
        # The extra norm after the fifth stage is MoCo's (Res5ROIHeadsExtraNorm in its detection
        # code) and mmselfsup's (ResLayerExtraNorm).
        hidden = self.norm(self.stage5(regions))
        pooled = hidden.mean(dim=(2, 3))
        return self.predictor(pooled)
