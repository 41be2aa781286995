"""Loading in worker processes: samples become batches there, so that one tensor travels for each batch."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from relloc.errors import DataError, Interrupted

PREFETCHED = 2  # batches that each worker has ready or in the making


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


def usable(samples: list[Sample]) -> tuple[list[Tensor], Int[Tensor, "b"], dict[str, str]]:
    """Pixels and indices of the samples that have pixels, and the reasons of those that have none."""
    good = [(sample.pixels, sample.index) for sample in samples if sample.pixels is not None]
    unreadable = {name: reason for sample in samples for name, reason in sample.unreadable.items()}
    return [pixels for pixels, _ in good], torch.tensor([index for _, index in good]).long(), unreadable


def collate(samples: list[Sample]) -> Batch:
    """One batch of samples of one size, pixel after pixel in memory as decoders leave them (channels last)."""
    images, indices, unreadable = usable(samples)
    side = images[0].shape[-1] if images else 0
    rows = torch.empty(len(images), side, side, 3, dtype=torch.uint8)
    for row, image in zip(rows, images, strict=True):
        row.copy_(image.permute(1, 2, 0))
    return Batch(pixels=rows.permute(0, 3, 1, 2), indices=indices, unreadable=unreadable)


def _leave_signals_to_parent(_worker: int) -> None:
    # A terminal sends SIGINT, a cluster SIGUSR1 or SIGUSR2, to every process of the run; workers end
    # when the parent tells them.
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass  # torchrun's or a cluster's to the whole run: the parent still needs images to end its step
    os._exit(0)


def load(samples: Dataset[Sample], batches: Iterable[list[Any]], *, workers: int, pin: bool) -> Iterator[Batch]:
    """One `Batch` for each list of sample keys, in that order whatever `workers` is.

    Raises:
        Interrupted: a worker was killed, most often for memory.
    """
    return loaded(samples, batches, collate, workers=workers, pin=pin)


def loaded(
    samples: Dataset[Any], batches: Iterable[list[Any]], collated: Callable[[Any], Any], *, workers: int, pin: bool
) -> Iterator[Any]:
    """What `collated` makes of the samples of each batch, in order. Raises as `load`."""
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collated,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        prefetch_factor=PREFETCHED if workers else None,
    )
    return _watched(loader, workers)


def _watched(loader: DataLoader, workers: int) -> Iterator[Any]:
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    batches = iter(loader)
    # torch's handler tells of a dead worker wherever its parent just is, even while it saves; the queue tells too.
    signal.signal(signal.SIGCHLD, before)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if not connection.wait([worker.sentinel for worker in getattr(batches, "_workers", ())], timeout=1):
            raise  # none has died
        raise Interrupted(
            f"a process that reads images was killed, most often because memory ran out (workers={workers}): "
            "give fewer, such as workers=2, or more shared memory (/dev/shm), and start the same command again"
        ) from error


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
