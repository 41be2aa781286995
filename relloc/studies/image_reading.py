"""Reads something of each of many images in worker processes: samples of any kind.

A worker process reads some images and hands their samples over together, which costs less than one
by one.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from relloc.data.image_set import ImageSet
from relloc.data.loader import Unreadable
from relloc.data.samples import MakeSample, SampleBatch, read_samples
from relloc.features.source import EncodeConfig, SeededIndex

S = TypeVar("S")

IMAGES_AT_ONCE = 16  # that a worker process reads and hands over together


def read_each(
    images: ImageSet,
    make: MakeSample[S],
    keys: Sequence[SeededIndex],
    *,
    config: EncodeConfig,
    at_once: int = IMAGES_AT_ONCE,
) -> Iterator[SampleBatch[S]]:
    """Yields `make(index, seed)` for all `keys` in their order, some of them in each batch.

    Images that can't be read are left out without counting them, as pictures may go without them.

    Args:
        images: the images.
        make: makes a sample in a worker process: it has to be picklable.
        keys: the index of each image, and the seed that `make` gets for it. The `places` of a batch
            are positions among all of them.
        config: worker processes.
        at_once: how many images a worker process reads and hands over together.
    """
    batches = []
    for start in range(0, len(keys), at_once):
        batches.append(list(keys[start : start + at_once]))
    read = read_samples(images, make, batches, workers=config.workers, stopping=config.stopping)
    first = 0
    for batch in read:
        places = [first + place for place in batch.places]
        yield dataclasses.replace(batch, places=places)
        first += at_once


def read_counted(
    images: ImageSet,
    make: MakeSample[S],
    keys: Sequence[SeededIndex],
    what: str,
    *,
    config: EncodeConfig,
    at_once: int = IMAGES_AT_ONCE,
    unreadable: Unreadable | None = None,
) -> Iterator[SampleBatch[S]]:
    """Yields what `read_each` does, shows progress, and counts images that can't be read.

    `what` is the text beside the progress bar. `unreadable` counts them; by default that is a new
    counter for `images`.

    Raises:
        DataError: more images can't be read than `config.unreadable_share` allows.
    """
    counter = unreadable or config.unreadable_of(len(images))
    read = read_each(images, make, keys, config=config, at_once=at_once)
    for batch in config.progress(read, what, math.ceil(len(keys) / at_once)):
        counter.add(batch.unreadable)
        yield batch
