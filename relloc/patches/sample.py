"""Where the nine patches of each image lie: a grid plus chance, from a generator that is passed in."""

import torch
from jaxtyping import Int
from torch import Tensor

from relloc.geometry import CELLS, PatchGrid


def sample_corners(grid: PatchGrid, n_images: int, generator: torch.Generator) -> Int[Tensor, "b 9 2"]:
    """Top left corners (row, column) of nine patches in a span_px square, each moved on its own.

    Uniform over the whole pixels of the jitter range, both ends included, on the generator's device.
    """
    device = generator.device
    lowest = torch.tensor([grid.lowest_corner(cell) for cell in range(CELLS)], device=device)
    moves = torch.randint(grid.jitter_width + 1, (n_images, CELLS, 2), generator=generator, device=device)
    return lowest + moves
