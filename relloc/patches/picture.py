"""Draws a picture of the pretext task: each image with its grid, and its patches below.

It shows what the network is asked, and whether patches and color treatment are as intended.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files and needs no display

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from relloc.files import writing
from relloc.geometry import CELLS, CENTER, PatchGrid
from relloc.patches.pipeline import PatchPipeline
from relloc.seeds import Use, seed_for


def draw_patches(
    images: UInt8[Tensor, "b 3 s s"],
    pipeline: PatchPipeline,
    path: Path,
    *,
    seed: int,
) -> None:
    """Saves a PNG with one column for each image.

    The upper row shows the crop with a box for each patch, the center in red. The lower row shows
    the patches as the network sees them. Normalized patches are no colors, so the range of values
    of each image is stretched to the range that can be shown.
    """
    grid = pipeline.grid
    generator = torch.Generator().manual_seed(seed_for(Use.PICTURE_PATCHES, seed))
    # Boxes and patches come from the same draw, so that the picture shows what was really cut.
    drawn = pipeline.draw(len(images), generator)
    patches = pipeline.make(images, *drawn)
    corners = drawn[0]
    sides = torch.full(corners.shape[:2], grid.patch_px)
    if grid.scale is not None:
        sides = grid.patch_px / drawn[1]

    n_columns = len(images)
    figure, axes = plt.subplots(
        nrows=2,
        ncols=n_columns,
        figsize=(2.4 * n_columns, 5),
        squeeze=False,
        layout="constrained",
    )
    for column, image in enumerate(images):
        upper, lower = axes[:, column]
        upper.imshow(image.permute(1, 2, 0).numpy())
        # Each box lies in the middle of its cell.
        tops_lefts = corners[column] + (grid.cell_px - sides[column, :, None]) / 2
        _draw_boxes(upper, tops_lefts, sides[column])
        mosaic = _mosaic(patches[column], corners[column], grid)
        lower.imshow(mosaic.numpy())
        upper.set_axis_off()
        lower.set_axis_off()
    settings = f"{grid.patch_px} px patches, gap {grid.gap_px} px, jitter {grid.jitter_px}"
    axes[0, 0].set_title(settings, loc="left", fontsize=9)
    axes[1, 0].set_title("as the network sees them", loc="left", fontsize=9)
    with writing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _draw_boxes(
    axis: Axes, tops_lefts: Float[Tensor, "cells 2"], sides: Num[Tensor, "cells"]
) -> None:
    boxes = zip(tops_lefts.tolist(), sides.tolist(), strict=True)
    for cell, ((top, left), side) in enumerate(boxes):
        color = "red" if cell == CENTER and len(tops_lefts) == CELLS else "white"
        box = Rectangle(
            (left, top),
            width=side,
            height=side,
            fill=False,
            edgecolor=color,
            linewidth=1.2,
        )
        axis.add_patch(box)


def _mosaic(
    patches: Float[Tensor, "cells 3 p p"], corners: Int[Tensor, "cells 2"], grid: PatchGrid
) -> Float[Tensor, "span span 3"]:
    """Puts the patches of an image at their corners on a white canvas, stretched to 0..1.

    Where patches are cut at several sizes, the canvas is scaled so that they fill their cells.
    """
    low = patches.amin()
    value_range = patches.amax() - low
    # A flat image would divide by zero.
    stretched = (patches - low) / value_range.clamp(min=1e-6)
    side = grid.patch_px
    canvas_px = math.ceil(grid.span_px * side / grid.cell_px)
    corners = corners * side // grid.cell_px
    canvas = torch.ones(canvas_px, canvas_px, 3)
    for patch, (top, left) in zip(stretched, corners.tolist(), strict=True):
        rows = slice(top, top + side)
        columns = slice(left, left + side)
        canvas[rows, columns] = patch.permute(1, 2, 0)
    return canvas
