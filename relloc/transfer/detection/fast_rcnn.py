"""Fast R-CNN: regions of a map that are given from outside are classified and moved.

Constants are those of the project fast-rcnn with its CaffeNet (docs/protocols.md 3.16).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import Backbone
from relloc.to_device import on_device
from relloc.transfer.alexnet import FineTunedAlexNet, fc6_of_windows
from relloc.transfer.detection.align import pool_regions
from relloc.transfer.detection.box_head import (
    BoxPredictor,
    DetectionRule,
    best_of_image,
    mean_losses,
    of_own_class,
)
from relloc.transfer.detection.boxes import clip, decode, encode
from relloc.transfer.detection.given_proposals import UNIT_STDS, RegionBatch
from relloc.transfer.detection.new_network import weights_generator
from relloc.transfer.detection.strides import stride_of
from relloc.transfer.detections import Detections
from relloc.transfer.dropout import apply_layers
from relloc.transfer.resize import Size

TEST_RULE = DetectionRule(above_score=0.05, nms_overlap=0.3, most_per_image=100)
# Cells along each side of a region, in place of CaffeNet's pool5.
_ALEXNET_SIDE = 6
# The fifth stage of other networks halves them.
_STAGE5_SIDE = 14
# Regions of a forward when testing: an image may have ten thousand, whose maps fill gigabytes.
_REGIONS_AT_ONCE = 1024
_FC7_DIM = 4096


class FastRcnn(nn.Module):
    """A trunk that makes a map of the image, and a head that makes a vector of each region of it.

    Each cell of a region is the largest value of the map there. Two linear layers score classes and
    background, and move the region's box for each class.

    Args:
        trunk: stages in sequence.
        head: layers in sequence, from the cells of regions (n c side side) to vectors (n `dim`).
        side: cells of a region along each side.
        dim: length of the vectors.
        means, stds: of the offsets to the objects of each class, by which they are normalized.
        seed: decides the initial weights of the two linear layers.
    """

    means: Float[Tensor, "classes 4"]
    stds: Float[Tensor, "classes 4"]

    def __init__(
        self,
        trunk: nn.Sequential,
        head: nn.Sequential,
        *,
        side: int,
        dim: int,
        means: Float[Tensor, "classes 4"],
        stds: Float[Tensor, "classes 4"],
        seed: int,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.side = side
        self.stride = stride_of(trunk)
        self.predictor = BoxPredictor(dim, len(means), weights_generator(seed))
        # They are saved with the weights, which mean nothing without them.
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    @property
    def first_stage(self) -> nn.Module:
        """The stage that fast-rcnn does not train: conv1 of the AlexNet-like network."""
        return self.trunk[0]

    def losses(self, batch: RegionBatch) -> dict[str, Float[Tensor, ""]]:
        """Returns the losses `class` and `box`, whose sum is trained.

        They are cross-entropy, and smooth L1 of the normalized offsets of the true class; both are
        divided by the number of regions of a group of images.
        """
        regions = batch.regions
        features = self.trunk(batch.images)
        logits, offsets = self._look_at(features, regions.boxes, regions.images, batch.seeds)
        wanted = encode(regions.boxes, regions.object_boxes, UNIT_STDS)
        n_regions = len(wanted)
        means = of_own_class(self.means.expand(n_regions, -1, -1), regions)
        stds = of_own_class(self.stds.expand(n_regions, -1, -1), regions)
        own_offsets = of_own_class(offsets, regions)
        errors = smooth_l1_loss(own_offsets, (wanted - means) / stds, reduction="none")
        return mean_losses(logits, errors.sum(dim=1), regions, batch.groups)

    @torch.no_grad()
    def detect(
        self,
        images: Float[Tensor, "b 3 h w"],
        regions: Sequence[Float[Tensor, "_ 4"]],
        proposals: Sequence[Float[Tensor, "_ 4"]],
        sizes: Sequence[Size],
    ) -> list[Detections]:
        """Returns the detections in each image, in pixels of its original, corners included.

        Args:
            images: resized and normalized.
            regions: proposals of each image, in pixels of the resized images.
            proposals: the same in pixels of the original images.
            sizes: height and width of the original images.
        """
        features = self.trunk(images)
        found = []
        for number, (boxes, references, size) in enumerate(
            zip(regions, proposals, sizes, strict=True)
        ):
            logits, offsets = self._look_at_all(features[number : number + 1], boxes)
            found.append(self._of_image(logits, offsets, references, size))
        return found

    def _of_image(
        self,
        logits: Float[Tensor, "n _"],
        offsets: Float[Tensor, "n classes 4"],
        references: Float[Tensor, "n 4"],
        size: Size,
    ) -> Detections:
        n_classes = offsets.shape[1]
        scores = logits.softmax(dim=1)[:, :n_classes]
        # Each class moves the region its own way.
        by_class = references.unsqueeze(1).expand_as(offsets)
        moved = decode(by_class, offsets * self.stds + self.means, UNIT_STDS)
        # The last pixel has the coordinates width - 1 and height - 1.
        height, width = size
        inside = clip(moved, on_device((height - 1, width - 1), moved))
        # Non-maximum suppression counts the pixels of both corners as parts of a box.
        last_pixel = on_device((0, 0, 1, 1), inside)
        found = best_of_image(scores, inside + last_pixel, TEST_RULE)
        return Detections(
            boxes=found.boxes - last_pixel, scores=found.scores, classes=found.classes
        )

    def _look_at_all(
        self, features: Float[Tensor, "1 c h w"], boxes: Float[Tensor, "n 4"]
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _ 4"]]:
        """Returns logits and offsets of any number of regions of one image."""
        logits = []
        offsets = []
        # Also of no regions a forward is computed, which gives empty results of the right shape.
        for start in range(0, max(len(boxes), 1), _REGIONS_AT_ONCE):
            part = boxes[start : start + _REGIONS_AT_ONCE]
            images = torch.zeros(len(part), dtype=torch.int64, device=part.device)
            part_logits, part_offsets = self._look_at(features, part, images)
            logits.append(part_logits)
            offsets.append(part_offsets)
        return torch.cat(logits), torch.cat(offsets)

    def _look_at(
        self,
        features: Float[Tensor, "b c h w"],
        boxes: Float[Tensor, "n 4"],
        images: Int[Tensor, "n"],
        seeds: Int[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _ 4"]]:
        """Returns logits and offsets of the regions `boxes` of `images`.

        `seeds` are those of the dropout of each, which training needs.
        """
        cells = pool_regions(features, boxes, images, side=self.side, stride=self.stride)
        return self.predictor(apply_layers(self.head, cells, seeds))


def alexnet_fast_rcnn(
    network: FineTunedAlexNet,
    *,
    means: Float[Tensor, "classes 4"],
    stds: Float[Tensor, "classes 4"],
    seed: int,
) -> FastRcnn:
    """Returns Fast R-CNN with the layers of the paper's network, which it shares.

    Cells of regions, 6 x 6, are in the place of pool5, and the two new layers in that of fc8.
    """
    *stages, _pool5 = network.trunk.children()
    *layers, _fc8 = network.head.children()
    return FastRcnn(
        nn.Sequential(*stages),
        nn.Sequential(*layers),
        side=_ALEXNET_SIDE,
        dim=_FC7_DIM,
        means=means,
        stds=stds,
        seed=seed,
    )


def region_calibration_forward(backbone: Backbone) -> Callable[[RegionBatch], Any]:
    """Returns a forward by which batch norm of a backbone is recalibrated for `FastRcnn`.

    The batch norm of the AlexNet-like network's fc6 is folded into conv6, which sees the cells of
    regions: they are maxima, with other statistics than windows of a whole image. Other networks
    embed the images.
    """
    if not isinstance(backbone, AlexNetBackbone):
        return lambda batch: backbone.embed(batch.images)
    stages = nn.Sequential(*backbone.stages().values())
    stride = stride_of(stages)

    def forward(batch: RegionBatch) -> Float[Tensor, "windows _"]:
        regions = batch.regions
        features = stages(batch.images)
        cells = pool_regions(
            features, regions.boxes, regions.images, side=_ALEXNET_SIDE, stride=stride
        )
        return fc6_of_windows(backbone, cells)

    return forward


def staged_fast_rcnn(
    backbone: Backbone,
    *,
    means: Float[Tensor, "classes 4"],
    stds: Float[Tensor, "classes 4"],
    seed: int,
) -> FastRcnn:
    """Returns Fast R-CNN on the fourth stage of a copy of a backbone, whose fifth is its head.

    Regions are brought to 14 x 14 cells, as those of Faster R-CNN C4 are, and their maps averaged.
    """
    stages = list(copy.deepcopy(backbone).stages().values())
    head = nn.Sequential(stages[4], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return FastRcnn(
        nn.Sequential(*stages[:4]),
        head,
        side=_STAGE5_SIDE,
        dim=backbone.stage_channels[4],
        means=means,
        stds=stds,
        seed=seed,
    )
