"""From the scale 0..255 to what a network takes."""

import dataclasses
import functools

import torch
from jaxtyping import Float
from torch import Tensor

Pixels = Float[Tensor, "*b 3 h w"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Whatever travels to the GPU makes the host wait for all that is queued there.
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def per_channel(values: tuple[float, ...], pixels: Tensor) -> Float[Tensor, "c 1 1"]:
    """One number a channel, of the type and on the device of `pixels`."""
    if torch.compiler.is_compiling():  # which keeps constants by itself
        return pixels.new_tensor(values).view(-1, 1, 1)
    return _kept(values, pixels.dtype, pixels.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDataset:
    """ImageNet's mean and standard deviation, per channel (mmselfsup 0.x)."""

    def __call__(self, pixels: Pixels) -> Pixels:
        mean = per_channel(IMAGENET_MEAN, pixels) * 255
        std = per_channel(IMAGENET_STD, pixels) * 255
        return (pixels - mean) / std


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerPatch:
    """Each patch gets zero mean and unit variance over all its values (google 2019).

    `floor_px` bounds the standard deviation from below, so that a flat patch becomes zeros.
    """

    floor_px: float = 1.0

    def __call__(self, pixels: Pixels) -> Pixels:
        std, mean = torch.std_mean(pixels, dim=(-3, -2, -1), correction=0, keepdim=True)
        return (pixels - mean) / std.clamp(min=self.floor_px)
