"""The order in which trainings that count in iterations see their images.

There are two orders, and each deals groups of images of one kind to a number of GPUs:

* `steps`: an endless stream of images, shuffled anew each time that all were seen, from which each
  GPU collects groups. So do mmdetection's InfiniteGroupBatchSampler (the kind is the orientation)
  and mmsegmentation's sampler (one kind), for trainings whose length is set in iterations.
* `steps_by_epochs`: each epoch has every image once, and ends before the next one begins. So does
  mmdetection's DistributedGroupSampler, for trainings whose length is set in epochs.

The number of GPUs is that of the published training: the order is the same on any number of them.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from relloc.seeds import Use, seed_for


def endless(indices: Sequence[int], seed: int) -> Iterator[int]:
    """Yields all indices in random order, then again in another one, without end."""
    for epoch in itertools.count():
        rng = np.random.default_rng(seed_for(Use.FINE_TUNING_ORDER, seed, epoch))
        for position in rng.permutation(len(indices)):
            yield indices[position]


def grouped(
    stream: Iterator[int], kind_of: Callable[[int], Hashable], size: int
) -> Iterator[list[int]]:
    """Yields groups of `size` indices of one kind, each as soon as the stream has given it.

    Example:
        next(grouped(iter([1, 2, 3, 4]), lambda index: index % 2, 2))  # [1, 3]
    """
    waiting = defaultdict(list)
    for index in stream:
        kind = kind_of(index)
        waiting[kind].append(index)
        if len(waiting[kind]) == size:
            yield waiting.pop(kind)


def steps(
    indices: Sequence[int],
    kind_of: Callable[[int], Hashable],
    *,
    gpus: int,
    images_per_gpu: int,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Yields for each step the group of `images_per_gpu` indices of each of `gpus` GPUs.

    All GPUs take their images from the same stream, as mmdetection's sampler does: one of `gpus`
    takes every `gpus`-th image of it.
    """
    streams = []
    for gpu in range(gpus):
        # Each GPU goes through a stream of its own, and leaves out the images of the others.
        own = itertools.islice(endless(indices, seed), gpu, None, gpus)
        streams.append(grouped(own, kind_of, images_per_gpu))
    while True:
        yield [next(stream) for stream in streams]


def steps_by_epochs(
    indices: Sequence[int],
    kind_of: Callable[[int], Hashable],
    *,
    gpus: int,
    images_per_gpu: int,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Yields for each step the group of each GPU as `steps` does, one epoch after the other.

    An epoch has each image once, and some again: images of a kind are repeated from the first of
    their random order on, until they fill groups for all GPUs. It is without end.
    """
    by_kind: dict[Hashable, list[int]] = defaultdict(list)
    for index in indices:
        kind = kind_of(index)
        by_kind[kind].append(index)
    for epoch in itertools.count():
        rng = np.random.default_rng(seed_for(Use.FINE_TUNING_ORDER, seed, epoch))
        groups = []
        for of_kind in by_kind.values():
            order = rng.permutation(len(of_kind))
            n_groups = gpus * _steps_of_kind(len(of_kind), gpus * images_per_gpu)
            repeated = itertools.cycle(of_kind[place] for place in order)
            for _ in range(n_groups):
                groups.append(list(itertools.islice(repeated, images_per_gpu)))
        # Kinds are mixed again. Each GPU then takes a part that is not interrupted.
        shuffled = [groups[place] for place in rng.permutation(len(groups))]
        n_steps = len(shuffled) // gpus
        for step in range(n_steps):
            yield shuffled[step::n_steps]


def steps_in_epoch(
    indices: Sequence[int], kind_of: Callable[[int], Hashable], images_per_step: int
) -> int:
    """Returns the number of steps of an epoch of `steps_by_epochs`."""
    counts = Counter(kind_of(index) for index in indices)
    return sum(_steps_of_kind(count, images_per_step) for count in counts.values())


def _steps_of_kind(n_images: int, images_per_step: int) -> int:
    return math.ceil(n_images / images_per_step)
