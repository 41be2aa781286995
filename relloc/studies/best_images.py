"""The images that match constellations best, found image by image in bounded memory."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from relloc.errors import UsageError
from relloc.studies.constellations import PATCHES
from relloc.studies.patch_encoding import EncodedPatches
from relloc.studies.patch_vectors import unit_vectors

# Memory, in bytes, of the products of constellations and patches that are computed at once.
_WORK_BYTES = {"cuda": 2**29, "cpu": 2**25}
_IMAGES_AT_ONCE = 64  # that are compared with the best images so far
_NO_IMAGE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestImages:
    """The images with the strongest matches of each of s constellations, strongest first.

    Attributes:
        scores: sums of the normalized correlations of the best matches of the four patches.
        images: indices of the images, and -1 where there are fewer images than were asked for.
        boxes: x1 y1 x2 y2 of the four matches, in pixels of these images.
    """

    scores: Float32[Tensor, "s top"]
    images: Int64[Tensor, "s top"]
    boxes: Int32[Tensor, "s top 4 4"]


def best_images(
    seeds: Float32[Tensor, "m d"],
    seed_images: Int64[Tensor, "s"],
    encoded: Iterable[EncodedPatches],
    *,
    sources: Int64[Tensor, "n"],
    layer: str,
    top: int,
) -> BestImages:
    """Returns the `top` images whose patches match all four patches of a constellation best.

    In each image each of the four patches is matched with the patch of largest normalized
    correlation, wherever it lies. Of equal correlations, and equal sums of four, the earlier patch
    and the earlier image win. Images of the source that a constellation comes from are left out for
    it: its own image, and other tiles of the same photograph.

    Memory beside `seeds`: half a GiB for products (on a CPU a sixteenth of that); for each
    constellation 5 KB for images that wait to be compared and 76 bytes for each of the `top`
    images; and about twice that to compare them.

    Args:
        seeds: unit vectors (`relloc.studies.patch_vectors.unit_vectors`) of the four patches of
            each constellation, one after the other (m = 4 s), on the device.
        seed_images: index of the image of each constellation.
        encoded: patches of images, all of one image one after another.
        sources: the number of the source of each image of the data set, by index.
        layer: the layer of `encoded` that `seeds` are of.
        top: number of images.

    Raises:
        UsageError: features contain NaN or infinity.
    """
    best = _Best(len(seed_images), top, seeds.device)
    waiting: list[_ImageMatches] = []
    sources = sources.to(seeds.device)
    seed_sources = sources[seed_images.to(seeds.device)]
    n_bad = torch.zeros((), dtype=torch.int64, device=seeds.device)
    n_patches = 0
    for batch in encoded:
        vectors = unit_vectors(batch.features[layer])
        # Looked at once in the end, since each look makes the host wait for the GPU.
        n_bad += (~vectors.isfinite().all(dim=1)).sum()
        n_patches += len(vectors)
        boxes = torch.from_numpy(batch.boxes).to(seeds.device, torch.int32)
        for matches in _matches_by_image(seeds, vectors, boxes, batch.images):
            if waiting and waiting[-1].image == matches.image:
                # The image began in the batch before.
                waiting[-1] = waiting[-1].merged(matches)
                continue
            # The last image is complete only once the next one has begun.
            if len(waiting) == _IMAGES_AT_ONCE:
                best.add(waiting, sources, seed_sources)
                waiting = []
            waiting.append(matches)
    if waiting:
        best.add(waiting, sources, seed_sources)
    check_finite(int(n_bad), n_patches, layer)
    return BestImages(scores=best.scores, images=best.images, boxes=best.boxes)


def check_finite(n_bad: int, n: int, layer: str) -> None:
    """Raises `UsageError` if `n_bad` of `n` patches have features that are not finite."""
    if n_bad:
        raise UsageError(
            f"{layer}: {n_bad} of {n} patches have features with NaN or infinity, so they match "
            "nothing. The network may have diverged, or half precision may have overflowed. "
            "Try precision=fp32, batch_norm=recalibrated, or other weights."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageMatches:
    """The best match of each patch of all constellations in one image."""

    image: int
    values: Float32[Tensor, "m"]
    boxes: Int32[Tensor, "m 4"]

    def merged(self, later: "_ImageMatches") -> "_ImageMatches":
        """Returns the better of these matches and those among later patches of the image."""
        is_better = later.values > self.values
        return _ImageMatches(
            image=self.image,
            values=torch.where(is_better, later.values, self.values),
            boxes=torch.where(is_better.unsqueeze(1), later.boxes, self.boxes),
        )


def _matches_by_image(
    seeds: Float32[Tensor, "m d"],
    vectors: Float32[Tensor, "b d"],
    boxes: Int32[Tensor, "b 4"],
    images: Int64[np.ndarray, "b"],
) -> list[_ImageMatches]:
    """Returns the best matches in each image that a batch has patches of."""
    starts = np.flatnonzero(np.diff(images, prepend=_NO_IMAGE))
    ends = [*starts[1:], len(images)]
    segments = [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
    values = torch.empty(len(segments), len(seeds), device=seeds.device)
    columns = torch.empty(len(segments), len(seeds), dtype=torch.int64, device=seeds.device)
    # As many rows of products at once as fit
    n_rows = max(1, _WORK_BYTES[seeds.device.type] // (4 * len(vectors)))
    for first in range(0, len(seeds), n_rows):
        rows = slice(first, first + n_rows)
        products = seeds[rows] @ vectors.T
        for number, (start, end) in enumerate(segments):
            found = products[:, start:end].max(dim=1)
            values[number, rows] = found.values
            columns[number, rows] = found.indices + start
        # Freed before the next ones are computed
        del products
    matches = []
    for number, (start, _) in enumerate(segments):
        of_image = _ImageMatches(
            image=int(images[start]),
            values=values[number],
            boxes=boxes[columns[number]],
        )
        matches.append(of_image)
    return matches


class _Best:
    """The best images of each constellation among those that were added."""

    def __init__(self, n_seeds: int, top: int, device: torch.device) -> None:
        self.scores = torch.full((n_seeds, top), -torch.inf, device=device)
        self.images = torch.full((n_seeds, top), _NO_IMAGE, dtype=torch.int64, device=device)
        shape = (n_seeds, top, PATCHES, 4)
        self.boxes = torch.zeros(shape, dtype=torch.int32, device=device)

    def add(
        self,
        matches: list[_ImageMatches],
        sources: Int64[Tensor, "n"],
        seed_sources: Int64[Tensor, "s"],
    ) -> None:
        """Adds images, which come after all those before."""
        n_seeds, top = self.scores.shape
        values = torch.stack([of_image.values for of_image in matches], dim=1)
        new_scores = values.unflatten(0, (n_seeds, PATCHES)).sum(dim=1)
        indices = [of_image.image for of_image in matches]
        new_images = torch.tensor(indices, device=new_scores.device).expand(n_seeds, -1)
        is_own = sources[new_images] == seed_sources.unsqueeze(1)
        new_scores = new_scores.masked_fill(is_own, -torch.inf)
        new_images = new_images.masked_fill(is_own, _NO_IMAGE)
        boxes = torch.stack([of_image.boxes for of_image in matches], dim=1)
        # (m images 4) to (s images 4 4)
        new_boxes = boxes.unflatten(0, (n_seeds, PATCHES)).transpose(1, 2)

        scores = torch.cat([self.scores, new_scores], dim=1)
        # Stable, so that of equal scores the earlier image comes first.
        ordered = scores.sort(dim=1, descending=True, stable=True)
        self.scores = ordered.values[:, :top].contiguous()
        order = ordered.indices[:, :top]
        self.images = torch.cat([self.images, new_images], dim=1).gather(1, order)
        # Boxes are four times four numbers, so they are only gathered, not sorted.
        rows = torch.arange(n_seeds, device=order.device).unsqueeze(1)
        self.boxes = torch.cat([self.boxes, new_boxes], dim=1)[rows, order]
