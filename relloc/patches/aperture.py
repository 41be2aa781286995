"""Covers patches but for a window, so that a network can't rely on what lies at their edges."""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks
from relloc.errors import UsageError
from relloc.patches.color import Drawn
from relloc.patches.normalize import per_channel

# Red, green and blue of the cover, the mean of ImageNet's images as Caffe's users give it
# (protocols.md 1.5)
COVER_PX = (123.0, 117.0, 104.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aperture:
    """Shows patches through a window, the same for all patches of an image, and covers the rest.

    Args:
        low: smallest side of the window, as a share of a patch's side.
        high: its largest side. Sides and places are uniform over whole pixels.
        whole: how many patches of an image, chosen at random, are not covered.

    Raises:
        UsageError: a value is not valid.
    """

    low: float
    high: float
    whole: int

    def __post_init__(self) -> None:
        checks.number("aperture.low", self.low, above=0, at_most=1)
        checks.number("aperture.high", self.high, above=0, at_most=1)
        if self.low > self.high:
            raise UsageError(
                f"aperture.low is {self.low} and aperture.high {self.high}: "
                "give a largest side that is not below the smallest"
            )
        checks.whole("aperture.whole", self.whole, at_least=0)

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns the window of each patch (b n 4): top, left, bottom and right, half-open.

        A patch that is not covered has a window as large as itself.
        """
        device = generator.device
        # At least one pixel of the smallest patches stays visible.
        low_px = max(1, round(self.low * p))
        high_px = max(1, round(self.high * p))
        sides = torch.randint(low_px, high_px + 1, (b, 1), generator=generator, device=device)
        u = torch.rand((b, 2), generator=generator, device=device)
        tops_lefts = (u * (p - sides + 1)).long()
        # The patches of an image in random order, the first of which are whole
        order = torch.rand((b, n), generator=generator, device=device).argsort(dim=1)
        is_whole = (order < self.whole).unsqueeze(-1)
        # With numbers and no tensor of them, whose copy to a GPU would make the host wait
        starts = torch.where(is_whole, 0, tops_lefts.unsqueeze(1))
        ends = torch.where(is_whole, p, (tops_lefts + sides).unsqueeze(1))
        return (torch.cat([starts, ends], dim=2),)

    def __call__(
        self,
        patches: Float[Tensor, "b n 3 p p"],
        windows: Int[Tensor, "b n 4"],
    ) -> Float[Tensor, "b n 3 p p"]:
        """Returns the patches, covered outside of their windows."""
        tops, lefts, bottoms, rights = windows.unsqueeze(-1).unbind(2)
        pixels = torch.arange(patches.shape[-1], device=patches.device)
        rows = (pixels >= tops) & (pixels < bottoms)
        columns = (pixels >= lefts) & (pixels < rights)
        # (b n 1 p p)
        is_visible = rows[:, :, None, :, None] & columns[:, :, None, None, :]
        return torch.where(is_visible, patches, per_channel(COVER_PX, patches))
