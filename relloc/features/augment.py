"""Random colors of training images, on the device and for a whole batch at once (protocols.md 3.3)."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks

Pixels = Float[Tensor, "b 3 s s"]
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_ORDERS = tuple(itertools.permutations((_BRIGHTNESS, _CONTRAST, _SATURATION)))
# Principal components of ImageNet's RGB values in 0..1, as AlexNet's lighting noise takes them: eigenvalues, and
# eigenvectors as columns (mmselfsup 0.x, pipelines/transforms.py, class Lighting).
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JitterAndLighting:
    """Brightness, contrast and saturation times factors, in random order; then a shift of all pixels' color.

    Each image draws from its own seed: factors uniform in 1 - x .. 1 + x (torchvision's ColorJitter,
    hue left alone), one of the six orders, and along each principal component of ImageNet's colors a
    normal number of standard deviation `lighting` times its eigenvalue. The first three clip to
    0..1; lighting stands after them and before the normalization, and clips nothing. Published
    jitter rounds to 8 bits after each change; this does not.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    lighting: float = 0.1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            checks.number(f"color.{name}", getattr(self, name), at_least=0, at_most=1)
        checks.number("color.lighting", self.lighting, at_least=0)

    def __str__(self) -> str:
        return (
            f"color jitter {self.brightness}/{self.contrast}/{self.saturation} unrounded, "
            f"lighting noise {self.lighting}"
        )

    def __call__(self, pixels: Pixels, seeds: Sequence[int]) -> Pixels:
        """The images, which are in 0..1, each changed by the chance of its seed; lighting may leave that range."""
        drawn = _to(pixels, [self.draw(seed) for seed in seeds])
        factors, slots, shifts = drawn.split(3, dim=1)
        for slot in slots.unbind(dim=1):
            pixels = _changed(pixels, slot.long(), factors)
        return pixels + _shift(shifts)[:, :, None, None]

    def draw(self, seed: int) -> list[float]:
        """The chance of an image: three factors, which of them comes first to last, three normal numbers."""
        chance = random.Random(seed)
        ranges = (self.brightness, self.contrast, self.saturation)
        factors = [chance.uniform(1 - width, 1 + width) for width in ranges]
        order = chance.choice(_ORDERS)
        return [*factors, *order, *(chance.gauss(0, self.lighting) for _ in _EIGENVALUES)]


def _to(like: Tensor, rows: list[list[float]]) -> Float[Tensor, "b columns"]:
    table = torch.tensor(rows, dtype=like.dtype).reshape(len(rows), -1)
    if like.device.type == "cuda":
        table = table.pin_memory()  # else the host waits for all that is queued on the GPU
    return table.to(like.device, non_blocking=True)


def _changed(pixels: Pixels, which: Int[Tensor, "b"], factors: Float[Tensor, "b 3"]) -> Pixels:
    """Pixels blended with black, their mean gray or their own gray: brightness, contrast, saturation."""
    red, green, blue = pixels.unbind(dim=1)
    gray = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)
    kind = which[:, None, None, None]
    toward = torch.where(kind == _CONTRAST, gray.mean(dim=(2, 3), keepdim=True), gray)
    toward = toward.masked_fill(kind == _BRIGHTNESS, 0)
    factor = factors.gather(1, which[:, None])[:, :, None, None]
    return (factor * pixels + (1 - factor) * toward).clamp(0, 1)


def _shift(normals: Float[Tensor, "b 3"]) -> Float[Tensor, "b 3"]:
    """What lighting adds to red, green and blue; sums instead of a product, which might be rounded to 19 bits."""
    columns = zip(*_EIGENVECTORS, strict=True)
    parts = [
        torch.stack([value * eigenvalue * normal for value in vector], dim=1)
        for vector, eigenvalue, normal in zip(columns, _EIGENVALUES, normals.unbind(dim=1), strict=True)
    ]
    return parts[0] + parts[1] + parts[2]
