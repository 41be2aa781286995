"""Reads batches of images in worker processes, as torch's DataLoader does.

Samples are put together to batches in the workers, so that one piece of shared memory is handed
over for each batch. `relloc.data.slots` is the faster variant that pretraining uses.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from relloc.data.handing_over import Shape, answer_with, memory_to_hand_over, own_memory, received
from relloc.data.readers import Answer, ReadingProcesses, look_ahead, never
from relloc.errors import DataError
from relloc.terminal import quantity

# Why images can't be used, by their names.
Reasons = dict[str, str]
Rows = UInt8[Tensor, "b s s 3"]
DrawnNumbers = Float32[np.ndarray, "b n"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The pixels of image `index`, or None if the image can't be used.

    `unreadable` gives the reasons by the names of the images that could not be read. `drawn` are
    random numbers that belong to the sample, if it has any.
    """

    index: int
    pixels: UInt8[np.ndarray, "s s 3"] | None
    unreadable: Reasons = dataclasses.field(default_factory=dict)
    drawn: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """A batch of images: the samples that have pixels, and why others have none.

    Pixels lie in memory with channels last, as decoders write them. `drawn` are random numbers of
    each sample, where samples have any.
    """

    pixels: UInt8[Tensor, "b 3 s s"]
    indices: Int[Tensor, "b"]
    unreadable: Reasons
    drawn: Float[Tensor, "b n"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchMessage:
    """What a worker process reports of a batch, beside its pixels."""

    indices: list[int]
    unreadable: Reasons
    shape: Shape
    drawn: DrawnNumbers = None

    # The pixels are no field: they travel in shared memory, where the system has it.
    def batch(self, rows: Rows, *, pin: bool = False) -> ImageBatch:
        """Returns the batch with the pixels `rows`, with `pin` copied to page-locked memory."""
        # A view: nothing is copied, and the memory keeps channels last.
        pixels = rows.permute(0, 3, 1, 2)
        indices = torch.tensor(self.indices, dtype=torch.int64)
        # pin_memory makes a copy, which `relloc.data.slots` avoids.
        if pin:
            pixels = pixels.pin_memory()
        return ImageBatch(
            pixels=pixels,
            indices=indices,
            unreadable=self.unreadable,
            drawn=as_tensor(self.drawn),
        )


def write_samples(
    samples: list[Sample], memory: Callable[[Shape], Rows]
) -> tuple[BatchMessage, Rows]:
    """Writes the pixels of samples, all of one size, into `memory(shape)`.

    Returns the message about the batch and the memory, which has one row for each sample that has
    pixels.
    """
    indices: list[int] = []
    pictures: list[UInt8[np.ndarray, "s s 3"]] = []
    drawn: list[Sequence[float] | None] = []
    unreadable: Reasons = {}
    for sample in samples:
        # Also of a sample with pixels, which may stand for others that could not be read
        unreadable.update(sample.unreadable)
        if sample.pixels is not None:
            indices.append(sample.index)
            pictures.append(sample.pixels)
            drawn.append(sample.drawn)
    # All pictures have one size, as one tensor holds them.
    side = len(pictures[0]) if pictures else 0
    shape = (len(pictures), side, side, 3)
    rows = memory(shape)
    # Pictures are numpy arrays, and `rows.numpy()` is a view of the same memory.
    for row, pixels in zip(rows.numpy(), pictures, strict=True):
        row[:] = pixels
    message = BatchMessage(
        indices=indices,
        unreadable=unreadable,
        shape=shape,
        drawn=as_array(drawn),
    )
    return message, rows


def as_array(drawn: Sequence[Sequence[float] | None]) -> DrawnNumbers:
    """Returns the random numbers of samples as they are sent; None if the samples have none."""
    if not drawn or drawn[0] is None:
        return None
    return np.array(drawn, dtype=np.float32)


def as_tensor(drawn: DrawnNumbers) -> Float[Tensor, "b n"] | None:
    """Returns random numbers that were sent."""
    return None if drawn is None else torch.from_numpy(drawn)


def collate(samples: list[Sample], *, pin: bool = False) -> ImageBatch:
    """Returns a batch of samples, all of one size, in newly allocated memory."""
    message, rows = write_samples(samples, own_memory)
    return message.batch(rows, pin=pin)


def load(
    samples: Dataset[Sample],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    pin: bool,
    stopping: Callable[[], bool] = never,
) -> Iterator[ImageBatch]:
    """Yields one batch for each list of sample keys, in their order whatever `workers` is.

    With 0 `workers` this process reads the images itself. With `pin` batches are in page-locked
    memory, from which a GPU copies faster. `stopping` returns true once the run is asked to stop
    (see `ReadingProcesses`).

    Raises:
        Interrupted: a worker was killed, most often because memory ran out.

    Example:
        >>> for batch in load(crops, [[(0, 0), (1, 0)], [(2, 0)]], workers=2, pin=False):
        ...     batch.pixels.shape
    """
    # Without workers images are read here, one batch after another.
    if not workers:
        for keys in batches:
            batch = [samples[key] for key in keys]
            yield collate(batch, pin=pin)
        return
    # The workers get the data set once, when they start, and then only keys of samples.
    read = functools.partial(_read_and_hand_over, samples)
    receive = functools.partial(_received, pin=pin)
    reading = ReadingProcesses(
        read,
        batches,
        workers=workers,
        stopping=stopping,
    )
    with reading as answers:
        # A few batches are received ahead, in threads, while the caller works on one.
        yield from look_ahead(answers, receive)


def _read_and_hand_over(samples: Dataset[Sample], keys: list[Any]) -> Answer:
    """Reads a batch in a worker process, into memory that is handed to the training process."""
    descriptors: list[int] = []
    memory = functools.partial(memory_to_hand_over, descriptors)
    batch = [samples[key] for key in keys]
    message, rows = write_samples(batch, memory)
    return answer_with(message, rows, descriptors)


def _received(answer: Answer, *, pin: bool) -> ImageBatch:
    """Returns, in the training process, the batch that `_read_and_hand_over` answered with."""
    message, rows = received(answer)
    return message.batch(rows, pin=pin)


@dataclasses.dataclass(kw_only=True)
class Unreadable:
    """A count of the images that could not be used, which stops the run when they are too many.

    At most the share `most_share` of the data set's `n_images` may be unreadable; `setting` is the
    name of that setting for error messages. `note` is called with all reasons that are added.
    """

    n_images: int
    most_share: float
    setting: str = "data.unreadable_share"
    note: Callable[[Reasons], None] | None = None
    reasons: Reasons = dataclasses.field(default_factory=dict)

    def add(self, reasons: Reasons) -> None:
        """Adds images that could not be read, with the reasons by their names.

        Raises:
            DataError: more than `most_share` of the data set is unreadable.
        """
        # By name: an image that is met again in a later epoch counts once.
        self.reasons.update(reasons)
        if self.note:
            self.note(reasons)
        most = self.most_share * self.n_images
        if len(self.reasons) > most:
            # Dicts keep their order: this is the one that was met first.
            first, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{len(self.reasons)} of {self.n_images} images can't be used, more than "
                f"{self.setting}={self.most_share} allows; the first is {first}: {reason}. "
                "Repair or remove them, or raise the share"
            )

    def add_full(self, batch: ImageBatch, *, images: int) -> None:
        """Adds the unreadable images of a batch that must have `images` usable ones.

        Raises:
            DataError: as `add`, or the batch has fewer usable images.
        """
        unreadable = batch.unreadable
        self.add(unreadable)
        if len(batch.pixels) < images:
            n_unreadable = quantity(len(unreadable), "image")
            first, reason = next(iter(unreadable.items()))
            raise DataError(
                f"{n_unreadable} in a row can't be used, so that none could "
                f"replace another; the first is {first}: {reason}. Repair or remove them"
            )
