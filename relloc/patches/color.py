"""Color treatments: they hide chromatic aberration, which tells where in the lens a patch was.

Each takes patches on the scale 0..255, the nine of an image side by side, and returns the same
shape and scale. Constants: protocols.md 1.1.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Patches = Float[Tensor, "b n 3 p p"]
IMAGENET_MEAN_PX = (123.675, 116.28, 103.53)


def _gray(patches: Patches, weights: Literal["luma", "mean"]) -> Float[Tensor, "b n 1 p p"]:
    if weights == "mean":
        return patches.mean(dim=2, keepdim=True)
    # ITU-R 601 luma in the 16-bit fixed point of Pillow, so that it equals torchvision's on images.
    fixed = patches.new_tensor([19595.0, 38470.0, 7471.0]).view(3, 1, 1)
    return torch.floor(((patches * fixed).sum(dim=2, keepdim=True) + 32768) / 65536)


def _mean_px(patches: Patches) -> Float[Tensor, "3 1 1"]:
    return patches.new_tensor(IMAGENET_MEAN_PX).view(3, 1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """No treatment: the control in which the shortcut stays open."""

    def __call__(self, patches: Patches, generator: torch.Generator) -> Patches:
        return patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gray:
    """With probability `p` all patches of an image become gray, three equal channels.

    "luma" weights are torchvision's (mmselfsup 0.x), "mean" are equal thirds (google 2019, 1.x).
    """

    p: float
    weights: Literal["luma", "mean"]

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"color.p is {self.p}, not a probability")
        if self.weights not in ("luma", "mean"):
            raise ValueError(f"color.weights is {self.weights!r}, neither 'luma' nor 'mean'")

    def __call__(self, patches: Patches, generator: torch.Generator) -> Patches:
        chosen = torch.rand(len(patches), generator=generator, device=patches.device) < self.p
        return torch.where(chosen.view(-1, 1, 1, 1, 1), _gray(patches, self.weights), patches)


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
        if self.noise not in ("gaussian", "uniform"):
            raise ValueError(f"color.noise is {self.noise!r}, neither 'gaussian' nor 'uniform'")

    def __call__(self, patches: Patches, generator: torch.Generator) -> Patches:
        b, n = patches.shape[:2]
        device = patches.device
        kept = torch.randint(3, (b, n, 1, 1, 1), generator=generator, device=device)
        is_kept = torch.arange(3, device=device).view(3, 1, 1) == kept
        filling = _mean_px(patches) + self._noise(patches, kept, generator)
        return torch.where(is_kept, patches, filling)

    def _noise(self, patches: Patches, kept: Tensor, generator: torch.Generator) -> Patches:
        if self.noise == "uniform":
            unit = torch.rand(patches.shape, generator=generator, device=patches.device)
            return (unit - 0.5) * 100 * self.noise_ratio
        sd = patches.std(dim=(3, 4), keepdim=True).gather(2, kept)
        unit = torch.randn(patches.shape, generator=generator, device=patches.device)
        return unit * sd * self.noise_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Project:
    """Removes the green-magenta direction a = [-1, 2, -1] from every pixel, around the mean color.

    B = I - a'a / (aa'), the paper's projection.
    """

    def __call__(self, patches: Patches, generator: torch.Generator) -> Patches:
        a = patches.new_tensor([-1.0, 2.0, -1.0]).view(3, 1, 1)
        along = ((patches - _mean_px(patches)) * a).sum(dim=2, keepdim=True) / 6
        return patches - along * a
