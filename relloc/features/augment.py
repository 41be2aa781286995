"""Random color changes of training images, on the device and for a whole batch at once.

They are those of linear classification by layer (docs/protocols.md 3.3).
"""

import dataclasses
import itertools
import random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks

UnitRangeImages = Float[Tensor, "b 3 s s"]  # RGB values from 0 to 1
DrawnColors = Float[Tensor, "b 9"]  # all random numbers of each image
ImageNumbers = Float[Tensor, "b 3"]  # three random numbers, or shifts, of each image

_LUMA = (
    0.2989,
    0.587,
    0.114,
)  # weights of red, green, blue: torchvision's rgb_to_grayscale
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_ORDERS = tuple(itertools.permutations((_BRIGHTNESS, _CONTRAST, _SATURATION)))
# Principal components of ImageNet's RGB values in 0..1, for AlexNet's lighting noise: eigenvalues,
# and eigenvectors as columns (mmselfsup 0.x, pipelines/transforms.py, class Lighting).
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JitterAndLighting:
    """Random brightness, contrast and saturation in random order, then AlexNet's lighting noise.

    Each image is changed by random numbers of its own seed:

    - a factor for each of brightness, contrast and saturation, uniform in 1 - x .. 1 + x with x the
      setting of that name (torchvision's ColorJitter, hue left alone), applied in one of the six
      orders; results are clipped to 0..1;
    - a shift of the color of all pixels: along each principal component of ImageNet's colors a
      normal number with standard deviation `lighting` times the eigenvalue. It is added last,
      before the normalization, and is not clipped.

    The published jitter rounds to 8 bits after each change; this one does not.

    Raises:
        UsageError: a setting is out of range: the first three lie in 0..1, `lighting` is 0 or more.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    lighting: float = 0.1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            checks.number(
                f"color.{name}",
                getattr(self, name),
                at_least=0,
                at_most=1,
            )
        checks.number("color.lighting", self.lighting, at_least=0)

    def __str__(self) -> str:
        return (
            f"color jitter {self.brightness}/{self.contrast}/{self.saturation} unrounded, "
            f"lighting noise {self.lighting}"
        )

    def change(self, images: UnitRangeImages, drawn: DrawnColors) -> UnitRangeImages:
        """Returns the images changed by what `draw` returned for the seed of each."""
        factors, orders, normals = drawn.to(images.dtype).split(3, dim=1)
        # Images have different orders, so each pass applies to each image the change that is next.
        for changes in orders.unbind(dim=1):
            images = _apply_change(images, changes.long(), factors)
        shifts = _lighting_shift(normals)
        return images + shifts[:, :, None, None]

    def draw(self, seed: int) -> list[float]:
        """Returns the nine random numbers of an image.

        Three factors (brightness, contrast, saturation), the order of these changes as three
        indices, and three normal numbers for lighting.
        """
        rng = random.Random(seed)
        factors = []
        for strength in (self.brightness, self.contrast, self.saturation):
            factor = rng.uniform(1 - strength, 1 + strength)
            factors.append(factor)
        order = rng.choice(_ORDERS)
        normals = [rng.gauss(0, self.lighting) for _ in _EIGENVALUES]
        return [*factors, *order, *normals]


def _apply_change(
    images: UnitRangeImages,
    changes: Int[Tensor, "b"],
    factors: ImageNumbers,
) -> UnitRangeImages:
    """Returns each image after one change, `changes[i]` (brightness, contrast or saturation).

    All three blend the image with another one: brightness with black, contrast with the image's
    mean gray value, saturation with the image in gray.
    """
    red, green, blue = images.unbind(dim=1)
    luma_red, luma_green, luma_blue = _LUMA
    gray = luma_red * red + luma_green * green + luma_blue * blue
    gray = gray.unsqueeze(1)
    mean_gray = gray.mean(dim=(2, 3), keepdim=True)
    # The image to blend with is chosen by masks, as a branch for each image would be a kernel each.
    change = changes[:, None, None, None]
    is_contrast = change == _CONTRAST
    is_brightness = change == _BRIGHTNESS
    other = torch.where(is_contrast, mean_gray, gray)
    other = other.masked_fill(is_brightness, 0)
    factor = factors.gather(1, changes[:, None])
    factor = factor[:, :, None, None]
    blended = factor * images + (1 - factor) * other
    return blended.clamp(0, 1)


def _lighting_shift(normals: ImageNumbers) -> ImageNumbers:
    """Returns what lighting adds to red, green and blue of each image.

    It is the product of the eigenvectors with the scaled normal numbers, written as a sum: a matrix
    product on a GPU may round its factors to TF32.
    """
    eigenvectors = zip(*_EIGENVECTORS, strict=True)
    components = zip(
        eigenvectors,
        _EIGENVALUES,
        normals.unbind(dim=1),
        strict=True,
    )
    shifts = []
    for vector, eigenvalue, normal in components:
        shift = [value * eigenvalue * normal for value in vector]
        shifts.append(torch.stack(shift, dim=1))
    return shifts[0] + shifts[1] + shifts[2]
