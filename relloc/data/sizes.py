"""Finds before a training which images are smaller than the square that is to be cut from them."""

import dataclasses
import functools
from pathlib import Path

from relloc.data.contents import in_threads
from relloc.data.folder import FolderImages
from relloc.data.image_set import ImageSet, read_undecoded
from relloc.data.images import read_size, size_of
from relloc.data.processes import NamedProgress, without_named_progress
from relloc.data.subsets import evenly_spaced
from relloc.errors import UnreadableImage
from relloc.geometry import Pair

# Sizes of more images are not looked at: those of ImageNet's 1.3 million take minutes.
MOST_LOOKED_AT = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallImages:
    """Which images of a set are too small, of those that were looked at.

    Attributes:
        n_looked_at: how many those are: all, or `MOST_LOOKED_AT` evenly spaced ones.
        indices: the indices of the small ones.
        first_size: height and width of the first of these in pixels, as stored; None if none is.
    """

    n_looked_at: int
    indices: tuple[int, ...]
    first_size: Pair | None

    @property
    def share(self) -> float:
        """The share of the images that were looked at that are too small, 0 to 1."""
        return len(self.indices) / self.n_looked_at if self.n_looked_at else 0.0


def images_smaller_than(
    images: ImageSet, side_px: int, progress: NamedProgress = without_named_progress
) -> SmallImages:
    """Looks for images whose shorter side has fewer than `side_px` pixels.

    Of files only the beginning is read. Those that can't be read do not count as small.
    """
    n_looked_at = min(len(images), MOST_LOOKED_AT)
    looked_at = evenly_spaced(len(images), n_looked_at)
    bar = functools.partial(progress, f"sizes {images.name} {images.split}")
    sizes: list[Pair | None] = []
    if isinstance(images, FolderImages):
        paths = [images.paths[index] for index in looked_at]
        sizes = in_threads(_size_of_file, paths, bar, "files")
    else:
        with bar(n_looked_at, 0) as report:
            for number, index in enumerate(looked_at, start=1):
                sizes.append(_size_in_set(images, index))
                report(number, "images")

    small = {}
    for index, size in zip(looked_at, sizes, strict=True):
        if size is not None and min(size) < side_px:
            small[index] = size
    return SmallImages(
        n_looked_at=n_looked_at,
        indices=tuple(small),
        first_size=next(iter(small.values()), None),
    )


def _size_of_file(path: str) -> Pair | None:
    """Returns height and width of a file's image, or None if it can't be read."""
    try:
        return read_size(Path(path))
    except UnreadableImage:
        return None


def _size_in_set(images: ImageSet, index: int) -> Pair | None:
    """Returns height and width of an image of a set, or None if it can't be read."""
    try:
        return size_of(read_undecoded(images, index))
    except UnreadableImage:
        return None
