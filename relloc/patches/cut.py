"""Cutting patches out of a batch of images."""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor


def cut(images: UInt8[Tensor, "b 3 h w"], corners: Int[Tensor, "b n 2"], patch_px: int) -> UInt8[Tensor, "b n 3 p p"]:
    """The `patch_px` squares of each image whose top left corners (row, column) are given.

    Raises:
        IndexError: a patch reaches beyond its image.
    """
    windows = images.unfold(2, patch_px, 1).unfold(3, patch_px, 1)  # a view: b 3 rows columns p p
    image = torch.arange(len(images), device=images.device).unsqueeze(1)
    corners = corners.where(corners >= 0, max(images.shape[-2:]))  # negative ones would count from the end
    patches = windows[image, :, corners[..., 0], corners[..., 1]]
    # Images come pixel after pixel, and a CPU is faster on whole planes; compiled code finds its own layout.
    return patches if patches.is_cuda or torch.compiler.is_compiling() else patches.contiguous()
