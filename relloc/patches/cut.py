"""Cuts patches out of a batch of images."""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor


def cut(
    images: UInt8[Tensor, "b 3 h w"],
    corners: Int[Tensor, "b n 2"],
    patch_px: int,
) -> UInt8[Tensor, "b n 3 p p"]:
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
