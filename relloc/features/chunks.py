"""Divides large matrices of features into parts that are worked on one after another."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

ChunkRows = Float[Tensor, "r d"]
Chunk = tuple[int, ChunkRows]  # number of the first row, and rows


def slices(n: int, size: int) -> Iterator[slice]:
    """Yields slices of `size` that cover `n`; the last one may reach beyond."""
    for start in range(0, n, size):
        yield slice(start, start + size)


def chunks_on_device(
    bank: Float[Tensor, "n d"], size: int, device: torch.device
) -> Iterator[Chunk]:
    """Yields (first row, rows) of chunks of `size` rows in order, on `device`.

    From the CPU to a GPU they go through two page-locked buffers and a CUDA stream of their own, so
    that the next chunk is on its way while the GPU works on one. At most two are on the GPU.
    """
    n_rows, n_features = bank.shape
    starts = range(0, n_rows, size)
    if bank.device == device or device.type != "cuda":
        for start in starts:
            rows = bank[start : start + size]
            yield start, rows.to(device)
        return
    compute_stream = torch.cuda.current_stream(device)
    copy_stream = torch.cuda.Stream(device)
    shape = (min(size, n_rows), n_features)
    # Only copies from page-locked memory run beside computation.
    buffers = []
    for _ in range(2):
        buffer = torch.empty(shape, dtype=bank.dtype, pin_memory=True)
        buffers.append(buffer)
    chunk_done = [torch.cuda.Event(), torch.cuda.Event()]
    for number, start in enumerate(starts):
        buffer = buffers[number % 2]
        done = chunk_done[number % 2]
        # The chunk before the last used this buffer. Its work is done, and so is its copy.
        done.synchronize()  # returns at once where it was never recorded
        rows = bank[start : start + size]
        filled = buffer[: len(rows)]
        filled.copy_(rows)
        with torch.cuda.stream(copy_stream):
            arrived = filled.to(device, non_blocking=True)
        compute_stream.wait_stream(copy_stream)
        # The allocator must not reuse this memory before the other stream has read it.
        arrived.record_stream(compute_stream)
        yield start, arrived
        done.record(compute_stream)
