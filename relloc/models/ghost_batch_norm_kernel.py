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
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from relloc.models.ghost_batch_norm import Groups

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
# A program of a reduction reads its next tiles while it adds one: sums keep so many registers that
# too few programs fit on a multiprocessor to hide how long a read takes.
_STAGES = tl.constexpr(3)
# Tiles that a program of a pass that writes takes, one after the other
_TILES_WRITTEN = 4
# The tile of kernels that add parts
_TILE_PARTS = 64
_TILE_PART_CHANNELS = 32

# Which numbers of segments stand where in the tensor that the forward makes
_MEAN = tl.constexpr(0)
_INVERSE_STD = tl.constexpr(1)
_SCALE = tl.constexpr(2)
_SHIFT = tl.constexpr(3)
_VARIANCE = tl.constexpr(4)  # unbiased
_FORWARD_NUMBERS = 5
# and in that of the backward
_SLOPE = tl.constexpr(0)
_OFFSET = tl.constexpr(1)
_GRAD_WEIGHT = tl.constexpr(2)
_GRAD_BIAS = tl.constexpr(3)
_BACKWARD_NUMBERS = 4

# Where the backward sees which values ReLU let through
_NO_MASK = tl.constexpr(0)
_MASK_OF_INPUT = tl.constexpr(1)
_MASK_OF_OUTPUT = tl.constexpr(2)


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
    _sum_kernel[(layout.n_blocks * parts * layout.c_tiles,)](
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
    numbers = layout.empty_numbers(_FORWARD_NUMBERS, x)
    _finish_statistics_kernel[(layout.segments * layout.part_c_tiles,)](
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
    _move_kernel[(layout.part_c_tiles,)](
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
        _write_kernel[(layout.n_blocks * parts * layout.c_tiles,)](
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
        mask = _NO_MASK.value
        if ctx.relu:
            mask = _MASK_OF_INPUT.value if y is None else _MASK_OF_OUTPUT.value
        # Where two gradients are added, or y says what is masked, the first pass writes the result.
        writes = len(incoming) > 1 or y is not None
        masked = torch.empty_like(x) if writes else grad
        sums = layout.empty_parts(x)
        parts = layout.parts(layout.pixels_reduced)
        _sum_gradients_kernel[(layout.n_blocks * parts * layout.c_tiles,)](
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
        slopes = layout.empty_numbers(_BACKWARD_NUMBERS, x)
        _finish_gradients_kernel[(layout.segments * layout.part_c_tiles,)](
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
        _write_gradient_kernel[(layout.n_blocks * parts_written * layout.c_tiles,)](
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
            MASKED=writes or mask == _NO_MASK.value,
            TILE_PIXELS=layout.tile_pixels,
            TILE_C=layout.tile_c,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue] - an option of Triton
        )
        grad_weight, grad_bias = None, None
        if ctx.is_affine:
            # Weight and bias are shared by all segments.
            of_segments = slopes[_GRAD_WEIGHT.value : _GRAD_BIAS.value + 1]
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


# Numbers whose divisibility tells Triton nothing: else it compiles a kernel anew where one of them
# becomes 1 or a multiple of 16.
_COUNTS = [
    "n_parts",
    "parts",
    "pixels",
    "pixels_of_part",
    "blocks",
    "n_groups",
    "segments",
]


@triton.jit
@no_type_check
def _place(c, parts, pixels, pixels_of_part, TILE_C: tl.constexpr):
    """Returns which part, block and channels a program has, its first pixel, and how many pixels.

    Programs beside one another have channels beside one another. The first pixel is counted in the
    whole batch, in 64 bits.
    """
    c_tiles = tl.cdiv(c, TILE_C)
    part = tl.program_id(0) // c_tiles
    channels = (tl.program_id(0) % c_tiles) * TILE_C + tl.arange(0, TILE_C)
    block = part // parts
    first_in_block = (part % parts) * pixels_of_part
    first = block.to(tl.int64) * pixels + first_in_block
    n = tl.minimum(pixels_of_part, pixels - first_in_block)
    return part, block, channels, first, n


@triton.jit
@no_type_check
def _segment(block, group_of_block, blocks, n_groups):
    """Returns the segment of a block of the batch."""
    group = tl.load(group_of_block + block % blocks).to(tl.int32)
    return (block // blocks) * n_groups + group


@triton.jit
@no_type_check
def _load_number(numbers, kind: tl.constexpr, segment, segments, channels, c):
    place = numbers + (kind * segments + segment) * c + channels
    return tl.load(place, mask=channels < c, other=0.0)


@triton.jit
@no_type_check
def _store_number(numbers, kind: tl.constexpr, segment, segments, channels, c, values):
    tl.store(numbers + (kind * segments + segment) * c + channels, values, mask=channels < c)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _sum_kernel(
    x,
    sums,
    c,
    n_parts,
    parts,
    pixels,
    pixels_of_part,
    TILE_PIXELS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Sums x and its square over each part, after subtracting the batch's first value.

    What is left are numbers of about the size of the deviations, so that their mean square minus
    the square of their mean loses no digits.
    """
    part, _, channels, first, n = _place(c, parts, pixels, pixels_of_part, TILE_C)
    in_c = channels < c
    first_values = tl.load(x + channels, mask=in_c, other=0.0).to(tl.float32)
    x += first * c
    totals = tl.zeros([TILE_PIXELS, TILE_C], tl.float32)
    squares = tl.zeros([TILE_PIXELS, TILE_C], tl.float32)
    for start in tl.range(0, n, TILE_PIXELS, num_stages=_STAGES):
        rows = start + tl.arange(0, TILE_PIXELS)
        inside = (rows < n)[:, None] & in_c[None, :]
        places = rows[:, None] * c + channels[None, :]
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, values - first_values[None, :], 0.0)
        totals += shifted
        squares += shifted * shifted
    tl.store(sums + part * c + channels, tl.sum(totals, 0), mask=in_c)
    tl.store(sums + (n_parts + part) * c + channels, tl.sum(squares, 0), mask=in_c)


@triton.jit
@no_type_check
def _add_parts(
    sums,
    segment,
    channels,
    group_of_block,
    c,
    n_parts,
    parts,
    blocks,
    n_groups,
    TILE_BLOCKS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Returns both sums over all parts of a segment, and the number of its blocks."""
    # The blocks of a group follow one another.
    group = segment % n_groups
    numbers = tl.arange(0, TILE_BLOCKS)
    groups = tl.load(group_of_block + numbers, mask=numbers < blocks, other=n_groups)
    blocks_before = tl.sum((groups < group).to(tl.int32), 0)
    n_blocks = tl.sum((groups == group).to(tl.int32), 0)
    first = (segment // n_groups * blocks + blocks_before) * parts
    n = n_blocks * parts
    one = tl.zeros([TILE_PARTS, TILE_C], tl.float32)
    other = tl.zeros([TILE_PARTS, TILE_C], tl.float32)
    for start in range(0, n, TILE_PARTS):
        rows = start + tl.arange(0, TILE_PARTS)
        inside = (rows < n)[:, None] & (channels < c)[None, :]
        places = (first + rows)[:, None] * c + channels[None, :]
        one += tl.load(sums + places, mask=inside, other=0.0)
        other += tl.load(sums + n_parts * c + places, mask=inside, other=0.0)
    return tl.sum(one, 0), tl.sum(other, 0), n_blocks


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _finish_statistics_kernel(
    x,
    sums,
    weight,
    bias,
    numbers,
    group_of_block,
    c,
    n_parts,
    parts,
    pixels,
    blocks,
    n_groups,
    segments,
    eps,
    AFFINE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Turns sums of parts into the numbers of segments."""
    c_tiles = tl.cdiv(c, TILE_C)
    segment = tl.program_id(0) // c_tiles
    channels = (tl.program_id(0) % c_tiles) * TILE_C + tl.arange(0, TILE_C)
    in_c = channels < c
    total, square, n_blocks = _add_parts(
        sums,
        segment,
        channels,
        group_of_block,
        c,
        n_parts,
        parts,
        blocks,
        n_groups,
        TILE_BLOCKS,
        TILE_PARTS,
        TILE_C,
    )
    count = (n_blocks * pixels).to(tl.float32)
    shifted_mean = total / count
    # Rounding may give a variance just below zero.
    variance = tl.maximum(square / count - shifted_mean * shifted_mean, 0.0)
    mean = shifted_mean + tl.load(x + channels, mask=in_c, other=0.0).to(tl.float32)
    inverse_std = tl.rsqrt(variance + eps)
    # (x - mean) / std * weight + bias, as x * scale + shift.
    scale = inverse_std
    shift = -mean * scale
    if AFFINE:
        scale *= tl.load(weight + channels, mask=in_c, other=0.0).to(tl.float32)
        shift = tl.load(bias + channels, mask=in_c, other=0.0).to(tl.float32) - mean * scale
    unbiased = variance * (count / (count - 1))
    _store_number(numbers, _MEAN, segment, segments, channels, c, mean)
    _store_number(numbers, _INVERSE_STD, segment, segments, channels, c, inverse_std)
    _store_number(numbers, _SCALE, segment, segments, channels, c, scale)
    _store_number(numbers, _SHIFT, segment, segments, channels, c, shift)
    _store_number(numbers, _VARIANCE, segment, segments, channels, c, unbiased)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _move_kernel(
    numbers,
    running_mean,
    running_variance,
    n_tracked,
    c,
    segments,
    momentum,
    log2_kept,
    kept_of_all,
    TILE_SEGMENTS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Moves running statistics, as `GhostBatchNorm._update_running_statistics` explains."""
    channels = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    in_c = channels < c
    means = tl.zeros([TILE_SEGMENTS, TILE_C], tl.float32)
    variances = tl.zeros([TILE_SEGMENTS, TILE_C], tl.float32)
    for start in range(0, segments, TILE_SEGMENTS):
        rows = start + tl.arange(0, TILE_SEGMENTS)
        later_updates = tl.maximum(segments - 1 - rows, 0).to(tl.float32)
        weights = momentum * tl.exp2(later_updates * log2_kept)
        inside = (rows < segments)[:, None] & in_c[None, :]
        places = rows[:, None] * c + channels[None, :]
        of_means = numbers + _MEAN * segments * c + places
        of_variances = numbers + _VARIANCE * segments * c + places
        means += weights[:, None] * tl.load(of_means, mask=inside, other=0.0)
        variances += weights[:, None] * tl.load(of_variances, mask=inside, other=0.0)
    mean = tl.load(running_mean + channels, mask=in_c, other=0.0) * kept_of_all
    variance = tl.load(running_variance + channels, mask=in_c, other=0.0) * kept_of_all
    tl.store(running_mean + channels, mean + tl.sum(means, 0), mask=in_c)
    tl.store(running_variance + channels, variance + tl.sum(variances, 0), mask=in_c)
    if tl.program_id(0) == 0:
        tl.store(n_tracked, tl.load(n_tracked) + segments)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _write_kernel(
    x,
    residual,
    y,
    numbers,
    group_of_block,
    c,
    parts,
    pixels,
    pixels_of_part,
    blocks,
    n_groups,
    segments,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Writes y = relu(scale x + shift + residual)."""
    _, block, channels, first, n = _place(c, parts, pixels, pixels_of_part, TILE_C)
    segment = _segment(block, group_of_block, blocks, n_groups)
    scale = _load_number(numbers, _SCALE, segment, segments, channels, c)
    shift = _load_number(numbers, _SHIFT, segment, segments, channels, c)
    x += first * c
    residual += first * c
    y += first * c
    for start in range(0, n, TILE_PIXELS):
        rows = start + tl.arange(0, TILE_PIXELS)
        inside = (rows < n)[:, None] & (channels < c)[None, :]
        places = rows[:, None] * c + channels[None, :]
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        result = values * scale[None, :] + shift[None, :]
        if RESIDUAL:
            result += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            # Not `maximum`, which makes zero of NaN.
            result = tl.where(result < 0, 0.0, result)
        tl.store(y + places, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _sum_gradients_kernel(
    grad,
    again,
    x,
    y,
    masked,
    numbers,
    group_of_block,
    sums,
    c,
    n_parts,
    parts,
    pixels,
    pixels_of_part,
    blocks,
    n_groups,
    segments,
    MASK: tl.constexpr,
    TWO: tl.constexpr,
    WRITES: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Sums g and g (x - mean) over each part, and writes g to `masked` if `WRITES`."""
    part, block, channels, first, n = _place(c, parts, pixels, pixels_of_part, TILE_C)
    in_c = channels < c
    segment = _segment(block, group_of_block, blocks, n_groups)
    mean = _load_number(numbers, _MEAN, segment, segments, channels, c)
    scale = _load_number(numbers, _SCALE, segment, segments, channels, c)
    shift = _load_number(numbers, _SHIFT, segment, segments, channels, c)
    grad += first * c
    again += first * c
    x += first * c
    y += first * c
    masked += first * c
    totals = tl.zeros([TILE_PIXELS, TILE_C], tl.float32)
    products = tl.zeros([TILE_PIXELS, TILE_C], tl.float32)
    for start in tl.range(0, n, TILE_PIXELS, num_stages=_STAGES):
        rows = start + tl.arange(0, TILE_PIXELS)
        inside = (rows < n)[:, None] & in_c[None, :]
        places = rows[:, None] * c + channels[None, :]
        g = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            g += tl.load(again + places, mask=inside, other=0.0).to(tl.float32)
        if MASK == _MASK_OF_INPUT:
            g = tl.where(values * scale[None, :] + shift[None, :] > 0, g, 0.0)
        if MASK == _MASK_OF_OUTPUT:
            outputs = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
            g = tl.where(outputs > 0, g, 0.0)
        if WRITES:
            rounded = g.to(masked.dtype.element_ty)
            tl.store(masked + places, rounded, mask=inside)
            # The sums are those of what the second pass reads.
            g = rounded.to(tl.float32)
        totals += g
        products += g * (values - mean[None, :])
    tl.store(sums + part * c + channels, tl.sum(totals, 0), mask=in_c)
    tl.store(sums + (n_parts + part) * c + channels, tl.sum(products, 0), mask=in_c)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _finish_gradients_kernel(
    sums,
    numbers,
    slopes,
    group_of_block,
    c,
    n_parts,
    parts,
    pixels,
    blocks,
    n_groups,
    segments,
    TILE_BLOCKS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Turns sums of parts into the numbers of the second pass, and into gradients."""
    c_tiles = tl.cdiv(c, TILE_C)
    segment = tl.program_id(0) // c_tiles
    channels = (tl.program_id(0) % c_tiles) * TILE_C + tl.arange(0, TILE_C)
    total, product, n_blocks = _add_parts(
        sums,
        segment,
        channels,
        group_of_block,
        c,
        n_parts,
        parts,
        blocks,
        n_groups,
        TILE_BLOCKS,
        TILE_PARTS,
        TILE_C,
    )
    count = (n_blocks * pixels).to(tl.float32)
    mean = _load_number(numbers, _MEAN, segment, segments, channels, c)
    inverse_std = _load_number(numbers, _INVERSE_STD, segment, segments, channels, c)
    scale = _load_number(numbers, _SCALE, segment, segments, channels, c)
    # The gradient scale (g - mean(g) - (x - mean) mean(g (x - mean)) / variance), written as
    # scale g + slope x + offset.
    slope = -scale * inverse_std * inverse_std * (product / count)
    offset = -scale * (total / count) - slope * mean
    _store_number(slopes, _SLOPE, segment, segments, channels, c, slope)
    _store_number(slopes, _OFFSET, segment, segments, channels, c, offset)
    _store_number(slopes, _GRAD_WEIGHT, segment, segments, channels, c, product * inverse_std)
    _store_number(slopes, _GRAD_BIAS, segment, segments, channels, c, total)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def _write_gradient_kernel(
    masked,
    x,
    grad_x,
    numbers,
    slopes,
    group_of_block,
    c,
    parts,
    pixels,
    pixels_of_part,
    blocks,
    n_groups,
    segments,
    MASKED: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Writes the gradient of x; unless `MASKED`, `masked` is the gradient of y before ReLU's."""
    _, block, channels, first, n = _place(c, parts, pixels, pixels_of_part, TILE_C)
    segment = _segment(block, group_of_block, blocks, n_groups)
    scale = _load_number(numbers, _SCALE, segment, segments, channels, c)
    shift = _load_number(numbers, _SHIFT, segment, segments, channels, c)
    slope = _load_number(slopes, _SLOPE, segment, segments, channels, c)
    offset = _load_number(slopes, _OFFSET, segment, segments, channels, c)
    masked += first * c
    x += first * c
    grad_x += first * c
    for start in range(0, n, TILE_PIXELS):
        rows = start + tl.arange(0, TILE_PIXELS)
        inside = (rows < n)[:, None] & (channels < c)[None, :]
        places = rows[:, None] * c + channels[None, :]
        g = tl.load(masked + places, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        if not MASKED:
            g = tl.where(values * scale[None, :] + shift[None, :] > 0, g, 0.0)
        result = scale[None, :] * g + slope[None, :] * values + offset[None, :]
        tl.store(grad_x + places, result.to(grad_x.dtype.element_ty), mask=inside)
