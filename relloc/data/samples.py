"""Reads batches of samples of any kind, such as images of several sizes with their boxes or masks.

`relloc.data.loader` reads squares of one size, which fit into one tensor. Here a sample is whatever
the caller's function returns.
"""

import dataclasses
import functools
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from relloc.data.image_set import ImageSet
from relloc.data.loader import Reasons
from relloc.data.readers import Answer, ReadingProcesses, never
from relloc.data.shared_memory import can_be_handed, handed_over, to_hand_over
from relloc.errors import Interrupted, UnreadableImage

# Arrays of fewer bytes travel within the message.
_LEAST_HANDED_BYTES = 1 << 14
# Arrays begin at multiples of so many bytes, which suits every type.
_ALIGNMENT = 64

S = TypeVar("S")
# Makes the sample of an image, given its index and a seed for whatever is random.
MakeSample = Callable[[int, int], S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleBatch(Generic[S]):
    """The samples that could be made, in their order, and why others could not, by their names.

    `places` are where the keys of these samples stand among those that were given.
    """

    samples: list[S]
    places: list[int]
    unreadable: Reasons


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Message:
    """A pickled batch whose large arrays lie in memory that is handed over.

    `lengths` are their numbers of bytes, in the order in which the pickle asks for them.
    """

    pickled: bytes
    lengths: Sequence[int]


def read_samples(
    images: ImageSet,
    make: MakeSample[S],
    batches: Iterable[list[tuple[int, int]]],
    *,
    workers: int,
    stopping: Callable[[], bool] = never,
) -> Iterator[SampleBatch[S]]:
    """Yields a batch of `make(index, seed)` for each list of pairs (index, seed), in their order.

    Samples are made in worker processes and pickled, but for their large numpy arrays, which lie in
    memory that the workers hand over. With 0 `workers` this process makes them. A sample for which
    `make` raises `UnreadableImage` is left out, and named as `images` names its source. `stopping`
    returns true once the run is asked to stop (see `ReadingProcesses`).

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
            yield _received(each)


def _make_batch(
    images: ImageSet, make: MakeSample[Any], keys: list[tuple[int, int]]
) -> SampleBatch[Any]:
    samples = []
    places = []
    unreadable: Reasons = {}
    for place, (index, seed) in enumerate(keys):
        try:
            samples.append(make(index, seed))
            places.append(place)
        except UnreadableImage as error:
            unreadable[images.source(index)] = str(error)
    return SampleBatch(samples=samples, places=places, unreadable=unreadable)


def _answer(make_batch: Callable[[Any], SampleBatch[Any]], keys: Any) -> Answer:
    """Makes a batch in a worker process, with large arrays in memory to hand over.

    To send them through the channel would copy them several times, in the training process too.
    """
    batch = make_batch(keys)
    if not can_be_handed():
        return Answer(content=batch)
    buffers: list[memoryview] = []

    def stays_in_pickle(buffer: pickle.PickleBuffer) -> bool:
        content = buffer.raw()
        if content.nbytes < _LEAST_HANDED_BYTES:
            return True
        buffers.append(content)
        return False

    pickled = pickle.dumps(batch, protocol=5, buffer_callback=stays_in_pickle)
    lengths = [buffer.nbytes for buffer in buffers]
    message = _Message(pickled=pickled, lengths=lengths)
    if not buffers:
        return Answer(content=message)
    starts = _starts(lengths)
    try:
        descriptor, memory = to_hand_over((starts[-1],))
    except OSError as error:
        raise Interrupted(
            f"there is no room for a batch of {starts[-1] / 1e6:.0f} MB in a process that reads "
            f"images ({error.strerror}): give fewer, such as workers=2, or more memory, and start "
            "the same command again"
        ) from error
    rows = memory.numpy()
    for start, buffer in zip(starts, buffers, strict=False):
        rows[start : start + buffer.nbytes] = np.frombuffer(buffer, np.uint8)
    return Answer(content=message, descriptors=(descriptor,))


def _received(answer: Answer) -> SampleBatch[Any]:
    """Returns, in the training process, the batch that `_answer` made."""
    message = answer.content
    if not isinstance(message, _Message):
        return message
    if not message.lengths:
        return pickle.loads(message.pickled)
    starts = _starts(message.lengths)
    memory = handed_over(answer.descriptors[0], (starts[-1],)).numpy()
    parts = []
    for start, length in zip(starts, message.lengths, strict=False):
        parts.append(memory[start : start + length])
    # Arrays of the batch are views of these parts, so that the memory lives as long as they do.
    return pickle.loads(message.pickled, buffers=parts)


def _starts(lengths: Iterable[int]) -> list[int]:
    """Returns where each of several arrays begins in one memory, and where the last one ends."""
    blocks = [-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]  # rounded up
    return list(itertools.accumulate(blocks, initial=0))
