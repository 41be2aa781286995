"""Turns all patches of an image by the same quarter turns.

A network is then asked for the turn as well (`relloc.pretext.answers`): turned patches without that
question made worse features in others' experience (Mundhenk et al., CVPR 2018, ask for it).
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc.patches.color import Drawn

N_TURNS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuarterTurns:
    """Turns the patches of an image counterclockwise by 0, 90, 180 or 270 degrees, at random.

    Patches are turned in their places: their arrangement stays that of the image.
    """

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns the number of quarter turns of each image (b)."""
        turns = torch.randint(N_TURNS, (b,), generator=generator, device=generator.device)
        return (turns,)

    def __call__(
        self,
        patches: Float[Tensor, "b n 3 p p"],
        turns: Int[Tensor, "b"],
    ) -> Float[Tensor, "b n 3 p p"]:
        """Returns the turned patches."""
        turns = turns.view(-1, 1, 1, 1, 1)
        # Two quarter turns, where there are as many, and then one more where the number is odd
        half_turned = torch.where(turns >= 2, patches.flip((-2, -1)), patches)
        return torch.where(turns % 2 == 1, half_turned.rot90(1, (-2, -1)), half_turned)
