"""Loading in worker processes: samples become batches there, so that one tensor travels for each batch."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Pixels of image `index`, or None if it can't be used; `unreadable` says why, by image name."""

    index: int
    pixels: UInt8[Tensor, "3 s s"] | None
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of a batch that have pixels, and the reasons of those that have none."""

    pixels: UInt8[Tensor, "b 3 s s"]
    indices: Int[Tensor, "b"]
    unreadable: dict[str, str]

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies faster."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


def usable(samples: list[Sample]) -> tuple[list[Tensor], Int[Tensor, "b"], dict[str, str]]:
    """Pixels and indices of the samples that have pixels, and the reasons of those that have none."""
    good = [(sample.pixels, sample.index) for sample in samples if sample.pixels is not None]
    unreadable = {name: reason for sample in samples for name, reason in sample.unreadable.items()}
    return [pixels for pixels, _ in good], torch.tensor([index for _, index in good]).long(), unreadable


def _own_memory(shape: tuple[int, ...]) -> UInt8[Tensor, "n s s 3"]:
    return torch.empty(shape, dtype=torch.uint8)


def collate(
    samples: list[Sample], memory: Callable[[tuple[int, ...]], UInt8[Tensor, "n s s 3"]] = _own_memory
) -> Batch:
    """One batch of samples of one size, pixel after pixel in memory as decoders leave them (channels last).

    `memory` gives the bytes that the batch is written to.
    """
    images, indices, unreadable = usable(samples)
    side = images[0].shape[-1] if images else 0
    rows = memory((len(images), side, side, 3))
    for row, image in zip(rows, images, strict=True):
        row.copy_(image.permute(1, 2, 0))
    return Batch(pixels=rows.permute(0, 3, 1, 2), indices=indices, unreadable=unreadable)


def load(
    samples: Dataset[Sample],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    pin: bool,
    stopping: Callable[[], bool] = never,
) -> Iterator[Batch]:
    """One `Batch` for each list of sample keys, in that order whatever `workers` is.

    With `pin` batches are in page-locked memory, from which a GPU copies faster. `stopping` is as in
    `ReadingProcesses`.

    Raises:
        Interrupted: a worker was killed, most often for memory.
    """
    if not workers:
        for keys in batches:
            batch = collate([samples[key] for key in keys])
            yield batch.pin_memory() if pin else batch
        return
    with ReadingProcesses(_Collated(samples), batches, workers=workers, stopping=stopping) as answers:
        yield from look_ahead(answers, functools.partial(_received, pin=pin))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sent:
    """A batch on its way from a reading process; `rows` are None where they lie in memory that is handed over."""

    shape: tuple[int, ...]
    rows: UInt8[np.ndarray, "n s s 3"] | None
    indices: Int[np.ndarray, "n"]
    unreadable: dict[str, str]


class _Collated:
    """What a reading process makes of the keys of a batch."""

    def __init__(self, samples: Dataset[Sample]) -> None:
        self.samples = samples

    def __call__(self, keys: list[Any]) -> Answer:
        descriptors: list[int] = []

        def memory(shape: tuple[int, ...]) -> UInt8[Tensor, "n s s 3"]:
            if not can_be_handed() or not all(shape):
                return _own_memory(shape)
            descriptor, rows = _to_hand_over(shape)
            descriptors.append(descriptor)
            return rows

        batch = collate([self.samples[key] for key in keys], memory)
        rows = batch.pixels.permute(0, 2, 3, 1)
        sent = _Sent(
            shape=tuple(rows.shape),
            rows=None if descriptors else rows.numpy(),
            indices=batch.indices.numpy(),
            unreadable=batch.unreadable,
        )
        return Answer(content=sent, descriptors=tuple(descriptors))


def _to_hand_over(shape: tuple[int, ...]) -> tuple[int, Tensor]:
    try:
        return to_hand_over(shape)
    except OSError as error:
        raise Interrupted(
            f"there is no room for a batch of {math.prod(shape) / 1e6:.0f} MB in a process that reads images "
            f"({error.strerror}): give fewer, such as workers=2, or more memory, and start the same command again"
        ) from error


def _received(answer: Answer, *, pin: bool) -> Batch:
    """The batch as the training process takes it."""
    sent: _Sent = answer.content
    rows = handed_over(answer.descriptors[0], sent.shape) if sent.rows is None else torch.from_numpy(sent.rows)
    batch = Batch(pixels=rows.permute(0, 3, 1, 2), indices=torch.from_numpy(sent.indices), unreadable=sent.unreadable)
    return batch.pin_memory() if pin else batch


class Unreadable:
    """Counts images that could not be used, by name, and stops the run when they are too many.

    `setting` is where the user says how many that is.
    """

    def __init__(self, *, n_images: int, most_share: float, setting: str = "data.unreadable_share") -> None:
        self.reasons: dict[str, str] = {}
        self.n_images = n_images
        self.most_share = most_share
        self.setting = setting

    def add(self, reasons: dict[str, str]) -> None:
        """Raises `DataError` once more than `most_share` of the data set is unreadable."""
        self.reasons.update(reasons)
        if len(self.reasons) > self.most_share * self.n_images:
            first, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{len(self.reasons)} of {self.n_images} images can't be used, more than {self.setting}="
                f"{self.most_share} allows; the first is {first}: {reason}. Mend or remove them, or raise the share"
            )
