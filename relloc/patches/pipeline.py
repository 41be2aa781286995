"""From a batch of images to the batch of patches that a network takes."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc.geometry import PatchGrid
from relloc.patches.cut import cut
from relloc.patches.sample import sample_corners


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchPipeline:
    """Sample a grid, cut, treat the colors, normalize: whole batches, on the images' device."""

    grid: PatchGrid
    color: Callable[[Tensor, torch.Generator], Tensor]
    normalize: Callable[[Tensor], Tensor]

    def __call__(self, images: UInt8[Tensor, "b 3 s s"], generator: torch.Generator) -> Float[Tensor, "b 9 3 p p"]:
        """Patches of `images`, whose side is the grid's span; all chance comes from `generator`.

        Raises:
            ValueError: the images are not of the grid's span.
        """
        if images.shape[-1] != self.grid.span_px:
            raise ValueError(f"images are {images.shape[-1]} px, the grid spans {self.grid.span_px} px")
        corners = sample_corners(self.grid, len(images), generator)
        patches = cut(images, corners, self.grid.patch_px).float()
        return self.normalize(self.color(patches, generator))
