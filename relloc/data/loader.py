"""Loading in worker processes: samples become batches there, so that one piece of memory travels for each batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from relloc.data.readers import Answer, ReadingProcesses, look_ahead, never
from relloc.data.shared_memory import can_be_handed, handed_over, to_hand_over
from relloc.errors import DataError, Interrupted

Reasons = dict[str, str]  # why images can't be used, by their names
Shape = tuple[int, ...]
Rows = UInt8[Tensor, "b s s 3"]
_own_memory = functools.partial(torch.empty, dtype=torch.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Pixels of image `index`, or None if it can't be used; `unreadable` says why, by image name."""

    index: int
    pixels: UInt8[np.ndarray, "s s 3"] | None
    unreadable: Reasons = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """The samples of a batch that have pixels, and the reasons of those that have none.

    Pixels lie channels last in memory, as decoders leave them.
    """

    pixels: UInt8[Tensor, "b 3 s s"]
    indices: Int[Tensor, "b"]
    unreadable: Reasons


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchMessage:
    """What a reading process tells of a batch, beside its pixels."""

    indices: list[int]
    unreadable: Reasons
    shape: Shape

    def batch(self, rows: Rows, *, pin: bool = False) -> ImageBatch:
        """The batch whose pixels are `rows`; with `pin` a copy of them in page-locked memory."""
        pixels = rows.permute(0, 3, 1, 2)
        indices = torch.tensor(self.indices, dtype=torch.int64)
        return ImageBatch(
            pixels=pixels.pin_memory() if pin else pixels,
            indices=indices,
            unreadable=self.unreadable,
        )


def write_samples(
    samples: list[Sample], memory: Callable[[Shape], Rows]
) -> tuple[BatchMessage, Rows]:
    """Write the pixels of samples of one size into `memory(shape)`; those without pixels have no row there."""
    usable = [(sample.index, sample.pixels) for sample in samples if sample.pixels is not None]
    side = len(usable[0][1]) if usable else 0
    shape = (len(usable), side, side, 3)
    rows = memory(shape)
    for row, (_, pixels) in zip(rows.numpy(), usable, strict=True):
        row[:] = pixels
    unreadable = {name: reason for sample in samples for name, reason in sample.unreadable.items()}
    return BatchMessage(
        indices=[index for index, _ in usable], unreadable=unreadable, shape=shape
    ), rows


def collate(samples: list[Sample], *, pin: bool = False) -> ImageBatch:
    """One batch of samples of one size, in memory of its own."""
    message, rows = write_samples(samples, _own_memory)
    return message.batch(rows, pin=pin)


def load(
    samples: Dataset[Sample],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    pin: bool,
    stopping: Callable[[], bool] = never,
) -> Iterator[ImageBatch]:
    """One batch for each list of sample keys, in that order whatever `workers` is.

    With `pin` batches are in page-locked memory, from which a GPU copies faster. `stopping` is as in
    `ReadingProcesses`.

    Raises:
        Interrupted: a worker was killed, most often for memory.
    """
    if not workers:
        for keys in batches:
            yield collate([samples[key] for key in keys], pin=pin)
        return
    read = functools.partial(_read_and_hand_over, samples)
    with ReadingProcesses(read, batches, workers=workers, stopping=stopping) as answers:
        yield from look_ahead(answers, functools.partial(_received, pin=pin))


def _read_and_hand_over(samples: Dataset[Sample], keys: list[Any]) -> Answer:
    """In a reading process: a batch in memory that is handed over, or in the message where the system can't do that."""
    descriptors: list[int] = []

    def memory(shape: Shape) -> Rows:
        if not can_be_handed() or not all(shape):
            return _own_memory(shape)
        try:
            descriptor, rows = to_hand_over(shape)
        except OSError as error:
            raise Interrupted(
                f"there is no room for a batch of {math.prod(shape) / 1e6:.0f} MB in a process that reads images "
                f"({error.strerror}): give fewer, such as workers=2, or more memory, and start the same command again"
            ) from error
        descriptors.append(descriptor)
        return rows

    message, rows = write_samples([samples[key] for key in keys], memory)
    # As an array: torch would pass its tensors on through /dev/shm.
    return Answer(
        content=(message, None if descriptors else rows.numpy()), descriptors=tuple(descriptors)
    )


def _received(answer: Answer, *, pin: bool) -> ImageBatch:
    """In the training process: the batch of a message."""
    message, sent = answer.content
    rows = (
        handed_over(answer.descriptors[0], message.shape)
        if sent is None
        else torch.from_numpy(sent)
    )
    return message.batch(rows, pin=pin)


@dataclasses.dataclass(kw_only=True)
class Unreadable:
    """Counts images that could not be used, by name, and stops the run when they are too many.

    `setting` is where the user says how many that is. `note` is told of all of them.
    """

    n_images: int
    most_share: float
    setting: str = "data.unreadable_share"
    note: Callable[[Reasons], None] | None = None
    reasons: Reasons = dataclasses.field(default_factory=dict)

    def add(self, reasons: Reasons) -> None:
        """Raises `DataError` once more than `most_share` of the data set is unreadable."""
        self.reasons.update(reasons)
        if self.note:
            self.note(reasons)
        if len(self.reasons) > self.most_share * self.n_images:
            first, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{len(self.reasons)} of {self.n_images} images can't be used, more than {self.setting}="
                f"{self.most_share} allows; the first is {first}: {reason}. Mend or remove them, or raise the share"
            )

    def add_full(self, batch: ImageBatch, *, images: int) -> None:
        """Add those of a batch. Raises `DataError` as `add`, and for a batch of less than `images` usable images."""
        self.add(batch.unreadable)
        if len(batch.pixels) < images:
            first, reason = next(iter(batch.unreadable.items()))
            raise DataError(
                f"{len(batch.unreadable)} images in a row can't be used, and none takes their place; the first is "
                f"{first}: {reason}"
            )
