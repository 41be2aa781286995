"""Reads each image once, and takes from it everything that the study of shortcuts looks at."""

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from relloc.data.image_set import ImageSet, Role
from relloc.data.images import crop_resized
from relloc.data.samples import read_samples
from relloc.data.views import View
from relloc.errors import UnreadableImage
from relloc.features.source import EncodeConfig
from relloc.geometry import Pair, PatchGrid, ShortSide
from relloc.seeds import Use, seed_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinglePatches:
    """How single patches are cut: squares of `patch_px` of an image of the short side `short_px`.

    They lie anywhere in the image, each place as likely as any other. `count`: patches an image.
    """

    patch_px: int
    short_px: int
    count: int

    def __str__(self) -> str:
        return f"single patches of {self.patch_px} px at a short side of {self.short_px} px"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudiedImage:
    """What the study takes from one image.

    Attributes:
        index: of the image.
        source: the name of what it was taken from.
        view: the image as frozen evaluations see it.
        patches: single patches of it.
        positions: of the centers of these patches, (row, column) in parts of the image's height and
            width, from -1/2 to 1/2, where 0 is the center of the image.
        crop: the central square that the pretext task asks about, with a margin; empty where there
            is no network of the pretext task.
        corner: the square of the grid's size in a corner of the image, or empty.
    """

    index: int
    source: str
    view: UInt8[np.ndarray, "v v 3"]
    patches: UInt8[np.ndarray, "k p p 3"]
    positions: Float32[np.ndarray, "k 2"]
    crop: UInt8[np.ndarray, "c c 3"]
    corner: UInt8[np.ndarray, "s s 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeStudiedImage:
    """Makes a `StudiedImage` of an index and a seed; `grid` is that of the pretext task or None."""

    images: ImageSet
    view: View
    single: SinglePatches
    grid: PatchGrid | None
    margin_px: int

    def __call__(self, index: int, seed: int) -> StudiedImage:
        """Returns what is taken from the image.

        Raises:
            UnreadableImage: it can't be read, or is smaller than the grid and may not be enlarged.
        """
        image = self.images.read(index)
        # One generator for each part, so that a network with a grid of its own changes neither the
        # view nor the single patches.
        patches, positions = cut_anywhere(image, self.single, random.Random(seed))
        crop = corner = np.empty((0, 0, 3), np.uint8)
        if self.grid is not None:
            crop, corner = self._crops(image, self.grid, random.Random(seed))
        return StudiedImage(
            index=index,
            source=self.images.source(index),
            view=self.view(image, random.Random(seed)),
            patches=patches,
            positions=positions,
            crop=crop,
            corner=corner,
        )

    def _crops(
        self, image: Image.Image, grid: PatchGrid, rng: random.Random
    ) -> tuple[UInt8[np.ndarray, "c c 3"], UInt8[np.ndarray, "s s 3"]]:
        """Returns the central square with its margin, and the square in one of the corners."""
        try:
            height, width = grid.resized(image.height, image.width, rng.random())
        except ValueError as error:
            raise UnreadableImage(str(error)) from error
        # An image that has just the size of the grid is enlarged by the margin.
        with_margin = grid.span_px + 2 * self.margin_px
        scale = max(1.0, with_margin / min(height, width))
        size = (math.ceil(height * scale), math.ceil(width * scale))
        crop = crop_resized(image, size, _central_corner(size, with_margin), with_margin)
        # The four corners are equally likely.
        top = rng.choice((0, size[0] - grid.span_px))
        left = rng.choice((0, size[1] - grid.span_px))
        corner = crop_resized(image, size, (top, left), grid.span_px)
        return np.asarray(crop), np.asarray(corner)


def cut_anywhere(
    image: Image.Image, single: SinglePatches, rng: random.Random
) -> tuple[UInt8[np.ndarray, "k p p 3"], Float32[np.ndarray, "k 2"]]:
    """Returns single patches of an image, and the positions of their centers."""
    height, width = ShortSide(px=single.short_px).size(image.height, image.width, 0)
    side = single.patch_px
    patches = np.empty((single.count, side, side, 3), np.uint8)
    positions = np.empty((single.count, 2), np.float32)
    for number in range(single.count):
        top = rng.randint(0, height - side)
        left = rng.randint(0, width - side)
        patches[number] = np.asarray(crop_resized(image, (height, width), (top, left), side))
        positions[number, 0] = (top + side / 2) / height - 0.5
        positions[number, 1] = (left + side / 2) / width - 0.5
    return patches, positions


def _central_corner(size: Pair, side_px: int) -> Pair:
    return (size[0] - side_px) // 2, (size[1] - side_px) // 2


def read_images(
    images: ImageSet,
    indices: Sequence[int],
    role: Role,
    make: MakeStudiedImage,
    config: EncodeConfig,
    *,
    batch: int,
    seed: int,
) -> Iterator[list[StudiedImage]]:
    """Yields the images at `indices`, up to `batch` at a time; unreadable ones are left out.

    Raises:
        DataError: more of them are unreadable than the run allows.
    """
    # Both splits number their images from 0.
    split = 0 if role == "train" else 1
    batches = []
    for start in range(0, len(indices), batch):
        keys = []
        for index in indices[start : start + batch]:
            keys.append((index, seed_for(Use.SHORTCUT_PATCHES, seed, split, index)))
        batches.append(keys)
    unreadable = config.unreadable_of(len(images))
    loaded = read_samples(
        images,
        functools.partial(make),
        batches,
        workers=config.workers,
        stopping=config.stopping,
    )
    what = f"shortcuts, {images.name} {images.split}"
    for read in config.progress(loaded, what, len(batches)):
        unreadable.add(read.unreadable)
        # No image of a batch may be readable.
        if read.samples:
            yield read.samples
