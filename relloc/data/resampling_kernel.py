"""A GPU's kernel for `relloc.data.resampling`: it resizes an axis of all images of a batch at once.

Images have different sizes and lie anywhere in memory, so that the kernel takes their addresses.
Copying them into one padded tensor, and multiplying that with matrices of weights, took twice as
long as decoding them.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Int64, UInt8
from torch import Tensor

from relloc.data.cuts import BatchCuts, BatchResampling
from relloc.data.resampling import WEIGHT_BITS, Filters, ImageTensor, filters_of, to_device

# Columns and rows of a result that one program computes
_BLOCK = (64, 8)
# Pixels of an image whose values are asked for at once, as each takes long to come. With more, and
# larger blocks, so many registers are needed that fewer programs run at once.
_TAPS_AT_ONCE = 2
_N_COLORS = 3
# Columns of the table that tells the kernel about each image
_TABLE = (
    *("image", "source", "source_color", "source_along", "source_across"),
    *("result", "result_color", "result_along", "result_across"),
    *("n_along", "n_across", "n_new", "n_taps"),
)


class _Place:
    """Where the pixels of each image of a batch lie: addresses, and steps between pixels in bytes.

    `steps` are those from one color, row and column to the next.
    """

    def __init__(self, addresses: Int64[np.ndarray, "b"], steps: Int64[np.ndarray, "b 3"]) -> None:
        self.addresses = addresses
        self.steps = steps

    def moved(self, pixels: Int64[np.ndarray, "b 2"]) -> "_Place":
        """Returns the place that begins at another row and column."""
        return _Place(self.addresses + (pixels * self.steps[:, 1:]).sum(axis=1), self.steps)


def squares_by_kernel(images: Sequence[ImageTensor], cuts: BatchCuts) -> UInt8[Tensor, "b 3 s s"]:
    """Returns what `relloc.data.resampling.squares` does, and raises what it does."""
    device = images[0].device
    place = _Place(
        np.array([image.data_ptr() for image in images], dtype=np.int64),
        np.array([image.stride() for image in images], dtype=np.int64),
    )
    *first_steps, last_step = cuts.steps
    # Results of steps have to be there until the kernel that reads them is launched. Then they may
    # be freed: what is allocated next on this stream is used after it.
    kept = []
    for step in first_steps:
        memory, result = _planes(step.size, device)
        kept.append(memory)
        _resample(place, step, result, device)
        place = result
    height, width = map(int, last_step.size[0])
    batch = torch.empty(len(images), height, width, _N_COLORS, dtype=torch.uint8, device=device)
    _resample(place, last_step, _channels_last(batch, cuts.mirrored), device)
    return batch.permute(0, 3, 1, 2)


def _planes(sizes: Int64[np.ndarray, "b 2"], device: torch.device) -> tuple[Tensor, _Place]:
    """Returns memory for images of these sizes, one after another, and where each lies."""
    n_bytes = _N_COLORS * sizes.prod(axis=1)
    ends = n_bytes.cumsum()
    memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
    heights, widths = sizes.T
    steps = np.stack([heights * widths, widths, np.ones_like(widths)], axis=1)
    return memory, _Place(memory.data_ptr() + ends - n_bytes, steps)


def _channels_last(batch: UInt8[Tensor, "b h w 3"], mirrored: np.ndarray) -> _Place:
    """Returns where the images of a batch lie, of which some are written from right to left."""
    n_images, height, width, _ = batch.shape
    n_bytes = height * width * _N_COLORS
    addresses = batch.data_ptr() + n_bytes * np.arange(n_images, dtype=np.int64)
    steps = np.tile(np.array([1, width * _N_COLORS, _N_COLORS], dtype=np.int64), (n_images, 1))
    addresses[mirrored] += (width - 1) * _N_COLORS
    steps[mirrored, 2] *= -1
    return _Place(addresses, steps)


def _resample(source: _Place, step: BatchResampling, result: _Place, device: torch.device) -> None:
    """Resamples all images of a batch, those whose columns come first after the others."""
    filters = filters_of(step, device)
    source = source.moved(step.offset)
    for vertical_first in (False, True):
        images = np.flatnonzero(step.is_vertical_first == vertical_first)
        if not len(images):
            continue
        first, second = (0, 1) if vertical_first else (1, 0)
        # Between both axes an image has the new size along the first alone.
        sizes = step.needed.copy()
        sizes[:, first] = step.size[:, first]
        sizes[step.is_vertical_first != vertical_first] = 0
        _memory, between = _planes(sizes, device)
        tables = np.stack(
            [
                _table(step, first, source, between, step.needed)[images],
                _table(step, second, between, result, sizes)[images],
            ]
        )
        on_device = to_device(tables, device)
        for axis, table, of_host in zip((first, second), on_device, tables, strict=True):
            _launch(table, of_host, filters, axis)


def _table(
    step: BatchResampling,
    axis: int,
    source: _Place,
    result: _Place,
    sizes: Int64[np.ndarray, "b 2"],
) -> Int64[np.ndarray, "b columns"]:
    """Returns what the kernel has to know of each image, whose axis `axis` is resized.

    `sizes` are those of the images before it.
    """
    other = 1 - axis
    columns = {
        "image": np.arange(len(sizes)),
        "source": source.addresses,
        "source_color": source.steps[:, 0],
        "source_along": source.steps[:, 1 + axis],
        "source_across": source.steps[:, 1 + other],
        "result": result.addresses,
        "result_color": result.steps[:, 0],
        "result_along": result.steps[:, 1 + axis],
        "result_across": result.steps[:, 1 + other],
        "n_along": sizes[:, axis],
        "n_across": sizes[:, other],
        "n_new": step.size[:, axis],
        "n_taps": step.taps()[:, axis],
    }
    return np.stack([columns[name] for name in _TABLE], axis=1)


def _launch(
    table: Int64[Tensor, "b columns"],
    of_host: Int64[np.ndarray, "b columns"],
    filters: Filters,
    axis: int,
) -> None:
    """Resizes an axis of all images of a table, which `of_host` is a copy of."""
    largest = dict(zip(_TABLE, of_host.max(axis=0).tolist(), strict=True))
    columns, rows = _BLOCK
    n_columns = largest["n_across" if axis == 0 else "n_new"]
    n_rows = largest["n_new" if axis == 0 else "n_across"]
    grid = (len(of_host), triton.cdiv(n_columns, columns), triton.cdiv(n_rows, rows))
    _, _, most_taps, most_new = filters.weights.shape
    # Typed as any function: pyright would ask for the constants' own type.
    kernel: Any = _resize_axis
    kernel[grid](
        table,
        filters.first[axis],
        filters.weights[axis],
        most_taps,
        most_new,
        IS_VERTICAL=axis == 0,
        COLUMNS=columns,
        ROWS=rows,
        FACTS=len(_TABLE),
        AT_ONCE=_TAPS_AT_ONCE,
        BITS=WEIGHT_BITS,
        HALF=2 ** (WEIGHT_BITS - 1),
    )


@triton.jit
@no_type_check
def _resize_axis(  # noqa: PLR0915 - a loop over colors would keep them in memory
    table,
    firsts,
    weights,
    most_taps,
    most_new,
    IS_VERTICAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FACTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Computes a block of pixels of an image.

    Programs are numbered by row of the table, and by columns and rows of blocks. Blocks have
    columns first: of axes whose steps in memory Triton does not know, it gives neighboring places
    of the first to neighboring threads, and neighboring columns lie beside one another.
    """
    row = table + tl.program_id(0) * FACTS
    image = tl.load(row)
    source = tl.load(row + 1)
    source_color = tl.load(row + 2)
    # Within an image 32 bits are enough, and faster.
    source_along = tl.load(row + 3).to(tl.int32)
    source_across = tl.load(row + 4).to(tl.int32)
    result = tl.load(row + 5)
    result_color = tl.load(row + 6)
    result_along = tl.load(row + 7).to(tl.int32)
    result_across = tl.load(row + 8).to(tl.int32)
    n_along = tl.load(row + 9).to(tl.int32)
    n_across = tl.load(row + 10).to(tl.int32)
    n_new = tl.load(row + 11).to(tl.int32)
    n_taps = tl.load(row + 12).to(tl.int32)

    column_of_block = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    row_of_block = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[None, :]
    if IS_VERTICAL:
        across = column_of_block
        along = row_of_block
    else:
        across = row_of_block
        along = column_of_block
    is_new = along < n_new
    is_inside = is_new & (across < n_across)
    first = tl.load(firsts + image * most_new + along, mask=is_new, other=0)
    weight_of_tap = weights + image * most_taps * most_new + along
    line = across * source_across
    # Sums begin with a half, so that they are rounded and not cut off.
    red = (along + across) * 0 + HALF
    green = red
    blue = red
    # No `for`, whose bounds Triton's interpreter can't take from memory
    left = n_taps
    while left > 0:
        left -= AT_ONCE
        for number in tl.static_range(AT_ONCE):
            tap = left + number
            has_weight = is_new & (tap >= 0)
            weight = tl.load(weight_of_tap + tap * most_new, mask=has_weight, other=0)
            pixel = first + tap
            is_there = is_inside & (tap >= 0) & (pixel < n_along)
            address = source + (line + pixel * source_along)
            pointer = address.to(tl.pointer_type(tl.uint8))
            red += weight * tl.load(pointer, mask=is_there, other=0).to(tl.int32)
            pointer = (address + source_color).to(tl.pointer_type(tl.uint8))
            green += weight * tl.load(pointer, mask=is_there, other=0).to(tl.int32)
            pointer = (address + 2 * source_color).to(tl.pointer_type(tl.uint8))
            blue += weight * tl.load(pointer, mask=is_there, other=0).to(tl.int32)

    address = result + (along * result_along + across * result_across)
    pointer = address.to(tl.pointer_type(tl.uint8))
    tl.store(pointer, (red >> BITS).to(tl.uint8), mask=is_inside)
    pointer = (address + result_color).to(tl.pointer_type(tl.uint8))
    tl.store(pointer, (green >> BITS).to(tl.uint8), mask=is_inside)
    pointer = (address + 2 * result_color).to(tl.pointer_type(tl.uint8))
    tl.store(pointer, (blue >> BITS).to(tl.uint8), mask=is_inside)
