"""A faster `load` for pretraining: workers write batches into fixed slots of shared memory.

`relloc.data.loader.load` allocates memory for each batch, which the kernel has to clear and map
every time, and which has to be copied to page-locked memory before a GPU can read it. At thousands
of images a second that takes most of the training process's time. Here the memory of a few batches
is allocated and page-locked once, and each worker writes its batch into the slot that it is given.
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
from relloc.terminal import quantity


def load_in_slots(
    samples: Dataset[Sample],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    pin: bool,
    images: int,
    side_px: int,
    batches_held: int,
    print_message: Callable[[str], None],
    stopping: Callable[[], bool] = never,
) -> Iterator[ImageBatch]:
    """Yields the same batches as `load`, of which only the last `batches_held` stay valid.

    A batch has at most `images` images of `side_px` pixels a side. Memory of older batches is
    overwritten. Where slots can't be shared or allocated, batches come from `load`, and
    `print_message` is called with a sentence about it.

    Raises:
        Interrupted: a worker was killed.
        NoImagesCame: the run was asked to stop, and no images came (see `ReadingProcesses`).
    """
    slots = None
    # Only forked workers see memory that was mapped before they started.
    if workers and machine.forks():
        # Each worker fills up to PREFETCHED slots while the caller holds `batches_held` batches;
        # the last one is being handed to the caller.
        n_slots = workers * PREFETCHED + batches_held + 1
        shape = (n_slots, images, side_px, side_px, 3)
        try:
            slots = shared_with_forks(shape)
        except OSError as error:
            megabytes = math.prod(shape) / 1e6
            print_message(
                f"loader  {megabytes:.0f} MB of shared memory for "
                f"{quantity(n_slots, 'batch', 'batches')} could not be "
                f"allocated ({error.strerror}): images come slower. Give fewer workers=, or more "
                "memory"
            )
    if slots is None:
        yield from load(samples, batches, workers=workers, pin=pin, stopping=stopping)
        return
    # Batches take the slots in turn. A slot is used again only after n_slots batches, when neither
    # a worker nor the caller has its last batch any more.
    slots_and_keys = ((number % len(slots), keys) for number, keys in enumerate(batches))
    read = functools.partial(_read_into_slot, samples, slots)
    with ReadingProcesses(
        read, slots_and_keys, workers=workers, stopping=stopping, print_message=print_message
    ) as answers:
        # Asking for the first answer forks the workers. Pages are locked after the fork only, since
        # forked processes do not inherit pages that are registered with CUDA.
        first = list(itertools.islice(answers, 1))
        with _page_locked(slots, print_message) if pin else contextlib.nullcontext():
            for answer in itertools.chain(first, answers):
                slot, batch_header = answer.content
                n_read = len(batch_header.indices)
                yield batch_header.batch(slots[slot, :n_read])


def _read_into_slot(
    samples: Dataset[Sample],
    slots: UInt8[Tensor, "n images s s 3"],
    slot_and_keys: tuple[int, list[Any]],
) -> Answer:
    """Reads the samples of some keys into a slot, in a worker process."""
    slot, keys = slot_and_keys
    batch = [samples[key] for key in keys]
    batch_header, _ = write_samples(batch, lambda shape: slots[slot, : shape[0]])
    return Answer(content=(slot, batch_header))


@contextlib.contextmanager
def _page_locked(memory: Tensor, print_message: Callable[[str], None]) -> Iterator[None]:
    """Page-locks `memory` while the block runs, so that a GPU copies from it during other work."""
    # PyTorch's pin_memory() would make a copy; CUDA locks memory that exists already.
    cuda: Any = torch.cuda.cudart()
    failed = int(cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if failed:
        print_message(
            f"loader  {memory.numel() / 1e6:.0f} MB of memory could not be page-locked "
            f"(CUDA error {failed}): copies to the GPU are slower"
        )
    try:
        yield
    finally:
        if not failed:
            cuda.cudaHostUnregister(memory.data_ptr())
