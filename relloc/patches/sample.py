"""Where the nine patches of each image lie: a grid plus random jitter, from a generator that is passed in."""

import functools

import torch
from jaxtyping import Int
from torch import Tensor

from relloc.geometry import CELLS, PatchGrid


@functools.cache
def _on(corners: tuple[tuple[int, int], ...], device: torch.device) -> Int[Tensor, "9 2"]:
    # Kept, since whatever travels to the GPU makes the host wait for all that is queued there.
    return torch.tensor(corners, device=device)


def sample_corners(grid: PatchGrid, n_images: int, generator: torch.Generator) -> Int[Tensor, "b 9 2"]:
    """Top left corners (row, column) of nine patches in a span_px square, each moved on its own.

    Uniform over the whole pixels of the jitter range, both ends included, on the generator's device.
    """
    device = generator.device
    moves = torch.randint(grid.jitter_width + 1, (n_images, CELLS, 2), generator=generator, device=device)
    return _on(tuple(map(grid.lowest_corner, range(CELLS))), device) + moves
