"""The feature pyramid of Mask R-CNN, and from which of its levels a region is taken."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from relloc.transfer.detection.align import align

# Cells of the finest level that the side of a region divides by: 56 px at stride 4. Regions belong
# to this level up to twice that side.
_CELLS_OF_FINEST = 14
# mmdetection adds it to the ratio of sides, so that rounding lifts a region onto a boundary.
_BOUNDARY_SLACK = 1e-6


class FeaturePyramid(nn.Module):
    """Maps of equal channels made of those of several stages, and one more of twice their stride.

    A 1x1 convolution brings each stage to the channels of the pyramid, to which the coarser level
    is added, enlarged by its nearest cells; a 3x3 convolution follows. Each convolution has a batch
    norm and no bias, and no ReLU. Weights are Xavier uniform. The last level has every other cell
    of the one before it.

    Args:
        stage_channels: channels of the stages' maps, the finest first.
        channels: of the maps of the pyramid.
        generator: of the initial weights.
    """

    def __init__(
        self,
        stage_channels: Sequence[int],
        channels: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.levels = FeaturePyramidNetwork(
            list(stage_channels),
            channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )
        for layer in self.levels.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight, generator=generator)

    def forward(
        self,
        maps: Sequence[Float[Tensor, "b _ _ _"]],
    ) -> list[Float[Tensor, "b c _ _"]]:
        """Returns the maps of the pyramid, one more than are given, the finest first."""
        by_name = {str(number): stage_map for number, stage_map in enumerate(maps)}
        return list(self.levels(by_name).values())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LevelRegions:
    """Regions in the order of the levels that their features are taken from.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels.
        images: the image of each region.
        counts: number of regions of each level.
        order: where each region stood before.
    """

    boxes: Float[Tensor, "n 4"]
    images: Int[Tensor, "n"]
    counts: Sequence[int]
    order: Int[Tensor, "n"]

    def restored(self, values: Float[Tensor, "n *v"]) -> Float[Tensor, "n *v"]:
        """Returns one value for each region in the order that the regions had before."""
        return values[self.order.argsort()]


@torch.no_grad()
def by_level(
    boxes: Float[Tensor, "n 4"],
    images: Int[Tensor, "n"],
    strides: Sequence[int],
) -> LevelRegions:
    """Returns regions in the order of their levels, whose `strides` double from one to the next.

    It waits for the device once, to learn the counts.
    """
    levels = _levels(boxes, strides)
    order = levels.argsort(stable=True)
    is_of_level = levels == torch.arange(len(strides), device=levels.device).unsqueeze(1)
    return LevelRegions(
        boxes=boxes[order],
        images=images[order],
        counts=is_of_level.sum(dim=1).tolist(),
        order=order,
    )


def _levels(boxes: Float[Tensor, "n 4"], strides: Sequence[int]) -> Int[Tensor, "n"]:
    """Returns the number of the level of each region, as mmdetection 2.28.2 assigns them.

    The level rises by 1 each time that the square root of the area doubles.
    """
    boxes = boxes.float()
    sides = boxes[:, 2:] - boxes[:, :2]
    size = torch.sqrt(sides[:, 0] * sides[:, 1])
    finest_size = _CELLS_OF_FINEST * strides[0]
    levels = torch.log2(size / finest_size + _BOUNDARY_SLACK).floor()
    return levels.clamp(0, len(strides) - 1).long()


def align_levels(
    maps: Sequence[Float[Tensor, "b c _ _"]],
    regions: LevelRegions,
    strides: Sequence[int],
    *,
    side: int,
) -> Float[Tensor, "n c side side"]:
    """Returns the features of each region, from the map of its level (see `align`)."""
    counts = list(regions.counts)
    boxes = regions.boxes.split(counts)
    images = regions.images.split(counts)
    aligned = []
    # Levels without regions take part, so that each map has a gradient.
    for number, (level_map, stride) in enumerate(zip(maps, strides, strict=True)):
        aligned.append(align(level_map, boxes[number], images[number], side=side, stride=stride))
    joined = torch.cat(aligned)
    # A level without regions would turn the layout of all into the common one.
    channels_last = maps[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return joined.contiguous(memory_format=layout)
