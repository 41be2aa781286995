"""Triton's kernels of ghost batch norm, which `relloc.models.ghost_batch_norm_kernel` launches.

Words and the order of the numbers of segments are explained there.
"""

from typing import no_type_check

import triton
import triton.language as tl

# A program of a reduction reads its next tiles while it adds one: sums keep so many registers that
# too few programs fit on a multiprocessor to hide how long a read takes.
_STAGES = tl.constexpr(3)

# Which numbers of segments stand where in the tensor that the forward makes
MEAN = tl.constexpr(0)
INVERSE_STD = tl.constexpr(1)
SCALE = tl.constexpr(2)
SHIFT = tl.constexpr(3)
VARIANCE = tl.constexpr(4)  # unbiased
FORWARD_NUMBERS = 5
# and in that of the backward
SLOPE = tl.constexpr(0)
OFFSET = tl.constexpr(1)
GRAD_WEIGHT = tl.constexpr(2)
GRAD_BIAS = tl.constexpr(3)
BACKWARD_NUMBERS = 4

# Where the backward sees which values ReLU let through
NO_MASK = tl.constexpr(0)
MASK_OF_INPUT = tl.constexpr(1)
MASK_OF_OUTPUT = tl.constexpr(2)

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
def sum_kernel(
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
def finish_statistics_kernel(
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
    _store_number(numbers, MEAN, segment, segments, channels, c, mean)
    _store_number(numbers, INVERSE_STD, segment, segments, channels, c, inverse_std)
    _store_number(numbers, SCALE, segment, segments, channels, c, scale)
    _store_number(numbers, SHIFT, segment, segments, channels, c, shift)
    _store_number(numbers, VARIANCE, segment, segments, channels, c, unbiased)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def move_kernel(
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
        of_means = numbers + MEAN * segments * c + places
        of_variances = numbers + VARIANCE * segments * c + places
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
def write_kernel(
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
    scale = _load_number(numbers, SCALE, segment, segments, channels, c)
    shift = _load_number(numbers, SHIFT, segment, segments, channels, c)
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
def sum_gradients_kernel(
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
    mean = _load_number(numbers, MEAN, segment, segments, channels, c)
    scale = _load_number(numbers, SCALE, segment, segments, channels, c)
    shift = _load_number(numbers, SHIFT, segment, segments, channels, c)
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
        if MASK == MASK_OF_INPUT:
            g = tl.where(values * scale[None, :] + shift[None, :] > 0, g, 0.0)
        if MASK == MASK_OF_OUTPUT:
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
def finish_gradients_kernel(
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
    mean = _load_number(numbers, MEAN, segment, segments, channels, c)
    inverse_std = _load_number(numbers, INVERSE_STD, segment, segments, channels, c)
    scale = _load_number(numbers, SCALE, segment, segments, channels, c)
    # The gradient scale (g - mean(g) - (x - mean) mean(g (x - mean)) / variance), written as
    # scale g + slope x + offset.
    slope = -scale * inverse_std * inverse_std * (product / count)
    offset = -scale * (total / count) - slope * mean
    _store_number(slopes, SLOPE, segment, segments, channels, c, slope)
    _store_number(slopes, OFFSET, segment, segments, channels, c, offset)
    _store_number(slopes, GRAD_WEIGHT, segment, segments, channels, c, product * inverse_std)
    _store_number(slopes, GRAD_BIAS, segment, segments, channels, c, total)


@triton.jit(do_not_specialize=_COUNTS)
@no_type_check
def write_gradient_kernel(
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
    scale = _load_number(numbers, SCALE, segment, segments, channels, c)
    shift = _load_number(numbers, SHIFT, segment, segments, channels, c)
    slope = _load_number(slopes, SLOPE, segment, segments, channels, c)
    offset = _load_number(slopes, OFFSET, segment, segments, channels, c)
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
