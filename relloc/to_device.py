"""Copies to the device for which the process does not wait."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

# Arrays begin at multiples of so many bytes, as kernels read several bytes at once.
_ALIGNMENT = 64
# The CUDA programming guide, "asynchronous concurrent execution".
_MOST_BYTES_AT_ONCE = 1 << 16


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a small tensor of the CPU on `device`: tables, boxes, or numbers.

    CUDA takes up to 64 KiB into memory of its own at once, and for more the process would wait
    until all is done that is queued on the GPU. So more is copied from page-locked memory.
    """
    if device.type == "cuda" and tensor.nbytes > _MOST_BYTES_AT_ONCE:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_device(
    numbers: Sequence,
    like: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns numbers as a tensor on the device of `like`, without waiting for the device."""
    return to_device(torch.tensor(numbers, dtype=dtype), like.device)


def bytes_to_device(
    arrays: Sequence[UInt8[np.ndarray, "..."]], device: torch.device
) -> list[UInt8[Tensor, "..."]]:
    """Returns arrays of any shapes on `device`, to a GPU by one copy for all of them.

    numpy puts them together: torch would share the work among threads, for which the cores have
    no time while worker processes decode images.
    """
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.size // _ALIGNMENT) * _ALIGNMENT)  # rounded up
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    rows = staged.numpy()
    for start, array in zip(starts, arrays, strict=False):
        rows[start : start + array.size] = array.reshape(-1)
    copied = staged.to(device, non_blocking=True)
    parts = []
    for start, array in zip(starts, arrays, strict=False):
        parts.append(copied[start : start + array.size].view(*array.shape))
    return parts
