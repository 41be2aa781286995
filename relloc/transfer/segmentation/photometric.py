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
from relloc.to_device import to_device

# Pixels hold whole numbers from 0 to 255, as if they were uint8. On a GPU arithmetic of floats is
# faster, and no type has to be changed between steps.
ByteImages = Float[Tensor, "b 3 h w"]
Channel = Float[Tensor, "b h w"]

# OpenCV halves the hue of 360 degrees so that it fits into 8 bits.
_HUES = 180
_HUES_PER_SECTOR = 30  # of the six sectors between red, yellow, green, cyan, blue and magenta
# OpenCV's hsv_shift of 12 binary digits.
_FIXED_POINT_STEPS = 1 << 12
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
            setting = f"photometric.{name}"
            checks.numbers(setting, limits, at_least=0)
            checks.one_of(f"the number of limits in {setting}", len(limits), [2])
            lower, upper = limits
            checks.number(f"{setting}'s upper limit", upper, at_least=lower)
        checks.whole("photometric.hue", self.hue)

    def __str__(self) -> str:
        least_contrast, most_contrast = self.contrast
        least_saturation, most_saturation = self.saturation
        return (
            f"photometric distortion (brightness {self.brightness:g}, "
            f"contrast {least_contrast:g}..{most_contrast:g}, "
            f"saturation {least_saturation:g}..{most_saturation:g}, hue {self.hue})"
        )

    def draw(self, rng: random.Random) -> ColorChange:
        """Returns a random change of colors."""
        # All numbers are drawn, also those that are not used, so that each image draws as many.
        brightness = rng.uniform(-self.brightness, self.brightness)
        contrast = rng.uniform(*self.contrast)
        saturation = rng.uniform(*self.saturation)
        # numpy's randint, which the source calls, excludes the upper end.
        hue = rng.randrange(-self.hue, self.hue)

        changes_brightness = rng.random() < _SHARE
        changes_contrast = rng.random() < _SHARE
        contrast_first = rng.random() < _SHARE
        changes_saturation = rng.random() < _SHARE
        changes_hue = rng.random() < _SHARE
        return ColorChange(
            brightness=brightness if changes_brightness else None,
            contrast=contrast if changes_contrast else None,
            contrast_first=contrast_first,
            saturation=saturation if changes_saturation else None,
            hue=hue if changes_hue else None,
        )


def distorted(images: ByteImages, changes: Sequence[ColorChange]) -> ByteImages:
    """Returns RGB images with changed colors, one change for each image.

    A change concerns the pixels of its own image alone, so that images may be batched in any way.
    """
    images = images.clone()
    brightnesses = [change.brightness for change in changes]
    saturations = [change.saturation for change in changes]
    hues = [change.hue for change in changes]
    # Each image has its contrast changed at one of two points.
    early_contrasts = []
    late_contrasts = []
    for change in changes:
        early_contrasts.append(change.contrast if change.contrast_first else None)
        late_contrasts.append(None if change.contrast_first else change.contrast)

    # The order of the source. It counts, as values are clipped after each change.
    _change(images, brightnesses, torch.add)
    _change(images, early_contrasts, torch.mul)
    _change(images, saturations, _scale_saturation)
    _change(images, hues, _shift_hue)
    _change(images, late_contrasts, torch.mul)
    return images


