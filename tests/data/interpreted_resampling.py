"""Compares the kernel of relloc.data.resampling_kernel, interpreted on a CPU, with `squares`.

A process of its own, since Triton asks once, when it is imported, whether to interpret.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import random

import torch

from relloc.data import resampling_kernel
from relloc.data.cuts import batch_cuts
from relloc.data.resampling import squares
from relloc.data.views import Center, RandomCrop, RandomResized, Squash

# Wide, tall, very long, tiny; of the tall ones Pillow resizes columns first.
SIZES = [(30, 44), (61, 30), (9, 13), (8, 40), (50, 8)]
VIEWS = [
    Center(short_px=16, crop_px=12),
    RandomResized(crop_px=12, scale=(0.05, 1.0)),
    RandomCrop(short_px=30, crop_px=12),
    Squash(short_px=16, side_px=12),  # in two steps
]


def images_of_every_layout() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = []
    for number, (height, width) in enumerate(SIZES):
        if number % 3 == 0:
            image = torch.randint(256, (3, height, width), generator=generator)
        elif number % 3 == 1:
            # As pixels that were sent, with the colors of a pixel next to each other
            image = torch.randint(256, (height, width, 3), generator=generator).permute(2, 0, 1)
        else:
            # As an image that was turned upright
            image = torch.randint(256, (3, width, height), generator=generator).mT
        images.append(image.to(torch.uint8))
    return images


# Several programs for each image, the last of which are not full
resampling_kernel._BLOCK = (32, 8)
for view in VIEWS:
    rng = random.Random(0)
    images = images_of_every_layout()
    cuts = [view.cut(image.shape[1], image.shape[2], rng) for image in images]
    found = resampling_kernel.squares_by_kernel(images, batch_cuts(cuts))
    expected = squares(images, batch_cuts(cuts))
    assert torch.equal(found, expected), view
    assert found.stride() == expected.stride()
