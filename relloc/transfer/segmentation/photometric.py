"""Photometric distortion of training images, as mmsegmentation 0.30 does it with OpenCV.

Source: `PhotoMetricDistortion` in mmseg/datasets/pipelines/transforms.py. torchvision's transform
of a similar name is another one: it has other ranges, and blends with the image's mean gray value.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relloc import checks

# Pixels hold whole numbers from 0 to 255, as if they were uint8. On a GPU arithmetic of floats is
# faster, and no type has to be changed between steps.
ByteImages = Float[Tensor, "b 3 h w"]
Channel = Float[Tensor, "b h w"]

# OpenCV halves the hue of 360 degrees so that it fits into 8 bits.
_HUES = 180
_HUES_PER_SECTOR = 30  # of the six sectors between red, yellow, green, cyan, blue and magenta
# Probability of each change, and of changing contrast first (`random.randint(2)` in the source).
_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorChange:
    """How the colors of one image are changed; None leaves a property as it is.

    brightness: gray levels that are added.
    contrast: a factor on all values.
    contrast_first: whether contrast is changed before saturation and hue, not after them.
    saturation: a factor on the saturation.
    hue: what is added to the hue, of which the full circle is 180.
    """

    brightness: float | None
    contrast: float | None
    contrast_first: bool
    saturation: float | None
    hue: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotometricDistortion:
    """Random brightness, contrast, saturation and hue, each changed with probability 1/2.

    brightness: the largest shift, in gray levels.
    contrast: the range of the factor.
    saturation: the range of the factor.
    hue: the hue is shifted by a whole number of [-hue, hue), of which the full circle is 180.

    After each change values are clipped to 0..255 and their decimals are cut off, as the source
    converts to uint8.

    Raises:
        UsageError: a number is out of range.
    """

    brightness: float = 32
    contrast: Sequence[float] = (0.5, 1.5)
    saturation: Sequence[float] = (0.5, 1.5)
    hue: int = 18

    def __post_init__(self) -> None:
        checks.number("photometric.brightness", self.brightness, at_least=0, at_most=255)
        for name in ("contrast", "saturation"):
            limits = getattr(self, name)
            checks.numbers(f"photometric.{name}", limits, at_least=0)
            checks.one_of(f"the number of limits in photometric.{name}", len(limits), [2])
            checks.number(f"photometric.{name}'s upper limit", limits[1], at_least=limits[0])
        checks.whole("photometric.hue", self.hue)

    def draw(self, rng: random.Random) -> ColorChange:
        """Returns a random change of colors."""
        brightness = rng.uniform(-self.brightness, self.brightness)
        contrast = rng.uniform(*self.contrast)
        saturation = rng.uniform(*self.saturation)
        # numpy's randint, which the source calls, excludes the upper end.
        hue = rng.randrange(-self.hue, self.hue)
        return ColorChange(
            brightness=brightness if rng.random() < _SHARE else None,
            contrast=contrast if rng.random() < _SHARE else None,
            contrast_first=rng.random() < _SHARE,
            saturation=saturation if rng.random() < _SHARE else None,
            hue=hue if rng.random() < _SHARE else None,
        )


def distorted(images: ByteImages, changes: Sequence[ColorChange]) -> ByteImages:
    """Returns RGB images with changed colors, one change for each image.

    A change concerns the pixels of its own image alone, so that images may be batched in any way.
    """
    images = images.clone()
    early_contrasts = []
    late_contrasts = []
    for change in changes:
        early_contrasts.append(change.contrast if change.contrast_first else None)
        late_contrasts.append(None if change.contrast_first else change.contrast)
    _change(images, [change.brightness for change in changes], torch.add)
    _change(images, early_contrasts, torch.mul)
    _change(images, [change.saturation for change in changes], _scale_saturation)
    _change(images, [change.hue for change in changes], _shift_hue)
    _change(images, late_contrasts, torch.mul)
    return images


def _change(
    images: ByteImages,
    values: Sequence[float | None],
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Applies `operation` in place to the images whose value is not None, with that value."""
    chosen = [index for index, value in enumerate(values) if value is not None]
    if not chosen:
        return
    numbers = torch.tensor([[value for value in values if value is not None], chosen])
    # One copy for both, from page-locked memory, as otherwise the host waits for the GPU.
    if images.is_cuda:
        numbers = numbers.pin_memory()
    amounts, indices = numbers.to(images.device, non_blocking=True)
    indices = indices.long()
    results = operation(images[indices], amounts[:, None, None, None])
    images[indices] = _as_bytes(results)


def _as_bytes(values: Tensor) -> Tensor:
    """Returns values clipped to 0..255 and without decimals, as numpy converts them to uint8."""
    return values.clamp(0, 255).floor()


def _scale_saturation(images: ByteImages, factors: Tensor) -> ByteImages:
    hue, saturation, value = hsv_of(images)
    return rgb_of(hue, _as_bytes(saturation * factors[:, 0]), value)


def _shift_hue(images: ByteImages, shifts: Tensor) -> ByteImages:
    hue, saturation, value = hsv_of(images)
    return rgb_of((hue + shifts[:, 0]).remainder(_HUES), saturation, value)


def hsv_of(images: ByteImages) -> tuple[Channel, Channel, Channel]:
    """Returns hue (0 to 179), saturation and value (0 to 255) of RGB images, as OpenCV rounds them.

    OpenCV's RGB2HSV_b computes with 12 binary digits after the point and quotients from a table.
    All its products are whole numbers below 2^24, which float32 holds exactly.
    """
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    difference = value - images.amin(dim=1)
    # Of black and gray pixels the numerators are 0, so that any denominator will do.
    saturation = _fixed_point(difference, 255 / value.clamp(min=1))
    # Of equal channels the first in the order red, green, blue counts as the largest.
    is_green = (value == green) & (value != red)
    is_blue = (value != green) & (value != red)
    sixths = green - blue
    sixths = torch.where(is_green, blue - red + 2 * difference, sixths)
    sixths = torch.where(is_blue, red - green + 4 * difference, sixths)
    hue = _fixed_point(sixths, (_HUES / 6) / difference.clamp(min=1))
    hue = torch.where(hue < 0, hue + _HUES, hue)
    return hue, saturation, value


def _fixed_point(numerator: Tensor, reciprocal: Tensor) -> Tensor:
    """Returns the rounded product, with the reciprocal rounded to 12 binary digits before."""
    steps = (reciprocal * 4096).round()
    return ((numerator * steps + 2048) / 4096).floor()


def rgb_of(hue: Channel, saturation: Channel, value: Channel) -> ByteImages:
    """Returns RGB images of hue (0 to 179), saturation and value (0 to 255), as OpenCV rounds them.

    Operations and their order are those of OpenCV's vectorized HSV2RGB_b, which cuts decimals off
    at the end. Only the last pixels of a row, fewer than a vector, are rounded by OpenCV.
    """
    full_saturation = saturation * (1 / 255)
    full_value = value * (1 / 255)
    position = hue * (1 / _HUES_PER_SECTOR)
    sector = position.floor()
    within = position - sector
    channels = []
    # In sectors 0 to 5 the share of red that is missing is 0, rising, 1, 1, falling, 0. Green and
    # blue follow a third and two thirds of the circle later.
    for offset in (0, 4, 2):
        phase = (sector + offset).remainder(6)
        missing = ((phase == 2) | (phase == 3)).to(hue.dtype)
        missing = torch.where(phase == 1, within, missing)
        missing = torch.where(phase == 4, 1 - within, missing)
        channels.append(full_value * (1 - full_saturation * missing) * 255)
    return torch.stack(channels, dim=1).floor()
