"""Small batches of images with objects, for tests of detection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relloc.transfer.detection.batch import DetectionBatch, Targets, pad_images
from relloc.transfer.resize import Size


def targets(boxes: Sequence[Sequence[float]], classes: Sequence[int] | None = None) -> Targets:
    if classes is None:
        classes = [0] * len(boxes)
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor(classes, dtype=torch.int64),
    )


def batch_of(
    sizes: Sequence[Size], objects: Sequence[Targets], seeds: Sequence[int] | None = None
) -> DetectionBatch:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    return DetectionBatch(
        images=pad_images(images),
        sizes=list(sizes),
        targets=list(objects),
        groups=pairs(len(sizes)),
        seeds=list(range(len(sizes))) if seeds is None else list(seeds),
    )


def pairs(n: int) -> list[int]:
    """The groups of `n` images, of which each GPU had two."""
    return [image // 2 for image in range(n)]


def random_objects(n: int, size: Size, n_classes: int, generator: torch.Generator) -> Targets:
    height, width = size
    limits = torch.tensor([width, height])
    corners = torch.rand(n, 2, 2, generator=generator).sort(dim=1).values * limits
    return Targets(
        boxes=corners.reshape(n, 4),
        classes=torch.randint(n_classes, (n,), generator=generator),
    )


def part(batch: DetectionBatch, images: slice) -> DetectionBatch:
    """Some images of a batch, padded as they are there."""
    return DetectionBatch(
        images=batch.images[images],
        sizes=batch.sizes[images],
        targets=batch.targets[images],
        groups=batch.groups[images],
        seeds=batch.seeds[images],
    )


def rows(tensor: Tensor) -> list[list[float]]:
    return tensor.double().tolist()
