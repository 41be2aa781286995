"""Max pooling of channels-last maps on a GPU, forward and backward, by kernels of its own.

torch's backward adds gradients in an order that changes from call to call where windows overlap, so
that two trainings of one seed may differ in their last bits. Forward and backward took 4.3 of the
54 ms of a step of a ResNet-50 (docs/benchmarks.md). Here the forward keeps which pixel of its
window each result is, and each pixel of the gradient adds those of the windows that took it, always
in the same order.

Import this module only where Triton works, as `relloc.models.ghost_batch_norm_kernel`.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Values that a program computes, and the most channels of them
_TILE_VALUES = 2048
_MOST_TILE_CHANNELS = 128


def max_pool(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """Returns what `pool` returns of maps (rows c h w) in channels-last memory.

    Windows are squares, which are not dilated.
    """
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    return _MaxPool.apply(x, *map(int, sizes))  # pyright: ignore[reportReturnType, reportArgumentType]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        # It is so already where the stem wrote it.
        x = x.contiguous(memory_format=torch.channels_last)
        rows, c, height, width = x.shape
        new_height, new_width = (
            (side + 2 * padding - kernel) // stride + 1 for side in (height, width)
        )
        y = x.new_empty((rows, new_height, new_width, c)).permute(0, 3, 1, 2)
        taken = torch.empty_like(y, dtype=torch.uint8)
        _launch(_pool_kernel, (x, y, taken), y, x, (kernel, stride, padding))
        ctx.save_for_backward(taken)
        ctx.geometry = (kernel, stride, padding)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (taken,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        rows, c, height, width = ctx.shape
        grad_x = grad.new_empty((rows, height, width, c)).permute(0, 3, 1, 2)
        _launch(_gradient_kernel, (grad, taken, grad_x), grad_x, grad, ctx.geometry)
        return grad_x, None, None, None


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    written: Tensor,
    read: Tensor,
    geometry: tuple[int, int, int],
) -> None:
    """Runs a kernel, each program of which writes some pixels of `written`."""
    rows, c, height, width = written.shape
    tile_c = min(triton.next_power_of_2(c), _MOST_TILE_CHANNELS)
    tile_pixels = _TILE_VALUES // tile_c
    size, stride, padding = geometry
    n_pixels = rows * height * width
    grid = (triton.cdiv(n_pixels, tile_pixels), triton.cdiv(c, tile_c))
    kernel[grid](
        *tensors,
        n_pixels,
        c,
        height,
        width,
        read.shape[2],
        read.shape[3],
        SIZE=size,
        STRIDE=stride,
        PADDING=padding,
        TILE_PIXELS=tile_pixels,
        TILE_C=tile_c,
    )


@triton.jit
@no_type_check
def _pool_kernel(
    x,
    y,
    taken,
    n_pixels,
    c,
    new_height,
    new_width,
    height,
    width,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Writes the largest value of each window, and which of its pixels has it: the first one."""
    pixel = (tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS))[:, None]
    channel = (tl.program_id(1) * TILE_C + tl.arange(0, TILE_C))[None, :]
    is_there = (pixel < n_pixels) & (channel < c)
    row = pixel // (new_height * new_width)
    top = (pixel // new_width % new_height) * STRIDE - PADDING
    left = (pixel % new_width) * STRIDE - PADDING
    image = row.to(tl.int64) * height * width
    largest = tl.full((TILE_PIXELS, TILE_C), float("-inf"), tl.float32)
    number = tl.full((TILE_PIXELS, TILE_C), 0, tl.int32)
    for down in tl.static_range(SIZE):
        for right in tl.static_range(SIZE):
            is_inside = (
                (top + down >= 0)
                & (top + down < height)
                & (left + right >= 0)
                & (left + right < width)
            )
            place = (image + (top + down) * width + left + right) * c + channel
            value = tl.load(x + place, mask=is_there & is_inside, other=float("-inf"))
            value = value.to(tl.float32)
            # NaN is passed on, as torch does it.
            is_larger = (value > largest) | (value != value)
            largest = tl.where(is_larger, value, largest)
            number = tl.where(is_larger, down * SIZE + right, number)
    place = pixel.to(tl.int64) * c + channel
    tl.store(y + place, largest.to(y.dtype.element_ty), mask=is_there)
    tl.store(taken + place, number.to(tl.uint8), mask=is_there)


@triton.jit
@no_type_check
def _gradient_kernel(
    grad,
    taken,
    grad_x,
    n_pixels,
    c,
    height,
    width,
    new_height,
    new_width,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Writes, for each pixel, the sum of the gradients of those windows that took it."""
    pixel = (tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS))[:, None]
    channel = (tl.program_id(1) * TILE_C + tl.arange(0, TILE_C))[None, :]
    is_there = (pixel < n_pixels) & (channel < c)
    row = pixel // (height * width)
    padded_row = pixel // width % height + PADDING
    padded_column = pixel % width + PADDING
    image = row.to(tl.int64) * new_height * new_width
    total = tl.full((TILE_PIXELS, TILE_C), 0, tl.float32)
    for down in tl.static_range(SIZE):
        for right in tl.static_range(SIZE):
            # The window in which this pixel is `down` rows and `right` columns from the first
            below = padded_row - down
            beside = padded_column - right
            is_window = (
                (below >= 0)
                & (below % STRIDE == 0)
                & (below // STRIDE < new_height)
                & (beside >= 0)
                & (beside % STRIDE == 0)
                & (beside // STRIDE < new_width)
            )
            place = (image + (below // STRIDE) * new_width + beside // STRIDE) * c + channel
            mask = is_there & is_window
            number = tl.load(taken + place, mask=mask, other=255).to(tl.int32)
            value = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(number == down * SIZE + right, value, 0.0)
    place = pixel.to(tl.int64) * c + channel
    tl.store(grad_x + place, total.to(grad_x.dtype.element_ty), mask=is_there)
