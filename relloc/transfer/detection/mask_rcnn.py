"""Mask R-CNN on a feature pyramid: boxes of objects, their classes and their masks."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relloc import checks
from relloc.models.backbone import Backbone
from relloc.transfer.detection.anchors import AnchorGrid, Anchors
from relloc.transfer.detection.assign import AssignmentRule
from relloc.transfer.detection.batch import DetectionBatch
from relloc.transfer.detection.box_head import DetectionRule, box_losses, detections
from relloc.transfer.detection.fpn import FeaturePyramid, LevelRegions, align_levels, by_level
from relloc.transfer.detection.fpn_heads import BOX_SIDE, MASK_INPUT_SIDE, BoxHead, MaskHead
from relloc.transfer.detection.masks import mask_loss, mask_targets, positive_regions
from relloc.transfer.detection.new_network import copied_stages, weights_generator
from relloc.transfer.detection.proposals import ProposalCounts, propose
from relloc.transfer.detection.regions import RegionTraining, choose_regions
from relloc.transfer.detection.rpn import RpnHead, RpnTraining, anchor_targets, rpn_losses
from relloc.transfer.detection.strides import stride_of
from relloc.transfer.detections import Detections
from relloc.transfer.resize import Size

# The values of mmdetection 2.28.2 (configs/_base_/models/mask_rcnn_r50_fpn.py).
_TRAINING_PROPOSALS = ProposalCounts(before_nms=2_000, after_nms=1_000)
_TEST_PROPOSALS = ProposalCounts(before_nms=1_000, after_nms=1_000)
# An object takes the proposals that overlap it most from objects that they overlap still more.
_ROI_RULE = AssignmentRule(positive=0.5, negative=0.5, low_quality=0.5)
_RPN_TRAINING = RpnTraining(use_crossing_anchors=True)
_REGION_TRAINING = RegionTraining(rule=_ROI_RULE)
_DETECTION_RULE = DetectionRule()
# Square root of an anchor's area, in cells of its level.
_ANCHOR_CELLS = 8
# Stages before this one are too fine for a level of the pyramid.
_FIRST_LEVEL_STAGE = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRcnnSettings:
    """Settings of Mask R-CNN. The defaults are those of mmdetection 2.28.2.

    Attributes:
        channels: of the pyramid's maps and of the heads' convolutions.
        hidden: units of the hidden layer of the box head.
        rpn: what the proposals are trained on.
        training_proposals: number of proposals in training.
        test_proposals: number of proposals otherwise.
        regions: what the heads of regions are trained on.
        detection: which boxes become detections.

    Raises:
        UsageError: `channels` or `hidden` is not a whole number of 1 or more.
    """

    channels: int = 256
    hidden: int = 1_024
    rpn: RpnTraining = _RPN_TRAINING
    training_proposals: ProposalCounts = _TRAINING_PROPOSALS
    test_proposals: ProposalCounts = _TEST_PROPOSALS
    regions: RegionTraining = _REGION_TRAINING
    detection: DetectionRule = _DETECTION_RULE

    def __post_init__(self) -> None:
        checks.whole("channels", self.channels)
        checks.whole("hidden", self.hidden)


def level_strides(backbone: Backbone) -> list[int]:
    """Returns the strides in pixels of the maps that a pyramid is made of, the finest first."""
    stages = list(backbone.stages().values())
    strides = []
    for number in range(_FIRST_LEVEL_STAGE, len(stages)):
        strides.append(stride_of(nn.Sequential(*stages[: number + 1])))
    return strides


class MaskRCNNFPN(nn.Module):
    """Mask R-CNN on a pyramid of the last four stages of a backbone.

    All weights of the backbone are copied, and all of them are trained. The parts with weights are
    `trunk`, `pyramid`, `rpn`, `box_head` and `mask_head`.

    Args:
        backbone: copied, with its weights.
        n_classes: number of classes without background.
        settings: everything that is not a weight.
        seed: decides the initial weights of the layers that the backbone does not have.

    Attributes:
        strides: pixels from one cell to the next, for each level of the pyramid. That of the last
            one is twice that of the level before it, also where an image has an odd number of rows.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        settings: MaskRcnnSettings,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.n_classes = n_classes
        generator = weights_generator(seed)
        stages = copied_stages(backbone)
        self.trunk = nn.ModuleList(stages)

        strides = level_strides(backbone)
        self.strides = [*strides, 2 * strides[-1]]
        self._grid = AnchorGrid(
            strides=self.strides,
            sizes=[[_ANCHOR_CELLS * stride] for stride in self.strides],
        )

        level_channels = backbone.stage_channels[_FIRST_LEVEL_STAGE:]
        self.pyramid = FeaturePyramid(level_channels, settings.channels, generator)
        self.rpn = RpnHead(settings.channels, self._grid.per_cell, generator)
        self.box_head = BoxHead(settings.channels, settings.hidden, n_classes, generator)
        self.mask_head = MaskHead(settings.channels, n_classes, generator)

    def losses(self, batch: DetectionBatch) -> dict[str, Float[Tensor, ""]]:
        """Returns the five losses, by name, whose sum is trained.

        Raises:
            ValueError: an image has no masks.
        """
        settings = self.settings
        n_images = len(batch.images)
        maps = self._maps(batch.images)
        scores, offsets = self.rpn(maps)
        anchors = self._anchors(maps)
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
        regions = choose_regions(proposals, batch, self.n_classes, settings.regions)
        # All that the device has to be waited for comes before the heads, which keep it busy.
        positive, counts = positive_regions(regions, n_images)
        box_regions = by_level(regions.boxes, regions.images, self._region_strides)
        mask_regions = by_level(positive.boxes, positive.images, self._region_strides)

        logits, box_offsets = self._find_boxes(maps, box_regions)
        losses |= box_losses(logits, box_offsets, regions, batch.groups)

        wanted_masks = mask_targets(positive, counts, batch.targets)
        mask_logits = self._find_masks(maps, mask_regions, positive.classes)
        losses["mask"] = mask_loss(mask_logits, wanted_masks, positive.images, batch.groups)
        return losses

    @torch.no_grad()
    def detect(
        self,
        images: Float[Tensor, "b 3 h w"],
        sizes: Sequence[Size],
    ) -> list[Detections]:
        """Returns the detections in each image, in pixels of the images as they are given.

        Masks are cells over the boxes, to be pasted after these are rescaled. `sizes` are height
        and width of each image before padding.
        """
        maps = self._maps(images)
        scores, offsets = self.rpn(maps)
        anchors = self._anchors(maps)
        proposals = propose(scores, offsets, anchors, sizes, self.settings.test_proposals)
        regions = self._by_level(proposals, images)
        logits, box_offsets = self._find_boxes(maps, regions)
        found = detections(
            logits,
            box_offsets,
            torch.cat(proposals),
            [len(boxes) for boxes in proposals],
            sizes,
            self.settings.detection,
        )

        regions = self._by_level([each.boxes for each in found], images)
        classes = torch.cat([each.classes for each in found])
        cells = self._find_masks(maps, regions, classes).sigmoid()
        with_masks = []
        image_cells = cells.split([len(each.boxes) for each in found])
        for each, own_cells in zip(found, image_cells, strict=True):
            with_masks.append(dataclasses.replace(each, mask_cells=own_cells))
        return with_masks

    @property
    def _region_strides(self) -> list[int]:
        """Strides of the levels that regions are taken from: proposals alone use the last one."""
        return self.strides[:-1]

    def _maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c _ _"]]:
        """Returns the maps of the pyramid, the finest first."""
        stage_maps = []
        x = images
        for stage in self.trunk:
            x = stage(x)
            stage_maps.append(x)
        return self.pyramid(stage_maps[_FIRST_LEVEL_STAGE:])

    def _anchors(self, maps: Sequence[Float[Tensor, "b c _ _"]]) -> Anchors:
        sizes = []
        for level_map in maps:
            rows, columns = level_map.shape[-2:]
            sizes.append((rows, columns))
        return self._grid.at(sizes, maps[0].device)

    def _by_level(
        self, boxes: Sequence[Float[Tensor, "_ 4"]], images: Float[Tensor, "b 3 h w"]
    ) -> LevelRegions:
        """Returns the boxes of each image as regions, by level."""
        numbers = []
        for number, image_boxes in enumerate(boxes):
            numbers.append(torch.full((len(image_boxes),), number, device=images.device))
        return by_level(torch.cat(list(boxes)), torch.cat(numbers), self._region_strides)

    def _find_boxes(
        self, maps: Sequence[Float[Tensor, "b c _ _"]], regions: LevelRegions
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _ 4"]]:
        """Returns logits and offsets of regions in the order that they had before `by_level`."""
        features = align_levels(maps[:-1], regions, self._region_strides, side=BOX_SIDE)
        logits, offsets = self.box_head(features)
        return regions.restored(logits), regions.restored(offsets)

    def _find_masks(
        self,
        maps: Sequence[Float[Tensor, "b c _ _"]],
        regions: LevelRegions,
        classes: Tensor,
    ) -> Float[Tensor, "n 28 28"]:
        """Returns logits of the masks of regions in the order that they had before `by_level`.

        `classes` are in that order, too.
        """
        features = align_levels(maps[:-1], regions, self._region_strides, side=MASK_INPUT_SIDE)
        return regions.restored(self.mask_head(features, classes[regions.order]))
