"""Makes the squares of a batch of images on a device, as `relloc.data.cuts` makes one by Pillow.

A resize is separable: one axis after the other, each pixel of the result is a weighted sum of some
pixels of the image. Pillow computes in whole numbers, with weights of 22 bits, and so does this:
pixels are equal to the bit, on any device. On a GPU two kernels take all images of a batch at once
(`relloc.data.resampling_kernel`), whatever their sizes; on a CPU images come one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from relloc.data.cuts import BatchCuts, BatchResampling

ImageTensor = UInt8[Tensor, "3 _h _w"]

# Bits behind the point of Pillow's weights (PRECISION_BITS in libImaging/Resample.c)
WEIGHT_BITS = 22
# Weights that are made at once: 256 MB in float64, and several times that meanwhile
_MOST_WEIGHTS = 32_000_000
_ROWS, _COLUMNS = 0, 1


class Filters(NamedTuple):
    """How much each pixel of an axis counts in each pixel of the result, of a batch of images.

    Pixel x of the result of an image is the sum over t of `weights[axis, image, t, x]` times pixel
    `first[axis, image, x] + t`, divided by 2^22. Pixels are counted from the first that is needed.
    Those beyond the last one have weight 0.
    """

    first: Int32[Tensor, "2 b n_new"]
    weights: Int32[Tensor, "2 b taps n_new"]


@torch.no_grad()
def squares(images: Sequence[ImageTensor], cuts: BatchCuts) -> UInt8[Tensor, "b 3 s s"]:
    """Returns the squares of images, which lie on one device and may have different sizes.

    The result lies in memory with channels last.

    Raises (on a GPU):
        ImportError, OSError, RuntimeError, SubprocessError, TritonError: the kernel can't be
            compiled.
    """
    device = images[0].device
    half = len(images) // 2
    # Weights of all images have the room of the largest filter, which one huge image makes huge.
    if half and _most_weights(cuts) > _MOST_WEIGHTS:
        parts = (range(half), range(half, len(images)))
        halves = [squares([images[n] for n in part], cuts.at(part)) for part in parts]
        return torch.cat(halves)
    if device.type == "cuda":
        # Triton comes with builds of torch for GPUs alone.
        from relloc.data.resampling_kernel import squares_by_kernel

        return squares_by_kernel(images, cuts)
    resampled = list(images)
    for step in cuts.steps:
        filters = filters_of(step, device)
        for place, image in enumerate(resampled):
            resampled[place] = _resampled(image, step, filters, place)
    rows = torch.stack([image.permute(1, 2, 0) for image in resampled])
    mirrored = torch.from_numpy(cuts.mirrored)
    rows = torch.where(mirrored[:, None, None, None], rows.flip(2), rows)
    return rows.permute(0, 3, 1, 2)


def filters_of(step: BatchResampling, device: torch.device) -> Filters:
    """Returns the filters of both axes, as precompute_coeffs of Pillow's Resample.c makes them."""
    columns = [step.start, step.scale, step.reach, step.length, step.first, step.size]
    facts = np.stack([column.T for column in columns])  # (6 2 b)
    # One copy takes them to the device. In float64 and in the order of Pillow's operations: rounded
    # to 22 bits, weights are then the same.
    on_device = to_device(facts, device)
    start, scale, reach, length, before, n_new = on_device[..., None, None].unbind()

    # Where the center of each new pixel lies (2 b 1 n_new), and the pixels around it that the
    # filter may reach (2 b taps n_new), counted from the first that is needed. Those that may be
    # read begin `before` pixels earlier.
    new_pixels = torch.arange(int(step.size.max()), device=device)
    centers = start + (new_pixels + 0.5) * scale
    first = ((centers - reach).floor() - before).clamp(min=0)
    n_taps = int(step.taps().max())
    pixels = first + torch.arange(n_taps, device=device)[:, None] + before

    # A triangle around the center. At a border, the pixels that are there count more.
    weights = (1 - ((pixels - centers + 0.5) * (1 / reach)).abs()).clamp(min=0)
    weights = weights * ((pixels < length) & (new_pixels < n_new))
    sums = weights.sum(dim=2, keepdim=True)
    weights = weights / sums.where(sums > 0, 1.0)
    # Rounded as Pillow does
    weights = (weights * 2**WEIGHT_BITS + 0.5).floor().int()
    # The kernel counts on this order in memory.
    return Filters(first=first[:, :, 0].int().contiguous(), weights=weights.contiguous())


def _most_weights(cuts: BatchCuts) -> int:
    """Returns how many weights the step that has most of them has."""
    return max(
        2 * len(step.size) * int(step.taps().max()) * int(step.size.max()) for step in cuts.steps
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns an array on a device, whose copy a GPU makes beside other work."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _resampled(
    image: ImageTensor, step: BatchResampling, filters: Filters, place: int
) -> ImageTensor:
    """Returns the image at `place` of a batch resampled on a CPU."""
    for axis in (_ROWS, _COLUMNS):
        image = image.narrow(axis + 1, int(step.offset[place, axis]), int(step.needed[place, axis]))
    axes = (_ROWS, _COLUMNS) if step.is_vertical_first[place] else (_COLUMNS, _ROWS)
    for axis in axes:
        n_new = int(step.size[place, axis])
        first = filters.first[axis, place, :n_new]
        # The axis that is resized comes last: (3, other axis, pixels)
        lines = image if axis == _COLUMNS else image.mT
        sums = torch.full((*lines.shape[:2], n_new), 2 ** (WEIGHT_BITS - 1), dtype=torch.int32)
        for tap in range(int(step.taps()[place, axis])):
            # Pixels beyond the last one have weight 0.
            pixels = (first + tap).clamp(max=lines.shape[2] - 1)
            sums += lines[..., pixels].int() * filters.weights[axis, place, tap, :n_new]
        lines = (sums >> WEIGHT_BITS).to(torch.uint8)
        image = lines if axis == _COLUMNS else lines.mT
    return image
