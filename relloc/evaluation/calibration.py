"""Which images batch norm is recalibrated on, for evaluations of all kinds."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.data.views import View
from relloc.features.source import EncodeConfig, SeededIndex
from relloc.seeds import Use, seed_for

# Enters fingerprints. To raise when other images are drawn to recalibrate batch norm on.
CALIBRATION_VERSION = 2


def calibration_keys(
    indices: Sequence[int], *, n_images: int, size: int, seed: int
) -> list[list[SeededIndex]]:
    """Returns batches of `size` of the images at `indices`, each image with a seed of its own.

    They are drawn by the run's `seed`, about `n_images` of them. All batches have the same number
    of images: each counts the same in the statistics, whatever its size. At least one batch is
    returned, of all images if there are fewer than `size`.
    """
    generator = torch.Generator().manual_seed(seed_for(Use.CALIBRATION_IMAGES, seed))
    order = torch.randperm(len(indices), generator=generator)
    size = min(size, len(indices))
    n_batches = max(1, min(n_images, len(indices)) // size)
    batches = []
    for start in range(0, n_batches * size, size):
        keys = []
        for place in order[start : start + size].tolist():
            index = indices[place]
            # The seed depends on the image alone, whatever batch it is in.
            keys.append((index, seed_for(Use.CALIBRATION_VIEW, seed, index)))
        batches.append(keys)
    return batches


def calibration_batches(
    images: ImageSet, view: View, *, n_images: int, seed: int, config: EncodeConfig
) -> Iterator[Tensor]:
    """Yields views (b 3 s s) of images, on the device, to estimate batch-norm statistics on.

    `n_images` and `seed` are those of `calibration_keys`. Images that can't be read are missing.
    """
    indices = range(len(images))
    batches = calibration_keys(indices, n_images=n_images, size=config.batch, seed=seed)
    unreadable = config.unreadable_of(len(images))
    keys = [key for batch in batches for key in batch]
    for views in config.views(images, view, keys, len(batches[0])):
        unreadable.add(views.unreadable)
        if len(views.pixels):
            yield config.to_device(views.pixels)
