"""Loading in worker processes: samples become batches there, so that one tensor travels for each batch."""

import dataclasses
import signal
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from relloc.errors import DataError


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
        """The same in page-locked memory, from which a GPU copies faster; torch's loader calls this."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


def collate(samples: list[Sample]) -> Batch:
    """One batch of samples of one size."""
    good = [(sample.pixels, sample.index) for sample in samples if sample.pixels is not None]
    pixels = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    unreadable = {name: reason for sample in samples for name, reason in sample.unreadable.items()}
    return Batch(pixels=pixels, indices=torch.tensor([index for _, index in good]).long(), unreadable=unreadable)


def _leave_ctrl_c_to_parent(_worker: int) -> None:
    # A terminal sends SIGINT to every process of the run; workers end when the parent tells them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load(samples: Dataset[Sample], batches: Iterable[list[Any]], *, workers: int, pin: bool) -> Iterable[Batch]:
    """One `Batch` for each list of sample keys, in that order whatever `workers` is."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_leave_ctrl_c_to_parent,
    )


class Unreadable:
    """Counts images that could not be used, by name, and stops the run when they are too many."""

    def __init__(self, *, n_images: int, most_share: float) -> None:
        self.reasons: dict[str, str] = {}
        self.n_images = n_images
        self.most_share = most_share

    def add(self, reasons: dict[str, str]) -> None:
        """Raises `DataError` once more than `most_share` of the data set is unreadable."""
        self.reasons.update(reasons)
        if len(self.reasons) > self.most_share * self.n_images:
            first, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{len(self.reasons)} of {self.n_images} images can't be used, more than data.unreadable_share="
                f"{self.most_share} allows; the first is {first}: {reason}. Mend or remove them, or raise the share"
            )
