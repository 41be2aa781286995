"""The features of regions of a map, by RoIAlign and by RoI max pooling."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import roi_align, roi_pool

# As many sample points in each bin as it has pixels of the map.
_ADAPTIVE_SAMPLING = 0


def align(
    features: Float[Tensor, "b c h w"],
    boxes: Float[Tensor, "n 4"],
    images: Int[Tensor, "n"],
    *,
    side: int,
    stride: int,
) -> Float[Tensor, "n c side side"]:
    """Returns the features of each region by RoIAlign, aligned, and sampled at every pixel.

    `stride` is that of the map. The computation is in float32, as in bfloat16 coordinates would be
    wrong by pixels. The result has the type and the memory layout of the features.
    """
    # torchvision's decorators hide the types of its functions from pyright.
    aligned = roi_align(  # pyright: ignore[reportCallIssue]
        features.float(),
        _rows(boxes, images),
        output_size=side,
        spatial_scale=1 / stride,
        sampling_ratio=_ADAPTIVE_SAMPLING,
        aligned=True,
    )
    return _like(features, aligned)


def pool_regions(
    features: Float[Tensor, "b c h w"],
    boxes: Float[Tensor, "n 4"],
    images: Int[Tensor, "n"],
    *,
    side: int,
    stride: int,
) -> Float[Tensor, "n c side side"]:
    """Returns the largest values in the cells of each region, whose corners are rounded to the map.

    Arguments, precision and layout are those of `align`.
    """
    cells = roi_pool(  # pyright: ignore[reportCallIssue]
        features.float(),
        _rows(boxes, images),
        output_size=side,
        spatial_scale=1 / stride,
    )
    return _like(features, cells)


def _rows(boxes: Float[Tensor, "n 4"], images: Int[Tensor, "n"]) -> Float[Tensor, "n 5"]:
    """Returns the number of the image and the corners in a row of floats, as torchvision's."""
    image_column = images.unsqueeze(1).float()
    return torch.cat([image_column, boxes.float()], dim=1)


def _like(
    features: Float[Tensor, "b c h w"], cells: Float[Tensor, "n c side side"]
) -> Float[Tensor, "n c side side"]:
    """Returns the cells in the type and the memory layout of the features."""
    # torchvision gives the contiguous layout, and convolutions in another one are slower.
    layout = torch.contiguous_format
    if features.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return cells.to(features.dtype, memory_format=layout)
