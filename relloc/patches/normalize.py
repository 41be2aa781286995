"""From the scale 0..255 to what a network takes."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDataset:
    """ImageNet's mean and standard deviation, per channel (mmselfsup 0.x)."""

    def __call__(self, pixels: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
        mean = pixels.new_tensor(IMAGENET_MEAN).view(3, 1, 1) * 255
        std = pixels.new_tensor(IMAGENET_STD).view(3, 1, 1) * 255
        return (pixels - mean) / std


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerPatch:
    """Each patch gets zero mean and unit variance over all its values (google 2019).

    `floor_px` bounds the standard deviation from below, so that a flat patch becomes zeros.
    """

    floor_px: float = 1.0

    def __call__(self, pixels: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
        std, mean = torch.std_mean(pixels, dim=(-3, -2, -1), correction=0, keepdim=True)
        return (pixels - mean) / std.clamp(min=self.floor_px)
