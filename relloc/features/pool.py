"""Pooling a stage's map to about 9,000 numbers, as the benchmark does (protocols.md 3.1)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, pad

from relloc.models.backbone import STAGES, Backbone
from relloc.results import LAYERS

# Side of a stage's map at 224 px -> kernel, stride, padding of its "specified" pooling.
_SPECIFIED = {112: (10, 10, 4), 56: (16, 8, 0), 28: (13, 5, 0), 14: (8, 3, 0), 7: (6, 1, 0)}
_SPECIFIED_SIDES = {112: 12, 56: 6, 28: 4, 14: 3, 7: 2}


def pool_stage(maps: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b d"]:
    """Average-pool to `side` x `side` and flatten: the published windows where they give that side.

    Other map sizes (another input or backbone) get adaptive windows, the benchmark's "adaptive" mode.
    """
    height, width = maps.shape[-2:]
    if height == width and _SPECIFIED_SIDES.get(height) == side:
        kernel, stride, padding = _SPECIFIED[height]
        if torch.compiler.is_compiling() and stride > 1 and kernel % stride == 0:
            # Means of squares first, which the compiler takes from the map as it is; avg_pool2d wants a float32 copy.
            blocks = pad(maps, (padding,) * 4).unflatten(-1, (-1, stride)).unflatten(-3, (-1, stride))
            maps, kernel, stride, padding = blocks.mean((-3, -1)), kernel // stride, 1, 0
        return avg_pool2d(maps, kernel, stride, padding).flatten(1)
    return adaptive_avg_pool2d(maps, side).flatten(1)


def pooled_layers(
    backbone: Backbone, images: Float[Tensor, "b 3 h w"], layers: tuple[str, ...]
) -> dict[str, Float[Tensor, "b d"]]:
    """The pooled features of the named layers in float32: half precision overflows in feature5."""
    stages = backbone(images)
    sides = dict(zip(STAGES, backbone.pooled_sides, strict=True))
    pooled = {name: pool_stage(stages[name].float(), sides[name]) for name in layers if name in sides}
    if "avgpool" in layers:
        pooled["avgpool"] = stages["feature5"].float().mean(dim=(2, 3))
    return {name: pooled[name] for name in layers}


def layer_channels(backbone: Backbone) -> dict[str, int]:
    """Channels of each layer."""
    return dict(zip(LAYERS, (*backbone.stage_channels, backbone.stage_channels[-1]), strict=True))


def layer_dims(backbone: Backbone) -> dict[str, int]:
    """How many numbers each layer has after pooling: channels x places."""
    sides = (*backbone.pooled_sides, 1)
    channels = layer_channels(backbone)
    return {layer: channels[layer] * side * side for layer, side in zip(LAYERS, sides, strict=True)}
