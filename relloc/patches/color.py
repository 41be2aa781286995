"""Color treatments: they hide chromatic aberration, which tells where in the lens a patch was.

Each draws its random numbers apart (`draw`), and then is a pure function of patches on the scale 0..255, the
nine of an image side by side, to the same shape and scale. Constants: protocols.md 1.1.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from relloc import checks
from relloc.patches.normalize import per_channel

Drawn = tuple[Tensor, ...]
Patches = Float[Tensor, "b n 3 p p"]
IMAGENET_MEAN_PX = (123.675, 116.28, 103.53)


def _weighted(patches: Patches, weights: tuple[float, float, float]) -> Float[Tensor, "b n 1 p p"]:
    # Channel by channel, which spares a product as large as the patches.
    red, green, blue = patches.split(1, dim=2)
    return (red * weights[0]).add(green, alpha=weights[1]).add(blue, alpha=weights[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NothingRandom:
    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """No numbers."""
        return ()


class Keep(_NothingRandom):
    """No treatment: the control in which the shortcut stays open."""

    def __call__(self, patches: Patches) -> Patches:
        return patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gray:
    """With probability `p` all patches of an image become gray, three equal channels.

    "luma" weights are torchvision's (mmselfsup 0.x), "mean" are equal thirds (google 2019, 1.x).
    """

    p: float
    weights: Literal["luma", "mean"]

    def __post_init__(self) -> None:
        checks.number("color.p", self.p, at_least=0, at_most=1)
        checks.one_of("color.weights", self.weights, ("luma", "mean"))

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Which images (b) become gray."""
        return (torch.rand(b, generator=generator, device=generator.device) < self.p,)

    def __call__(self, patches: Patches, chosen: Tensor) -> Patches:
        if self.weights == "mean":
            gray = patches.mean(dim=2, keepdim=True)
        else:
            # ITU-R 601 luma in the 16-bit fixed point of Pillow, so that it equals torchvision's on images.
            gray = torch.floor((_weighted(patches, (19595.0, 38470.0, 7471.0)) + 32768) / 65536)
        return torch.where(chosen.view(-1, 1, 1, 1, 1), gray, patches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drop:
    """Each patch keeps one channel, drawn uniformly; the other two become noise around the mean.

    "gaussian" noise has `noise_ratio` (1/100) times the standard deviation of the kept channel, as
    in the paper; "uniform" noise lies within `noise_ratio` x 100 / 2 = half a gray level, as in the
    author's code.
    """

    noise: Literal["gaussian", "uniform"]
    noise_ratio: float = 0.01

    def __post_init__(self) -> None:
        checks.one_of("color.noise", self.noise, ("gaussian", "uniform"))

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """The channel (b n) each patch keeps, and noise (b n 3 p p) of unit size."""
        device = generator.device
        unit = torch.randn if self.noise == "gaussian" else torch.rand
        channel = torch.randint(3, (b, n), generator=generator, device=device)
        return channel, unit((b, n, 3, p, p), generator=generator, device=device)

    def __call__(self, patches: Patches, channel: Tensor, unit: Tensor) -> Patches:
        channel = channel.view(*channel.shape, 1, 1, 1)
        stays = torch.arange(3, device=patches.device).view(3, 1, 1) == channel
        if self.noise == "uniform":
            noise = (unit - 0.5) * 100 * self.noise_ratio
        else:
            p = patches.shape[-1]
            values = patches.gather(2, channel.expand(-1, -1, -1, p, p))
            noise = unit * (values.std(dim=(3, 4), keepdim=True) * self.noise_ratio)
        return torch.where(stays, patches, per_channel(IMAGENET_MEAN_PX, patches) + noise)


class Project(_NothingRandom):
    """Removes the green-magenta direction a = [-1, 2, -1] from every pixel, around the mean color.

    B = I - a'a / (aa'), the paper's projection.
    """

    def __call__(self, patches: Patches) -> Patches:
        red, green, blue = IMAGENET_MEAN_PX
        along = _weighted(patches, (-1.0, 2.0, -1.0)) - (2 * green - red - blue)
        return patches - along * per_channel((-1 / 6, 2 / 6, -1 / 6), patches)
