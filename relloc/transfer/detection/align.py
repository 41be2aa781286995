"""The features of regions by RoIAlign."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import roi_align

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
    # torchvision takes the number of the image and the corners as one row of floats.
    image_column = images.unsqueeze(1).float()
    rows = torch.cat([image_column, boxes.float()], dim=1)
    # torchvision's decorator hides the type of roi_align from pyright.
    aligned = roi_align(  # pyright: ignore[reportCallIssue]
        features.float(),
        rows,
        output_size=side,
        spatial_scale=1 / stride,
        sampling_ratio=_ADAPTIVE_SAMPLING,
        aligned=True,
    )
    # RoIAlign gives the contiguous layout, and convolutions in another one are slower.
    layout = torch.contiguous_format
    if features.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return aligned.to(features.dtype, memory_format=layout)
