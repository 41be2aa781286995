"""Samples where the patches of each image lie: a regular grid plus random jitter and scale.

They lie within a square crop of the image, whose own position `relloc.data.crops` draws before.
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc.geometry import PatchGrid

Corners = tuple[tuple[int, int], ...]


@functools.cache
def _corners_on(
    corners: Corners,
    device: torch.device,
) -> Int[Tensor, "cells 2"]:
    # Cached on the device: copying a constant to a GPU in every call would make the host wait for
    # all work queued there.
    return torch.tensor(corners, device=device)


def sample_places(
    grid: PatchGrid,
    n_images: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Returns where the patches of `n_images` images lie, as `cut_patches` takes it.

    These are the corners (b cells 2) and, of a grid with a scale, the factors of each patch
    (b cells).
    """
    corners = sample_corners(grid, n_images, generator)
    if grid.scale is None:
        return (corners,)
    # After the corners: the order is part of what the seed decides.
    return corners, _sample_scales(grid, grid.scale, n_images, generator)


def sample_corners(
    grid: PatchGrid,
    n_images: int,
    generator: torch.Generator,
) -> Int[Tensor, "b cells 2"]:
    """Returns the top left corner (row, column) of each of the grid's cells of `n_images` images.

    Corners count from the top left of a crop of side `grid.span_px`. Each patch is displaced on
    each axis, uniformly over the whole pixels of the jitter range with both ends included, and on
    its own unless the grid's jitter is yoked. `generator` is the only source of randomness; the
    result is on its device.
    """
    device = generator.device
    # Displacements count from the lowest corner, so they run from 0 to the width of the range.
    # Yoked, one displacement of an image is broadcast to its patches.
    n_drawn = 1 if grid.yoked_jitter else grid.cells
    shape = (n_images, n_drawn, 2)
    n_displacements = grid.jitter_width + 1
    displacements = torch.randint(n_displacements, shape, generator=generator, device=device)
    lowest_corners = tuple(map(grid.lowest_corner, range(grid.cells)))
    return _corners_on(lowest_corners, device) + displacements


def _sample_scales(
    grid: PatchGrid,
    scale: Sequence[float],
    n_images: int,
    generator: torch.Generator,
) -> Float[Tensor, "b cells"]:
    """Returns by which factor each patch is enlarged, uniform over the range `scale`."""
    low, high = scale
    n_drawn = 1 if grid.yoked_scale else grid.cells
    u = torch.rand((n_images, n_drawn), generator=generator, device=generator.device)
    factors = low + (high - low) * u
    return factors.expand(n_images, grid.cells)
