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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from relloc import ranks
from relloc.data.loader import PREFETCHED, Batch, Sample, load, loaded, usable

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
    say: Callable[[str], None],
) -> Iterator[Batch]:
    """What `load` gives, of at most `images` images each of `side_px` a side; only the last `held` batches stay valid.

    Where shared memory is too small `load` serves, and `say` is told.

    Raises:
        Interrupted: a worker was killed.
    """
    shape = (workers * PREFETCHED + held + 1, images, side_px, side_px, 3)
    if not workers or not _fits(torch.Size(shape).numel(), say):
        return load(samples, batches, workers=workers, pin=pin)
    slots = torch.empty(shape, dtype=torch.uint8).share_memory_()
    filled = loaded(_InSlots(samples, slots), _Numbered(batches, len(slots)), _as_it_is, workers=workers, pin=False)
    return _batches(filled, slots, pin=pin, say=say)


def _fits(needed: int, say: Callable[[str], None]) -> bool:
    """Whether shared memory has room for that many bytes, and for as many of each other process here."""
    free = shutil.disk_usage(_SHARED).free // ranks.local_world_size() if os.path.isdir(_SHARED) else needed
    if free < needed:
        say(
            f"loader  {_SHARED} has {free / 1e6:.0f} MB for each process, {needed / 1e6:.0f} MB would load faster: "
            "give the container more (docker run --shm-size=8g), or fewer workers="
        )
    return free >= needed


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


def _batches(
    filled: Iterator[_Filled], slots: UInt8[Tensor, "n images s s 3"], *, pin: bool, say: Callable[[str], None]
) -> Iterator[Batch]:
    first = next(filled, None)  # by now workers are forked: pages locked before would be missing in them
    with _page_locked(slots, say) if pin else contextlib.nullcontext():
        for one in itertools.chain([first] if first else [], filled):
            pixels = slots[one.slot, : len(one.indices)].permute(0, 3, 1, 2)
            yield Batch(pixels=pixels, indices=one.indices, unreadable=one.unreadable)


@contextlib.contextmanager
def _page_locked(memory: Tensor, say: Callable[[str], None]) -> Iterator[None]:
    """A GPU copies from `memory` beside its other work while the block runs."""
    cuda: Any = torch.cuda.cudart()
    failed = int(cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if failed:
        say(f"loader  {memory.numel() / 1e6:.0f} MB could not be page-locked (CUDA error {failed}): copies are slower")
    try:
        yield
    finally:
        if not failed:
            cuda.cudaHostUnregister(memory.data_ptr())
