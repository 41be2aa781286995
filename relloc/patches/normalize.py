"""Normalizes pixels from 0..255 to the values that a network takes."""

import dataclasses
import functools

import torch
from jaxtyping import Float
from torch import Tensor

FloatImages = Float[Tensor, "*b 3 h w"]  # images or patches
# Of ImageNet's training images on the scale 0..1, as torchvision and mmselfsup give them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def _cached_tensor(
    values: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # Cached on the device: copying a constant to a GPU in every call would make the host wait for
    # all work queued there.
    tensor = torch.tensor(values, dtype=dtype, device=device)
    return tensor.view(-1, 1, 1)


def per_channel(values: tuple[float, ...], pixels: Tensor) -> Float[Tensor, "c 1 1"]:
    """Returns a tensor of one number a channel, with the dtype and device of `pixels`."""
    # torch.compile keeps constants by itself and can't trace through the cache.
    if torch.compiler.is_compiling():
        return pixels.new_tensor(values).view(-1, 1, 1)
    return _cached_tensor(values, pixels.dtype, pixels.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDataset:
    """Normalizes with ImageNet's mean and standard deviation of each channel.

    Used by mmselfsup 0.x (protocols.md 1.1) and by all evaluations.
    """

    def __call__(self, pixels: FloatImages) -> FloatImages:
        mean = per_channel(IMAGENET_MEAN, pixels) * 255
        std = per_channel(IMAGENET_STD, pixels) * 255
        return (pixels - mean) / std


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerPatch:
    """Normalizes each patch to zero mean and unit variance over all its values.

    Used by google 2019 (protocols.md 1.1). `floor_px` is a lower bound of the standard deviation in
    gray levels, so that a flat patch becomes zeros and faint noise is not amplified.
    """

    floor_px: float = 1.0

    def __call__(self, pixels: FloatImages) -> FloatImages:
        # Over channels, rows and columns together; differences between channels are kept.
        all_values = (-3, -2, -1)
        std, mean = torch.std_mean(pixels, dim=all_values, correction=0, keepdim=True)
        return (pixels - mean) / std.clamp(min=self.floor_px)
