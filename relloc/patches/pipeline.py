"""From a batch of images to the batch of patches that a network takes."""

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from relloc.geometry import CELLS, PatchGrid
from relloc.patches.color import Drawn
from relloc.patches.cut import cut
from relloc.patches.sample import sample_corners

Images = UInt8[Tensor, "b 3 s s"]


@runtime_checkable
class Color(Protocol):
    """A color treatment: what it draws for b x n patches of side p, and what it makes of patches with that."""

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn: ...

    def __call__(self, patches: Tensor, *drawn: Tensor) -> Tensor: ...


@runtime_checkable
class Normalize(Protocol):
    """From the scale 0..255 to what a network takes."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchPipeline:
    """Sample a grid, cut, treat the colors, normalize: whole batches, on the images' device.

    All random numbers come from `draw`; `make` is a pure function, which torch.compile can fuse.
    """

    grid: PatchGrid
    color: Color
    normalize: Normalize

    def draw(self, n_images: int, generator: torch.Generator) -> Drawn:
        """The random numbers of `n_images` images, from `generator` alone: corners (b 9 2), and the color's."""
        corners = sample_corners(self.grid, n_images, generator)
        return corners, *self.color.draw(n_images, CELLS, self.grid.patch_px, generator)

    def make(self, images: Images, corners: Int[Tensor, "b 9 2"], *drawn: Tensor) -> Float[Tensor, "b 9 3 p p"]:
        """Patches of `images`, whose side is the grid's span, with the random numbers that `draw` gave.

        Raises:
            ValueError: the images are not of the grid's span.
        """
        if images.shape[-1] != self.grid.span_px:
            raise ValueError(f"images are {images.shape[-1]} px, the grid spans {self.grid.span_px} px")
        patches = cut(images, corners, self.grid.patch_px).float()
        return self.normalize(self.color(patches, *drawn))

    def __call__(self, images: Images, generator: torch.Generator) -> Float[Tensor, "b 9 3 p p"]:
        """Draw and make at once."""
        return self.make(images, *self.draw(len(images), generator))
