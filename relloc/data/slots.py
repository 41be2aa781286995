"""Batches in memory that workers and the training process share, for rates at which passing them on is too slow.

Through torch's queues each batch gets memory of its own, which the kernel has to clear and map every
time, and which a GPU can't copy from before another copy. At thousands of images a second that is
most of what the training process does.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from relloc.data.loader import PREFETCHED, Batch, Sample, load, loaded, usable
from relloc.errors import UsageError

_SHARED = "/dev/shm"  # where Linux keeps memory that processes share


def load_in_slots(
    samples: Dataset[Sample],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    pin: bool,
    images: int,
    side_px: int,
    held: int,
) -> Iterator[Batch]:
    """What `load` gives, of at most `images` images each of `side_px` a side; only the last `held` batches stay valid.

    Raises:
        UsageError: a worker was killed, or shared memory is too small.
    """
    if not workers:
        return load(samples, batches, workers=0, pin=pin)
    shape = (workers * PREFETCHED + held + 1, images, side_px, side_px, 3)
    _check_shared_memory(torch.Size(shape).numel())
    slots = torch.empty(shape, dtype=torch.uint8).share_memory_()
    filled = loaded(_InSlots(samples, slots), _Numbered(batches, len(slots)), _as_it_is, workers=workers, pin=False)
    return _batches(filled, slots, pin=pin)


def _check_shared_memory(needed: int) -> None:
    free = shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else needed
    if free < needed:
        raise UsageError(
            f"batches need {needed / 1e6:.0f} MB of shared memory, {_SHARED} has {free / 1e6:.0f} MB: give fewer "
            "workers=, or the container more (docker run --shm-size=8g)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Filled:
    """A batch whose pixels lie in a slot."""

    slot: int
    indices: Int[Tensor, "b"]
    unreadable: dict[str, str]


class _Numbered(Sampler[list[Any]]):
    """Batches of keys, each behind the number of its slot."""

    def __init__(self, batches: Iterable[list[Any]], n: int) -> None:
        self.batches = batches
        self.n = n

    def __iter__(self) -> Iterator[list[Any]]:
        for number, keys in enumerate(self.batches):
            yield [number % self.n, *keys]


class _InSlots(Dataset[Sample]):
    """Samples of which a batch, asked for as `_Numbered` gives it, is written to its slot."""

    def __init__(self, samples: Dataset[Sample], slots: UInt8[Tensor, "n images s s 3"]) -> None:
        self.samples = samples
        self.slots = slots

    def __getitems__(self, numbered: list[Any]) -> _Filled:
        slot, *keys = numbered
        images, indices, unreadable = usable([self.samples[key] for key in keys])
        for row, image in zip(self.slots[slot], images, strict=False):
            row.copy_(image.permute(1, 2, 0))
        return _Filled(slot=slot, indices=indices, unreadable=unreadable)


def _as_it_is(filled: _Filled) -> _Filled:
    return filled


def _batches(filled: Iterator[_Filled], slots: UInt8[Tensor, "n images s s 3"], *, pin: bool) -> Iterator[Batch]:
    first = next(filled, None)  # by now workers are forked: pages locked before would be missing in them
    with _page_locked(slots) if pin else contextlib.nullcontext():
        for one in itertools.chain([first] if first else [], filled):
            pixels = slots[one.slot, : len(one.indices)].permute(0, 3, 1, 2)
            yield Batch(pixels=pixels, indices=one.indices, unreadable=one.unreadable)


@contextlib.contextmanager
def _page_locked(memory: Tensor) -> Iterator[None]:
    """A GPU copies from `memory` beside its other work while the block runs."""
    cuda: Any = torch.cuda.cudart()
    cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    try:
        yield
    finally:
        cuda.cudaHostUnregister(memory.data_ptr())
