"""Batches in memory that workers and the training process share, for rates at which passing them on is too slow.

`load` gives each batch memory of its own, which the kernel has to clear and map every time, and which a
GPU can't copy from before another copy. At thousands of images a second that is most of what the
training process does.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from relloc import machine
from relloc.data.loader import Batch, Sample, load, usable
from relloc.data.readers import PREFETCHED, Answer, ReadingProcesses, never
from relloc.data.shared_memory import shared_with_forks


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
    stopping: Callable[[], bool] = never,
) -> Iterator[Batch]:
    """What `load` gives, of at most `images` images each of `side_px` a side; only the last `held` batches stay valid.

    Where the memory can't be had at once `load` serves, and `say` is told.

    Raises:
        Interrupted: a worker was killed.
        NoImagesCame: as `ReadingProcesses`.
    """
    shape = (workers * PREFETCHED + held + 1, images, side_px, side_px, 3)
    slots = _slots(shape, say) if workers and machine.forks() else None
    if slots is None:
        return load(samples, batches, workers=workers, pin=pin, stopping=stopping)
    numbered = ((number % len(slots), keys) for number, keys in enumerate(batches))
    answers = ReadingProcesses(_InSlots(samples, slots), numbered, workers=workers, stopping=stopping, say=say)
    return _batches(answers, slots, pin=pin, say=say)


def _slots(shape: tuple[int, ...], say: Callable[[str], None]) -> UInt8[Tensor, "n images s s 3"] | None:
    try:
        return shared_with_forks(shape)
    except OSError as error:
        say(
            f"loader  {math.prod(shape) / 1e6:.0f} MB of memory that {shape[0]} batches share can't be had "
            f"({error.strerror}): images come slower. Give fewer workers=, or more memory"
        )
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Filled:
    """A batch whose pixels lie in a slot."""

    slot: int
    indices: list[int]
    unreadable: dict[str, str]


class _InSlots:
    """What a reading process makes of the keys of a batch and the number of the slot that it is written to."""

    def __init__(self, samples: Dataset[Sample], slots: UInt8[Tensor, "n images s s 3"]) -> None:
        self.samples = samples
        self.slots = slots

    def __call__(self, numbered: tuple[int, list[Any]]) -> Answer:
        slot, keys = numbered
        images, indices, unreadable = usable([self.samples[key] for key in keys])
        for row, image in zip(self.slots[slot], images, strict=False):
            row.copy_(image.permute(1, 2, 0))
        return Answer(content=_Filled(slot=slot, indices=indices.tolist(), unreadable=unreadable))


def _batches(
    answers: ReadingProcesses, slots: UInt8[Tensor, "n images s s 3"], *, pin: bool, say: Callable[[str], None]
) -> Iterator[Batch]:
    with answers:
        first = next(answers, None)  # by now workers are forked: pages locked before would be missing in them
        with _page_locked(slots, say) if pin else contextlib.nullcontext():
            for answer in itertools.chain([first] if first else [], answers):
                filled: _Filled = answer.content
                indices = torch.tensor(filled.indices, dtype=torch.int64)
                pixels = slots[filled.slot, : len(indices)].permute(0, 3, 1, 2)
                yield Batch(pixels=pixels, indices=indices, unreadable=filled.unreadable)


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
