"""Color treatments that hide chromatic aberration.

A lens bends red and green by different amounts, and the shift between the channels tells where in
the photograph a patch was: a network that sees it answers without looking at the content.

A treatment first draws its random numbers (`draw`) and then is a pure function of patches on the
scale 0..255, of the same shape and scale. The patches of an image lie side by side: (image, patch,
channel, row, column). Sources of the constants: protocols.md 1.1.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from relloc import checks
from relloc.patches.normalize import per_channel

Drawn = tuple[Tensor, ...]  # the random numbers of a treatment
Patches = Float[Tensor, "b n 3 p p"]
ChannelValues = tuple[float, float, float]  # of red, green and blue
IMAGENET_MEAN_PX = (123.675, 116.28, 103.53)  # of each channel, in gray levels
_GREEN_MAGENTA = (-1.0, 2.0, -1.0)  # the direction a of the paper's projection
_GREEN_MAGENTA_OVER_6 = (-1 / 6, 2 / 6, -1 / 6)


def _weighted_sum(
    patches: Patches,
    weights: ChannelValues,
) -> Float[Tensor, "b n 1 p p"]:
    # Channel by channel, since a product with all weights would take as much memory as the patches.
    red, green, blue = patches.split(1, dim=2)
    red_weight, green_weight, blue_weight = weights
    weighted = red * red_weight
    weighted = weighted.add(green, alpha=green_weight)
    return weighted.add(blue, alpha=blue_weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NotRandom:
    # A treatment that needs no random numbers.

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns an empty tuple."""
        return ()


class Keep(_NotRandom):
    """Leaves the colors as they are: the control, in which the shortcut stays open."""

    def __call__(self, patches: Patches) -> Patches:
        return patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gray:
    """Makes all patches of an image gray with probability `p`; the three channels are then equal.

    `weights` are "luma", those of torchvision (mmselfsup 0.x), or "mean", equal thirds (google 2019
    and mmselfsup 1.x).

    Raises:
        ValueError: `p` is not a probability, or `weights` is neither of the two.
    """

    p: float
    weights: Literal["luma", "mean"]

    def __post_init__(self) -> None:
        checks.number("color.p", self.p, at_least=0, at_most=1)
        checks.one_of("color.weights", self.weights, ("luma", "mean"))

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns which of the `b` images become gray (b)."""
        u = torch.rand(
            b,
            generator=generator,
            device=generator.device,
        )
        becomes_gray = u < self.p
        return (becomes_gray,)

    def __call__(self, patches: Patches, becomes_gray: Tensor) -> Patches:
        if self.weights == "mean":
            gray = patches.mean(dim=2, keepdim=True)
        else:
            # The luma of ITU-R 601 in Pillow's fixed point with 16 bits, rounded to whole gray
            # levels: equal to torchvision's result on images, bit for bit.
            fixed_point = _weighted_sum(patches, (19595.0, 38470.0, 7471.0))
            gray = torch.floor((fixed_point + 32768) / 65536)
        of_each_image = becomes_gray.view(-1, 1, 1, 1, 1)
        return torch.where(of_each_image, gray, patches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drop:
    """Keeps one random channel of each patch and replaces the other two by noise around the mean.

    "gaussian" noise has `noise_ratio` (1/100) times the standard deviation of the channel that is
    kept, as in the paper (Doersch 2015). "uniform" noise lies within `noise_ratio` x 100 / 2, which
    is half a gray level, as in the author's code.

    Raises:
        ValueError: `noise` is neither of the two.
    """

    noise: Literal["gaussian", "uniform"]
    noise_ratio: float = 0.01

    def __post_init__(self) -> None:
        checks.one_of("color.noise", self.noise, ("gaussian", "uniform"))

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns the channel that each patch keeps (b n), and noise of unit size (b n 3 p p)."""
        device = generator.device
        random = torch.randn if self.noise == "gaussian" else torch.rand
        # The order of the two draws is fixed: another one would give other numbers.
        channel = torch.randint(
            3,
            (b, n),
            generator=generator,
            device=device,
        )
        shape = (b, n, 3, p, p)
        unit_noise = random(
            shape,
            generator=generator,
            device=device,
        )
        return channel, unit_noise

    def __call__(
        self,
        patches: Patches,
        channel: Tensor,
        unit_noise: Tensor,
    ) -> Patches:
        # Compared with the number of each channel: true in one channel of each patch (b n 3 1 1)
        channel = channel.view(*channel.shape, 1, 1, 1)
        channels = torch.arange(3, device=patches.device)
        is_kept = channels.view(3, 1, 1) == channel
        if self.noise == "uniform":
            # From [0, 1) to numbers around 0
            noise = unit_noise - 0.5
            noise = noise * 100 * self.noise_ratio
        else:
            # The contrast of the channel that is kept sets the size of the noise.
            p = patches.shape[-1]
            indices = channel.expand(-1, -1, -1, p, p)
            kept_channel = patches.gather(2, indices)
            std = kept_channel.std(dim=(3, 4), keepdim=True)
            noise_std = std * self.noise_ratio
            noise = unit_noise * noise_std
        mean = per_channel(IMAGENET_MEAN_PX, patches)
        return torch.where(
            is_kept,
            patches,
            mean + noise,
        )


class Project(_NotRandom):
    """Removes the green-magenta component of every pixel, relative to ImageNet's mean color.

    The paper's projection (Doersch 2015): B = I - a'a / (aa') with the direction a = [-1, 2, -1].
    """

    def __call__(self, patches: Patches) -> Patches:
        red, green, blue = IMAGENET_MEAN_PX
        component_of_mean = 2 * green - red - blue
        component = _weighted_sum(patches, _GREEN_MAGENTA)
        component = component - component_of_mean
        # Removed along a; the factors hold the division by aa' = 6.
        direction = per_channel(_GREEN_MAGENTA_OVER_6, patches)
        return patches - component * direction
