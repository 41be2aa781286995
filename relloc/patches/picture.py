"""A picture of what the network is asked: the grid on each image, and the patches as it sees them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

import matplotlib.pyplot as plt
import torch
from jaxtyping import UInt8
from matplotlib.patches import Rectangle
from torch import Tensor

from relloc.files import writing
from relloc.geometry import CENTER
from relloc.patches.pipeline import PatchPipeline
from relloc.seeds import Use, seed_for


def draw_patches(images: UInt8[Tensor, "b 3 s s"], pipeline: PatchPipeline, path: Path, *, seed: int) -> None:
    """Save a column an image: the crop with its nine boxes above, its patches after treatment below.

    The patches are stretched to the range of each image's own, since a normalized patch has no
    colors of its own.
    """
    grid = pipeline.grid
    generator = torch.Generator().manual_seed(seed_for(Use.PICTURE_PATCHES, seed))
    corners, *drawn = pipeline.draw(len(images), generator)
    patches = pipeline.make(images, corners, *drawn)
    figure, axes = plt.subplots(2, len(images), figsize=(2.4 * len(images), 5), squeeze=False, layout="constrained")
    for column in range(len(images)):
        axes[0, column].imshow(images[column].permute(1, 2, 0).numpy())
        for cell, (top, left) in enumerate(corners[column].tolist()):
            color = "red" if cell == CENTER else "white"
            box = Rectangle((left, top), grid.patch_px, grid.patch_px, fill=False, edgecolor=color, linewidth=1.2)
            axes[0, column].add_patch(box)
        axes[1, column].imshow(_mosaic(patches[column], corners[column], grid.span_px).numpy())
        for axis in axes[:, column]:
            axis.set_axis_off()
    axes[0, 0].set_title(
        f"{grid.patch_px} px patches, gap {grid.gap_px} px, jitter {grid.jitter_px}", loc="left", fontsize=9
    )
    axes[1, 0].set_title("as the network sees them", loc="left", fontsize=9)
    with writing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _mosaic(patches: Tensor, corners: Tensor, span_px: int) -> Tensor:
    low, high = patches.amin(), patches.amax()
    shown = (patches - low) / (high - low).clamp(min=1e-6)
    canvas = torch.ones(span_px, span_px, 3)
    side = patches.shape[-1]
    for patch, (top, left) in zip(shown, corners.tolist(), strict=True):
        canvas[top : top + side, left : left + side] = patch.permute(1, 2, 0)
    return canvas
