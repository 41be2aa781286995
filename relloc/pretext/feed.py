"""From the loader's batches in the host's memory to forwards on the device."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

Images = UInt8[Tensor, "b 3 s s"]
_AHEAD = 2  # forwards that the host may queue: enough to keep a GPU busy, few enough to stop within seconds
HELD_FORWARDS = 2  # whose batches must stay as they are: the one being taken, and the one still being copied


class Feed:
    """Forwards of `batches_per_forward` batches each, in order, on `device`.

    Copies to a GPU run on a stream of their own, beside the forward before. `waited_s` counts the
    seconds for which the loader let the device wait: on a GPU only those at whose end it had
    nothing queued any more. `taken` counts the forwards that were given.
    """

    def __init__(self, batches: Iterable[Images], *, batches_per_forward: int, device: torch.device) -> None:
        self.batches = batches
        self.batches_per_forward = batches_per_forward
        self.device = device
        self.waited_s = 0.0
        self.taken = 0
        self._queued: list[Any] = []  # CUDA events: ends of the forwards that a GPU has before it

    def __iter__(self) -> Iterator[Images]:
        loaded = iter(self.batches)
        forwards = iter(lambda: self._take(loaded), [])
        yield from self._to_gpu(forwards) if self.device.type == "cuda" else map(_joined, forwards)

    def _take(self, loaded: Iterator[Images]) -> list[Images]:
        started = time.monotonic()
        taken = list(itertools.islice(loaded, self.batches_per_forward))
        if all(end.query() for end in self._queued):
            self.waited_s += time.monotonic() - started
        self.taken += bool(taken)
        return taken

    def _to_gpu(self, forwards: Iterator[list[Images]]) -> Iterator[Images]:
        aside = torch.cuda.Stream(self.device)
        for taken in forwards:
            with torch.cuda.stream(aside):
                images = _joined([batch.to(self.device, non_blocking=True) for batch in taken])
            torch.cuda.current_stream(self.device).wait_stream(aside)
            images.record_stream(torch.cuda.current_stream(self.device))
            yield images
            self._queued.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._queued) == _AHEAD:
                self._queued.pop(0).synchronize()


def _joined(batches: list[Images]) -> UInt8[Tensor, "n 3 s s"]:
    return torch.cat(batches) if len(batches) > 1 else batches[0]
