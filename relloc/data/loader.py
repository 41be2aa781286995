"""Loading in worker processes: crops for pretraining, views for evaluations."""

import signal
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from relloc.errors import DataError

T = TypeVar("T")


def _leave_signals_to_parent(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


def _as_list(items: list[Any]) -> list[Any]:
    return items


def load(
    dataset: Dataset[T], batches: Iterable[Sequence[Any]] | Sampler[list[Any]], *, workers: int, pin: bool
) -> Iterable[list[T]]:
    """Lists of samples, one list for each batch of sample keys, in that order whatever `workers` is."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_list,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
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
