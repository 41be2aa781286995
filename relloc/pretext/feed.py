"""From the loader's batches in the host's memory to forwards on the device."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from relloc.data.loader import ImageBatch, Unreadable

Images = UInt8[Tensor, "b 3 s s"]
_AHEAD = 2  # forwards that the host may queue: enough to keep a GPU busy, few enough to stop within seconds
HELD_FORWARDS = 2  # whose batches must stay as they are: the one being taken, and the one still being copied


@dataclasses.dataclass
class Feed:
    """Forwards of `batches_per_forward` full batches each, in order, on `device`.

    Copies to a GPU run on a stream of their own, beside the forward before. `waited_s` counts the
    seconds for which the loader let the device wait: on a GPU only those at whose end it had
    nothing queued any more. `taken` counts the forwards that were given.

    Raises (while iterated over):
        DataError: `unreadable` images are too many, or a batch has less than `images_per_batch`.
    """

    batches: Iterable[ImageBatch]
    unreadable: Unreadable
    _: dataclasses.KW_ONLY
    images_per_batch: int
    batches_per_forward: int
    device: torch.device
    waited_s: float = 0.0
    taken: int = 0

    def __post_init__(self) -> None:
        self.batches = iter(self.batches)
        self._queued: list[Any] = []  # CUDA events: ends of the forwards that a GPU has before it

    def __iter__(self) -> Iterator[Images]:
        if self.device.type != "cuda":
            while taken := self._take():
                yield _joined(taken)
            return
        copying = torch.cuda.Stream(self.device)
        while taken := self._take():
            computing = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(copying):
                images = _joined([pixels.to(self.device, non_blocking=True) for pixels in taken])
            computing.wait_stream(copying)
            images.record_stream(computing)
            yield images
            self._queued.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._queued) == _AHEAD:
                self._queued.pop(0).synchronize()

    def _take(self) -> list[Images]:
        """The batches of the next forward; none at the end."""
        started = time.monotonic()
        taken = list(itertools.islice(self.batches, self.batches_per_forward))
        if all(end.query() for end in self._queued):
            self.waited_s += time.monotonic() - started
        for batch in taken:
            self.unreadable.add_full(batch, images=self.images_per_batch)
        self.taken += bool(taken)
        return [batch.pixels for batch in taken]


def _joined(batches: list[Images]) -> UInt8[Tensor, "n 3 s s"]:
    return torch.cat(batches) if len(batches) > 1 else batches[0]
