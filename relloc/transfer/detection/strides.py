"""How far apart the cells of a map are, which the stages of a backbone make."""

import copy

import torch
from torch import nn

# Sides of the images on which strides are measured. They are multiples of any stride of a stage.
_MEASURED_SIDES = (512, 1024)


def stride_of(stages: nn.Module) -> int:
    """Returns by how many pixels the cells of the map that `stages` make are apart.

    It is measured, as rounding and padding of layers differ: twice the image has more cells.
    """
    # The meta device computes shapes without numbers, and thus without changing statistics.
    shapes_only = copy.deepcopy(stages).to("meta").eval()
    rows = []
    for side in _MEASURED_SIDES:
        image = torch.zeros(1, 3, side, side, device="meta")
        rows.append(shapes_only(image).shape[-2])
    # Padding adds as many cells to both maps, so the difference is free of it.
    fewer_rows, more_rows = rows
    smaller_side, larger_side = _MEASURED_SIDES
    return (larger_side - smaller_side) // (more_rows - fewer_rows)
