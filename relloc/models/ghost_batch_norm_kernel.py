"""Ghost batch norm in training by kernels of its own, which need no compiling of the network.

Maps in channels-last memory are matrices of (rows h w) x c, and so are vectors (rows c). Rows of
such a matrix are called pixels here. A *segment* is one group of one ghost batch, and all its
numbers, such as mean and scale, are float32 tensors (segments c). Blocks have equally many pixels
(`relloc.models.ghost_batch_norm`), and each belongs to one segment. So a program takes some pixels
of one block, and knows nothing of groups but where the numbers of its segment are.

Each direction is one reduction and one pass that writes:

* forward: sums of x and of its square; then y = relu(scale x + shift + residual).
* backward: sums of g and of g (x - mean); then the gradient of x, scale g + slope x + offset. Here
  g is the gradient of y where y is above zero. With a residual the first pass writes g, which is
  the gradient of the residual, and the second need not look at y any more. Without one, the sign of
  y is computed again from x, which is read anyway.

A program of a reduction writes the sums of its part of a block, and a second small kernel adds the
parts of each segment, always in the same order. Sizes of tiles follow from the number of channels
alone, since to try several would take longer than to compile a network.

Import this module only where Triton works, so on a GPU. Triton decides at its import whether
kernels are interpreted, as tests on a CPU do.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relloc.models.ghost_batch_norm import Groups
from relloc.models.ghost_batch_norm_triton import (
    BACKWARD_NUMBERS,
    FORWARD_NUMBERS,
    GRAD_BIAS,
    GRAD_WEIGHT,
    MASK_OF_INPUT,
    MASK_OF_OUTPUT,
    NO_MASK,
    finish_gradients_kernel,
    finish_statistics_kernel,
    move_kernel,
    sum_gradients_kernel,
    sum_kernel,
    write_gradient_kernel,
    write_kernel,
)

# Values of a tile, which a program reads at once, and the warps that share them: 16 values each
# thread, so two loads of 16 bytes in bfloat16.
_TILE_VALUES = 4096
_WARPS = 8
# 128 channels of bfloat16 are 256 bytes in a row.
_MOST_TILE_CHANNELS = 128
_FEWEST_TILE_CHANNELS = 16
# Programs of a reduction: several times as many as the 132 multiprocessors of an H100 or H200 run
# at once. More of them would leave more parts to add.
_REDUCING_PROGRAMS = 2048
# Tiles that a program of a pass that writes takes, one after the other
_TILES_WRITTEN = 4
# The tile of kernels that add parts
_TILE_PARTS = 64
_TILE_PART_CHANNELS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningStatistics:
    """The running statistics of a batch norm (c), and how far each group moves them."""

    mean: Tensor
    variance: Tensor
    n_tracked: Tensor
    momentum: float


def normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    running: RunningStatistics,
    group_of_block: Tensor,
    groups: Groups,
    eps: float,
    relu: bool = False,
    twice: bool = False,
) -> Any:
    """Returns batch norm of `x`, plus `residual` if there is one, after ReLU if `relu`.

    Moves the running statistics, as `GhostBatchNorm` does.

    Args:
        x: maps (rows c h w) in channels-last memory, or vectors (rows c), of a whole number of
            ghost batches; float32, bfloat16 or float16, and so is the result.
        residual: is added, of the same shape and type.
        weight: of the channels, or None.
        bias: of the channels; None if and only if `weight` is.
        running: is changed.
        group_of_block: the group of each block of a ghost batch.
        groups: which rows share statistics.
        eps: is added to variances.
        relu: whether negative results become zero.
        twice: returns two tensors that share memory. The gradients of both are added where they are
            read, which spares autograd a pass over three tensors. Neither may be written to.
    """
    layout = _Layout.of(x, groups)
    numbers = _statistics(x, weight, bias, group_of_block, layout, eps)
    _move(running, numbers, layout)
    return _Normalize.apply(x, residual, weight, bias, numbers, group_of_block, layout, relu, twice)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """Sizes of a batch, and how programs divide it.

    Attributes:
        c: channels.
        pixels: pixels of a block.
        n_blocks: blocks of the whole batch.
        blocks: blocks of a ghost batch.
        n_groups: groups of a ghost batch.
    """

    c: int
    pixels: int
    n_blocks: int
    blocks: int
    n_groups: int

    @classmethod
    def of(cls, x: Tensor, groups: Groups) -> "_Layout":
        n_blocks = len(x) // groups.images
        c = x.shape[1]
        return cls(
            c=c,
            pixels=x.numel() // c // n_blocks,
            n_blocks=n_blocks,
            blocks=groups.blocks,
            n_groups=len(groups.rows_per_image),
        )

    @property
    def segments(self) -> int:
        return self.n_blocks // self.blocks * self.n_groups

    @property
    def tile_c(self) -> int:
        """The channels of a tile, a power of two."""
        at_least = max(_power_of_two(self.c), _FEWEST_TILE_CHANNELS)
        return min(at_least, _MOST_TILE_CHANNELS)

    @property
    def tile_pixels(self) -> int:
        return _TILE_VALUES // self.tile_c

    @property
    def c_tiles(self) -> int:
        return _divide_up(self.c, self.tile_c)

    @property
    def part_c_tiles(self) -> int:
        """Tiles of channels in kernels that add parts."""
        return _divide_up(self.c, _TILE_PART_CHANNELS)

    @property
    def pixels_reduced(self) -> int:
        """Pixels of the part that a program of a reduction takes: a whole number of tiles."""
        parts_wanted = _divide_up(_REDUCING_PROGRAMS, self.n_blocks * self.c_tiles)
        tiles = _divide_up(_divide_up(self.pixels, parts_wanted), self.tile_pixels)
        return tiles * self.tile_pixels

    @property
    def pixels_written(self) -> int:
        """Pixels that a program of a pass that writes takes."""
        return _TILES_WRITTEN * self.tile_pixels

    def parts(self, pixels_of_part: int) -> int:
        """Returns the number of parts of each block."""
        return _divide_up(self.pixels, pixels_of_part)

    def empty_parts(self, x: Tensor) -> Tensor:
        """Returns memory for two sums of each part that a reduction sums."""
        n_parts = self.n_blocks * self.parts(self.pixels_reduced)
        return torch.empty((2, n_parts, self.c), dtype=torch.float32, device=x.device)

    def empty_numbers(self, kinds: int, x: Tensor) -> Tensor:
        """Returns memory for so many kinds of numbers of each segment."""
        return torch.empty((kinds, self.segments, self.c), dtype=torch.float32, device=x.device)


def _statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group_of_block: Tensor,
    layout: _Layout,
    eps: float,
) -> Tensor:
    """Returns the numbers of each segment that the forward needs."""
    sums = layout.empty_parts(x)
    parts = layout.parts(layout.pixels_reduced)
    sum_kernel[(layout.n_blocks * parts * layout.c_tiles,)](
        x,
        sums,
        layout.c,
        layout.n_blocks * parts,
        parts,
        layout.pixels,
        layout.pixels_reduced,
        TILE_PIXELS=layout.tile_pixels,
        TILE_C=layout.tile_c,
        num_warps=_WARPS,  # pyright: ignore[reportCallIssue] - an option of Triton
    )
    numbers = layout.empty_numbers(FORWARD_NUMBERS, x)
    finish_statistics_kernel[(layout.segments * layout.part_c_tiles,)](
        x,
        sums,
        x if weight is None else weight,
        x if bias is None else bias,
        numbers,
        group_of_block,
        layout.c,
        layout.n_blocks * parts,
        parts,
        layout.pixels,
        layout.blocks,
        layout.n_groups,
        layout.segments,
        eps,
        AFFINE=weight is not None,
        TILE_BLOCKS=_power_of_two(layout.blocks),
        TILE_PARTS=_TILE_PARTS,
        TILE_C=_TILE_PART_CHANNELS,
    )
    return numbers


def _move(running: RunningStatistics, numbers: Tensor, layout: _Layout) -> None:
    """Moves the running statistics by those of each segment, from the first to the last."""
    kept = 1 - running.momentum
    move_kernel[(layout.part_c_tiles,)](
        numbers,
        running.mean,
        running.variance,
        running.n_tracked,
        layout.c,
        layout.segments,
        running.momentum,
        # A power of zero is zero: 2 to any number below -150 is, in float32.
        math.log2(kept) if kept > 0 else -1000.0,
        kept**layout.segments,
        TILE_SEGMENTS=_TILE_PARTS,
        TILE_C=_TILE_PART_CHANNELS,
    )


class _Normalize(torch.autograd.Function):
    """The pass that writes, and the backward of it and of the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        numbers: Tensor,
        group_of_block: Tensor,
        layout: _Layout,
        relu: bool,
        twice: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.empty_like(x)
        parts = layout.parts(layout.pixels_written)
        write_kernel[(layout.n_blocks * parts * layout.c_tiles,)](
            x,
            x if residual is None else _like(residual, x),
            y,
            numbers,
            group_of_block,
            layout.c,
            parts,
            layout.pixels,
            layout.pixels_written,
            layout.blocks,
            layout.n_groups,
            layout.segments,
            RESIDUAL=residual is not None,
            RELU=relu,
            TILE_PIXELS=layout.tile_pixels,
            TILE_C=layout.tile_c,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue] - an option of Triton
        )
        ctx.has_residual = residual is not None
        ctx.is_affine = weight is not None
        ctx.layout = layout
        ctx.relu = relu
        needs_y = relu and residual is not None
        ctx.save_for_backward(x, y if needs_y else None, numbers, group_of_block)
        # An output without a gradient is told by None, where zeros would have to be read.
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if twice else y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        *grads: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, y, numbers, group_of_block = ctx.saved_tensors
        layout: _Layout = ctx.layout
        incoming = [_like(grad, x) for grad in grads if grad is not None]
        if not incoming:
            return (None,) * 9
        grad, again = incoming[0], incoming[-1]
        mask = NO_MASK.value
        if ctx.relu:
            mask = MASK_OF_INPUT.value if y is None else MASK_OF_OUTPUT.value
        # Where two gradients are added, or y says what is masked, the first pass writes the result.
        writes = len(incoming) > 1 or y is not None
        masked = torch.empty_like(x) if writes else grad
        sums = layout.empty_parts(x)
        parts = layout.parts(layout.pixels_reduced)
        sum_gradients_kernel[(layout.n_blocks * parts * layout.c_tiles,)](
            grad,
            again,
            x,
            x if y is None else y,
            masked,
            numbers,
            group_of_block,
            sums,
            layout.c,
            layout.n_blocks * parts,
            parts,
            layout.pixels,
            layout.pixels_reduced,
            layout.blocks,
            layout.n_groups,
            layout.segments,
            MASK=mask,
            TWO=len(incoming) > 1,
            WRITES=writes,
            TILE_PIXELS=layout.tile_pixels,
            TILE_C=layout.tile_c,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue] - an option of Triton
        )
        slopes = layout.empty_numbers(BACKWARD_NUMBERS, x)
        finish_gradients_kernel[(layout.segments * layout.part_c_tiles,)](
            sums,
            numbers,
            slopes,
            group_of_block,
            layout.c,
            layout.n_blocks * parts,
            parts,
            layout.pixels,
            layout.blocks,
            layout.n_groups,
            layout.segments,
            TILE_BLOCKS=_power_of_two(layout.blocks),
            TILE_PARTS=_TILE_PARTS,
            TILE_C=_TILE_PART_CHANNELS,
        )
        grad_x = torch.empty_like(x)
        parts_written = layout.parts(layout.pixels_written)
        write_gradient_kernel[(layout.n_blocks * parts_written * layout.c_tiles,)](
            masked,
            x,
            grad_x,
            numbers,
            slopes,
            group_of_block,
            layout.c,
            parts_written,
            layout.pixels,
            layout.pixels_written,
            layout.blocks,
            layout.n_groups,
            layout.segments,
            MASKED=writes or mask == NO_MASK.value,
            TILE_PIXELS=layout.tile_pixels,
            TILE_C=layout.tile_c,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue] - an option of Triton
        )
        grad_weight, grad_bias = None, None
        if ctx.is_affine:
            # Weight and bias are shared by all segments.
            of_segments = slopes[GRAD_WEIGHT.value : GRAD_BIAS.value + 1]
            grad_weight, grad_bias = of_segments.sum(1)
        grad_residual = masked if ctx.has_residual else None
        return grad_x, grad_residual, grad_weight, grad_bias, *(None,) * 5


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _like(other: Tensor, x: Tensor) -> Tensor:
    """Returns `other` in the memory order of `x`; it is copied only where it has another one."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)
