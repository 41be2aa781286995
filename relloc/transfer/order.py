"""The order in which trainings that count in iterations see their images.

An endless stream of images, shuffled anew each time that all were seen, is dealt to a number of
GPUs; each GPU collects groups of images of one kind. So do mmdetection's InfiniteGroupBatchSampler
(the kind is the orientation) and mmsegmentation's sampler (one kind). The number of GPUs is that of
the published training: the order is the same on any number of them.
"""

import itertools
from collections import defaultdict
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
