"""Reads batches of samples of any kind, such as images of several sizes with their boxes or masks.

`relloc.data.loader` reads squares of one size, which fit into one tensor. Here a sample is whatever
the caller's function returns.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from relloc.data.image_set import ImageSet
from relloc.data.loader import Reasons
from relloc.data.readers import Answer, ReadingProcesses, never
from relloc.errors import UnreadableImage

S = TypeVar("S")
# Makes the sample of an image, given its index and a seed for whatever is random.
MakeSample = Callable[[int, int], S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleBatch(Generic[S]):
    """The samples that could be made, in their order, and why others could not, by their names."""

    samples: list[S]
    unreadable: Reasons


def read_samples(
    images: ImageSet,
    make: MakeSample[S],
    batches: Iterable[list[tuple[int, int]]],
    *,
    workers: int,
    stopping: Callable[[], bool] = never,
) -> Iterator[SampleBatch[S]]:
    """Yields a batch of `make(index, seed)` for each list of pairs (index, seed), in their order.

    Samples are made in worker processes and pickled, so arrays of bytes are best. With 0 `workers`
    this process makes them. A sample for which `make` raises `UnreadableImage` is left out, and
    named as `images` names its source. `stopping` returns true once the run is asked to stop (see
    `ReadingProcesses`).

    Raises:
        Interrupted: a worker was killed, most often because memory ran out.
    """
    make_batch = functools.partial(_make_batch, images, make)
    if not workers:
        yield from map(make_batch, batches)
        return
    answer = functools.partial(_answer, make_batch)
    with ReadingProcesses(answer, batches, workers=workers, stopping=stopping) as answers:
        for each in answers:
            yield each.content


def _make_batch(
    images: ImageSet, make: MakeSample[Any], keys: list[tuple[int, int]]
) -> SampleBatch[Any]:
    samples = []
    unreadable: Reasons = {}
    for index, seed in keys:
        try:
            samples.append(make(index, seed))
        except UnreadableImage as error:
            unreadable[images.source(index)] = str(error)
    return SampleBatch(samples=samples, unreadable=unreadable)


def _answer(make_batch: Callable[[Any], SampleBatch[Any]], keys: Any) -> Answer:
    return Answer(content=make_batch(keys))