def _change(
    images: ByteImages,
    values: Sequence[float | None],
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Applies `operation` in place to the images whose value is not None, with that value."""
    chosen_values = []
    chosen_indices = []
    for index, value in enumerate(values):
        if value is not None:
            chosen_values.append(value)
            chosen_indices.append(index)
    if not chosen_indices:
        return
    # One copy for both.
    numbers = torch.tensor([chosen_values, chosen_indices])
    amounts, indices = to_device(numbers, images.device)
    indices = indices.long()
    # One amount for all channels, rows and columns of an image.
    amount_of_image = amounts[:, None, None, None]
    results = operation(images[indices], amount_of_image)
    images[indices] = _as_bytes(results)


def _as_bytes(values: Tensor) -> Tensor:
    """Returns values clipped to 0..255 and without decimals, as numpy converts them to uint8."""
    return values.clamp(0, 255).floor()


def _scale_saturation(images: ByteImages, factors: Tensor) -> ByteImages:
    """Returns RGB images whose saturation is multiplied by one factor for each image."""
    hue, saturation, value = hsv_of(images)
    scaled = saturation * factors[:, 0]
    return rgb_of(hue, _as_bytes(scaled), value)


def _shift_hue(images: ByteImages, shifts: Tensor) -> ByteImages:
    """Returns RGB images whose hue is shifted by one number for each image."""
    hue, saturation, value = hsv_of(images)
    # Hue is an angle: beyond the full circle it begins anew.
    shifted = hue + shifts[:, 0]
    return rgb_of(shifted.remainder(_HUES), saturation, value)


def hsv_of(images: ByteImages) -> tuple[Channel, Channel, Channel]:
    """Returns hue (0 to 179), saturation and value (0 to 255) of RGB images, as OpenCV rounds them.

    OpenCV's RGB2HSV_b computes with 12 binary digits after the point and quotients from a table.
    All its products are whole numbers below 2^24, which float32 holds exactly.
    """
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    difference = value - images.amin(dim=1)
    # Of black and gray pixels the numerators are 0, so that any denominator will do.
    value_reciprocal = 255 / value.clamp(min=1)
    saturation = _fixed_point(difference, value_reciprocal)

    # The largest channel says in which third of the circle the hue lies, and the difference of the
    # other two, where in it. Of equal channels the first in the order red, green, blue counts as
    # the largest.
    is_not_red = value != red
    is_green = (value == green) & is_not_red
    is_blue = (value != green) & is_not_red
    near_red = green - blue
    near_green = blue - red + 2 * difference
    near_blue = red - green + 4 * difference
    sixths = torch.where(is_green, near_green, near_red)
    sixths = torch.where(is_blue, near_blue, sixths)
    difference_reciprocal = _HUES_PER_SECTOR / difference.clamp(min=1)
    hue = _fixed_point(sixths, difference_reciprocal)
    # Between magenta and red it is negative.
    hue = torch.where(hue < 0, hue + _HUES, hue)
    return hue, saturation, value


def _fixed_point(numerator: Tensor, reciprocal: Tensor) -> Tensor:
    """Returns the rounded product, with the reciprocal rounded to 12 binary digits before."""
    steps = (reciprocal * _FIXED_POINT_STEPS).round()
    product = numerator * steps
    # Half a unit more, so that cutting decimals off rounds.
    half = _FIXED_POINT_STEPS // 2
    return ((product + half) / _FIXED_POINT_STEPS).floor()


def rgb_of(hue: Channel, saturation: Channel, value: Channel) -> ByteImages:
    """Returns RGB images of hue (0 to 179), saturation and value (0 to 255), as OpenCV rounds them.

    Operations and their order are those of OpenCV's vectorized HSV2RGB_b, which cuts decimals off
    at the end. Only the last pixels of a row, fewer than a vector, are rounded by OpenCV.
    """
    # Shares from 0 to 1. Products with reciprocals, not quotients, as their last bits differ.
    saturation_share = saturation * (1 / 255)
    value_share = value * (1 / 255)
    position = hue * (1 / _HUES_PER_SECTOR)
    sector = position.floor()
    within = position - sector

    channels = []
    # In sectors 0 to 5 the share of red that is missing is 0, rising, 1, 1, falling, 0. Green and
    # blue follow a third and two thirds of the circle later.
    for offset in (0, 4, 2):
        phase = (sector + offset).remainder(6)
        is_all_missing = (phase == 2) | (phase == 3)
        missing = is_all_missing.to(hue.dtype)
        missing = torch.where(phase == 1, within, missing)
        missing = torch.where(phase == 4, 1 - within, missing)
        # Of a gray pixel, whose saturation is 0, no channel misses anything.
        present = 1 - saturation_share * missing
        channels.append(value_share * present * 255)
    images = torch.stack(channels, dim=1)
    return images.floor()
