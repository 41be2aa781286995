"""Pools the feature map of each stage to about 9,000 numbers per image.

This is how the published benchmark makes features of all layers comparable (docs/protocols.md 3.1).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, pad

from relloc.models.backbone import STAGES, Backbone
from relloc.models.fused_resnet import FusedResNet
from relloc.results import LAYERS

FeatureMaps = Float[Tensor, "b c h w"]
PooledFeatures = Float[Tensor, "b d"]  # channels times pooled pixels, flattened

# The benchmark's "specified" pooling of an input of 224 px: side of the stage's map -> kernel,
# stride, padding, and the side of the pooled map (docs/protocols.md 3.1).
_SPECIFIED_WINDOWS = {
    112: (10, 10, 4),
    56: (16, 8, 0),
    28: (13, 5, 0),
    14: (8, 3, 0),
    7: (6, 1, 0),
}
_SPECIFIED_SIDES = {112: 12, 56: 6, 28: 4, 14: 3, 7: 2}


def pool_stage(
    maps: FeatureMaps,
    side: int,
) -> PooledFeatures:
    """Average-pools each map to `side` x `side` and flattens it.

    Uses the published windows where they give that side. Maps of other sizes (of another input
    size or backbone) get adaptive windows, which is the benchmark's "adaptive" mode.
    """
    height, width = maps.shape[-2:]
    published_side = _SPECIFIED_SIDES.get(height)
    is_specified = height == width and published_side == side
    if not is_specified:
        pooled = adaptive_avg_pool2d(maps, side)
        return pooled.flatten(1)
    kernel, stride, padding = _SPECIFIED_WINDOWS[height]
    has_whole_squares = stride > 1 and kernel % stride == 0
    if torch.compiler.is_compiling() and has_whole_squares:
        # The compiler would copy the whole map to float32 for avg_pool2d. It fuses means over
        # squares of stride x stride pixels with the map as it is. A window is a whole number of
        # these squares, so the same mean is then taken over the few squares of each window.
        maps = pad(maps, (padding,) * 4)
        whole_squares = (-1, stride)
        maps = maps.unflatten(-1, whole_squares)
        maps = maps.unflatten(-3, whole_squares)
        # The mean over the rows and columns of each square
        maps = maps.mean((-3, -1))
        kernel = kernel // stride
        stride = 1
        padding = 0
    pooled = avg_pool2d(maps, kernel, stride, padding)
    return pooled.flatten(1)


def pooled_layers(
    backbone: Backbone | FusedResNet,
    images: Float[Tensor, "b 3 h w"],
    layers: tuple[str, ...],
) -> dict[str, PooledFeatures]:
    """Returns the pooled features of the named layers, in float32, by layer in the given order.

    `layers` are some of `relloc.results.LAYERS`: stages of the backbone, or "avgpool", which is the
    mean over the map of feature5.
    """
    stages = backbone(images)
    pooled = {}
    sides = backbone.pooled_sides
    for name, side in zip(STAGES, sides, strict=True):
        if name not in layers:
            continue
        # Half precision overflows in the sums over windows of feature5.
        maps = stages[name].float()
        pooled[name] = pool_stage(maps, side)
    if "avgpool" in layers:
        maps = stages["feature5"].float()
        pooled["avgpool"] = maps.mean(dim=(2, 3))
    return {name: pooled[name] for name in layers}


def layer_channels(backbone: Backbone) -> dict[str, int]:
    """Returns the number of channels of each layer, by layer."""
    # avgpool has the channels of the last stage.
    stage_channels = backbone.stage_channels
    last_channels = stage_channels[-1]
    channels = (*stage_channels, last_channels)
    by_layer = zip(LAYERS, channels, strict=True)
    return dict(by_layer)


def layer_dims(backbone: Backbone) -> dict[str, int]:
    """Returns how many numbers each layer has after pooling: channels times pooled pixels."""
    channels = layer_channels(backbone)
    # avgpool has one pixel.
    sides = (*backbone.pooled_sides, 1)
    dims = {}
    for layer, side in zip(LAYERS, sides, strict=True):
        n_channels = channels[layer]
        n_pixels = side * side
        dims[layer] = n_channels * n_pixels
    return dims
