"""Cuts patches out of a batch of images, and resizes them where the grid has a scale."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from relloc.geometry import PatchGrid


def cut_patches(
    images: Num[Tensor, "b 3 h w"],
    grid: PatchGrid,
    corners: Int[Tensor, "b n 2"],
    scales: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n 3 p p"]:
    """Returns the patches of a grid as numbers from 0 to 255; `sample_places` gives the places.

    Raises:
        IndexError: a patch reaches beyond its image.
    """
    cells = cut(images, corners, grid.cell_px).float()
    if scales is None:
        return cells
    return rescale(cells, scales, grid.patch_px)


def cut(
    images: Num[Tensor, "b 3 h w"],
    corners: Int[Tensor, "b n 2"],
    patch_px: int,
) -> Num[Tensor, "b n 3 p p"]:
    """Returns the squares of side `patch_px` whose top left corners (row, column) are given.

    All patches of the batch are gathered by one indexing operation.

    Raises:
        IndexError: a patch reaches beyond its image.
    """
    # All windows of every image at stride 1: a view, which takes no memory (b 3 rows columns p p).
    windows = images.unfold(2, patch_px, 1)
    windows = windows.unfold(3, patch_px, 1)
    # Negative indices would count from the end; an index beyond the last raises IndexError instead.
    height, width = images.shape[-2:]
    out_of_range = max(height, width)
    corners = corners.where(corners >= 0, out_of_range)
    rows, columns = corners.unbind(-1)
    # Indexing broadcasts the image's number over its patches.
    image_indices = torch.arange(
        len(images),
        device=images.device,
    )
    image_indices = image_indices.unsqueeze(1)
    patches = windows[image_indices, :, rows, columns]
    # Decoders leave images with interleaved channels, and a CPU is faster on one plane a channel.
    # On a GPU, and in compiled code, which chooses layouts itself, a copy would gain nothing.
    is_compiled = torch.compiler.is_compiling()
    if patches.is_cuda or is_compiled:
        return patches
    return patches.contiguous()


def rescale(
    cells: Float[Tensor, "b n 3 w w"],
    scales: Float[Tensor, "b n"],
    patch_px: int,
) -> Float[Tensor, "b n 3 p p"]:
    """Returns patches of side `patch_px`, which show the middle of `cells` enlarged by `scales`.

    Resizes as Pillow does with bilinear interpolation, which averages where it reduces, but without
    rounding to whole gray levels.
    """
    side = cells.shape[-1]
    # Positions along a side, with the middle of the first pixel at 0.5
    of_patch = torch.arange(patch_px, device=cells.device) + 0.5
    of_cell = torch.arange(side, device=cells.device) + 0.5
    # The middle of each pixel of a patch, in pixels of its cell (b n p)
    from_middle = of_patch - patch_px / 2
    centers = side / 2 + from_middle / scales.unsqueeze(-1)
    # The triangle of the interpolation reaches one pixel of the cell to each side, or one pixel of
    # the patch where that is larger.
    reach = (1 / scales).clamp(min=1)
    distances = of_cell - centers.unsqueeze(-1)
    weights = 1 - distances.abs() / reach[..., None, None]
    weights = weights.clamp(min=0)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    # Each side is resized by a matrix product, in float32 also where autocast is on: 8 bits of
    # bfloat16 would be as coarse as gray levels.
    with torch.autocast(cells.device.type, enabled=False):
        rows_resized = torch.einsum("bnpw, bncwv -> bncpv", weights, cells)
        return torch.einsum("bnqv, bncpv -> bncpq", weights, rows_resized)
