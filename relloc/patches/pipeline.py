"""Turns a batch of images into the batch of patches that a network takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from relloc.geometry import PatchGrid
from relloc.neutral import repr_without_defaults
from relloc.patches.aperture import Aperture
from relloc.patches.chroma_blur import ChromaBlur
from relloc.patches.color import Drawn
from relloc.patches.cut import cut_patches
from relloc.patches.rotation import QuarterTurns
from relloc.patches.sample import sample_places

Images = UInt8[Tensor, "b 3 s s"]  # s: the grid's span_px
Patches = Float[Tensor, "b cells 3 p p"]  # in the grid's row-by-row order


@runtime_checkable
class Color(Protocol):
    """A color treatment of patches (see `relloc.patches.color`)."""

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns the random numbers for `n` patches of side `p` of each of `b` images."""
        ...

    def __call__(self, patches: Tensor, *drawn: Tensor) -> Tensor:
        """Returns the treated patches; `drawn` is what `draw` returned."""
        ...


@runtime_checkable
class Normalize(Protocol):
    """A normalization of pixels (see `relloc.patches.normalize`)."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the pixels, given on the scale 0..255, as a network takes them."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchPipeline:
    """Samples a grid of patches, cuts them, treats their colors and normalizes them.

    The chroma of images may be blurred before they are cut, and patches covered but for an aperture
    once their colors are treated; at the end patches may be turned.

    It works on whole batches, on the device of the images. `draw` makes all random numbers, and
    `make` is a pure function of images and these numbers, so that torch.compile can fuse it.

    Example:
        >>> pipeline = PatchPipeline(grid=grid, color=Keep(), normalize=ByDataset())
        >>> patches = pipeline(images, torch.Generator().manual_seed(0))
    """

    grid: PatchGrid
    color: Color
    normalize: Normalize
    chroma_blur: ChromaBlur | None = None
    aperture: Aperture | None = None
    rotation: QuarterTurns | None = None

    def __repr__(self) -> str:
        return repr_without_defaults(self)

    @property
    def about_center(self) -> "PatchPipeline":
        """Makes patches of a 3x3 grid, which has a center, in the same way."""
        grid = dataclasses.replace(self.grid, rows=3)
        return dataclasses.replace(self, grid=grid)

    def draw(self, n_images: int, generator: torch.Generator) -> Drawn:
        """Returns the random numbers for `n_images` images, made by `generator` alone.

        The first tensor is the corners of the grid's cells (b cells 2). Where the grid has a scale,
        the factors of the patches follow (b cells), then what the color treatment draws, and then
        the windows of an aperture and the turns of a rotation, if there is one.
        """
        places = sample_places(self.grid, n_images, generator)
        sizes = (n_images, self.grid.cells, self.grid.patch_px)
        for_color = self.color.draw(*sizes, generator)
        for_aperture = self.aperture.draw(*sizes, generator) if self.aperture else ()
        turns = self.rotation.draw(*sizes, generator) if self.rotation else ()
        return *places, *for_color, *for_aperture, *turns

    def make(
        self,
        images: Images,
        corners: Int[Tensor, "b cells 2"],
        *drawn: Tensor,
    ) -> Patches:
        """Returns the patches of `images`; `corners` and `drawn` are what `draw` returned.

        Raises:
            ValueError: the side of the images is not the grid's `span_px`.
        """
        self._check_side(images)
        return self._make_unchecked(images, corners, *drawn)

    def compiled(self, compile: Callable[[Any], Any]) -> Callable[..., Patches]:
        """Returns `make` compiled by `compile`, such as `torch.compile`.

        It is compiled once for all grids with patches of one size, whatever their gap and jitter.
        """
        # This import takes seconds, and only compiled runs need it.
        from torch._dynamo import maybe_mark_dynamic

        # Compiled code is bound to each number that it is compared with. So the side of the images,
        # which gap and jitter decide, is checked outside.
        fast = compile(self._make_unchecked)

        def make(images: Images, corners: Tensor, *drawn: Tensor) -> Patches:
            self._check_side(images)
            # Height and width become variables of the compiled code. All other sizes are constants.
            maybe_mark_dynamic(images, (2, 3))
            return fast(images, corners, *drawn)

        return make

    def _check_side(self, images: Tensor) -> None:
        side_px = images.shape[-1]
        if side_px != self.grid.span_px:
            raise ValueError(f"images are {side_px} px, the grid spans {self.grid.span_px} px")

    def _make_unchecked(self, images: Images, *drawn: Tensor) -> Patches:
        n_places = 1 if self.grid.scale is None else 2
        places = drawn[:n_places]
        # What is left, in the order of `draw`, less what is optional and stands at the end
        for_color = drawn[n_places:]
        if self.rotation is not None:
            *for_color, turns = for_color
        if self.aperture is not None:
            *for_color, windows = for_color

        if self.chroma_blur is not None:
            images = self.chroma_blur(images.float())
        patches = cut_patches(images, self.grid, *places)
        patches = self.color(patches, *for_color)
        if self.aperture is not None:
            patches = self.aperture(patches, windows)
        patches = self.normalize(patches)
        return patches if self.rotation is None else self.rotation(patches, turns)

    def __call__(self, images: Images, generator: torch.Generator) -> Patches:
        """Returns the patches of `images`, with random numbers drawn from `generator`."""
        drawn = self.draw(len(images), generator)
        return self.make(images, *drawn)
