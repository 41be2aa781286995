"""Batches in memory that workers and the training process share, for rates at which passing them on is too slow.

`load` gives each batch memory of its own, which the kernel has to clear and map every time, and which a
GPU can't copy from before another copy. At thousands of images a second that is most of what the
training process does.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from relloc import machine
from relloc.data.loader import ImageBatch, Sample, load, write_samples
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
) -> Iterator[ImageBatch]:
    """What `load` gives, of at most `images` images each of `side_px` a side; only the last `held` batches stay valid.

    Where the memory can't be had at once `load` serves, and `say` is told.

    Raises:
        Interrupted: a worker was killed.
        NoImagesCame: as `ReadingProcesses`.
    """
    slots = None
    if workers and machine.forks():
        shape = (workers * PREFETCHED + held + 1, images, side_px, side_px, 3)
        try:
            slots = shared_with_forks(shape)
        except OSError as error:
            say(
                f"loader  {math.prod(shape) / 1e6:.0f} MB of memory that {shape[0]} batches share can't be had "
                f"({error.strerror}): images come slower. Give fewer workers=, or more memory"
            )
    if slots is None:
        yield from load(samples, batches, workers=workers, pin=pin, stopping=stopping)
        return
    numbered = ((number % len(slots), keys) for number, keys in enumerate(batches))
    read = functools.partial(_read_into_slot, samples, slots)
    with ReadingProcesses(read, numbered, workers=workers, stopping=stopping, say=say) as answers:
        # With the first answer workers are forked: pages locked before would be missing in them.
        first = list(itertools.islice(answers, 1))
        with _page_locked(slots, say) if pin else contextlib.nullcontext():
            for answer in itertools.chain(first, answers):
                slot, message = answer.content
                yield message.batch(slots[slot, : len(message.indices)])


def _read_into_slot(
    samples: Dataset[Sample],
    slots: UInt8[Tensor, "n images s s 3"],
    numbered: tuple[int, list[Any]],
) -> Answer:
    """In a reading process: the samples of `keys` in the slot of this number, and what there is to say of them."""
    slot, keys = numbered
    message, _ = write_samples(
        [samples[key] for key in keys], lambda shape: slots[slot, : shape[0]]
    )
    return Answer(content=(slot, message))


@contextlib.contextmanager
def _page_locked(memory: Tensor, say: Callable[[str], None]) -> Iterator[None]:
    """A GPU copies from `memory` beside its other work while the block runs."""
    cuda: Any = torch.cuda.cudart()
    failed = int(cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if failed:
        say(
            f"loader  {memory.numel() / 1e6:.0f} MB could not be page-locked (CUDA error {failed}): copies are slower"
        )
    try:
        yield
    finally:
        if not failed:
            cuda.cudaHostUnregister(memory.data_ptr())
