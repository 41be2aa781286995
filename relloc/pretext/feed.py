"""Moves batches of images from the data loader to the device that trains."""

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
# How many forwards the host may queue on a GPU: enough to keep it busy, few enough to stop in
# seconds.
_MAX_QUEUED = 2
# How many forwards' batches the loader must not overwrite: the one that is given, and the one whose
# copy to the GPU may not have ended.
HELD_FORWARDS = 2


@dataclasses.dataclass
class Feed:
    """An iterable of the images of each forward, in order, on the device that trains.

    A forward is `batches_per_forward` full batches of the loader, joined. With a GPU the next
    forward is copied there while the present one is computed, unless it was decoded there.

    Args:
        batches: the loader's batches, in the host's memory or on the device.
        unreadable: counts the images that can't be read.
        images_per_batch: number of images of a full batch.
        batches_per_forward: how many batches are joined.
        device: where the images go.
        waited_s: seconds that the device had to wait for the loader so far. With a GPU only the
            time counts at whose end the GPU had no work left.
        taken: how many forwards were given so far.

    Raises (while iterated over):
        DataError: too many images can't be read, or a batch has fewer than `images_per_batch`.
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
        # CUDA events, each at the end of a forward that the GPU may not have finished
        self._queued: list[Any] = []

    def __iter__(self) -> Iterator[Images]:
        if self.device.type == "cuda":
            yield from self._on_gpu()
            return
        while batches := self._take():
            yield _joined(batches)

    def _on_gpu(self) -> Iterator[Images]:
        copying = torch.cuda.Stream(self.device)
        while batches := self._take():
            computing = torch.cuda.current_stream(self.device)
            # Copied on a stream of their own, beside the forward that is being computed.
            with torch.cuda.stream(copying):
                copies = [pixels.to(self.device, non_blocking=True) for pixels in batches]
                images = _joined(copies)
            for pixels in batches:
                # Batches that were decoded here are freed before this stream has joined them.
                if pixels.is_cuda:
                    pixels.record_stream(copying)
            # The forward begins after the copy, and the memory is not reused before the forward
            # ended.
            computing.wait_stream(copying)
            images.record_stream(computing)
            yield images
            # The caller has queued the forward by now. Without waiting the host would run ahead by
            # as many forwards as the loader has ready, and a stop would have to wait for all of
            # them.
            end_of_forward = torch.cuda.current_stream(self.device).record_event()
            self._queued.append(end_of_forward)
            if len(self._queued) == _MAX_QUEUED:
                oldest = self._queued.pop(0)
                oldest.synchronize()

    def _take(self) -> list[Images]:
        """Returns the images of the batches of the next forward; an empty list at the end."""
        started = time.monotonic()
        next_batches = itertools.islice(self.batches, self.batches_per_forward)
        batches = list(next_batches)
        device_is_idle = all(end.query() for end in self._queued)
        if device_is_idle:
            self.waited_s += time.monotonic() - started
        for batch in batches:
            self.unreadable.add_full(batch, images=self.images_per_batch)
        if batches:
            self.taken += 1
        return [batch.pixels for batch in batches]


def _joined(batches: list[Images]) -> UInt8[Tensor, "n 3 s s"]:
    # One batch stays as it is, which spares a copy.
    if len(batches) == 1:
        return batches[0]
    return torch.cat(batches)
