"""A part of an image set: a share of each class, the same wherever the images lie, or what a list names."""

import collections
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from relloc import checks
from relloc.data.image_set import ImageSet, hash_lines
from relloc.errors import DataError, data_errors


class Subset:
    """An `ImageSet` of the images that `indices` of another one name, in that order."""

    def __init__(self, *, images: ImageSet, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices
        self.name, self.split, self.classes = images.name, images.split, images.classes
        labels = images.labels
        self.labels: Sequence[int] | None = (
            None if labels is None else [labels[index] for index in indices]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image:
        return self.images.read(self.indices[index])

    def source(self, index: int) -> str:
        return self.images.source(self.indices[index])

    def digest(self) -> str:
        return hash_lines([self.images.digest(), *map(str, self.indices)])

    def list_hash(self) -> str:
        """Hash of the file names, sorted: the same for the same images in any folder, order or packing."""
        return hash_lines(sorted(_file_names(self)))


def _file_names(images: ImageSet) -> list[str]:
    return [images.source(index).rpartition("/")[2] for index in range(len(images))]


def evenly_spaced(n: int, most: int) -> list[int]:
    """`most` of the numbers 0..n-1 in even steps; all of them where there are no more."""
    count = min(n, most)
    return [step * n // count for step in range(count)]


def stratified(images: ImageSet, share: float, *, seed: int) -> Subset:
    """`share` of the images, of each class alike, at least one a class; in the order of `images`.

    In all floor(share x n), as the published lists of ImageNet have (12,811 and 128,116 of 1,281,167);
    what rounding leaves over goes to the classes that it took most from. Within a class, images are
    taken in the order of a hash of seed and file name: where they lie does not matter, and a smaller
    share is part of a larger one, but for a class or so that rounding decides.

    Raises:
        DataError: the images have no labels.
    """
    checks.number("the share of images", share, above=0, at_most=1)
    if images.labels is None:
        raise DataError(
            f"{images.name} {images.split} has no labels: no share of each class can be taken"
        )
    hashes = [
        hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()
        for name in _file_names(images)
    ]
    of_class: dict[int, list[int]] = collections.defaultdict(list)
    for index in sorted(range(len(images)), key=hashes.__getitem__):
        of_class[images.labels[index]].append(index)
    quotas = _quotas({label: len(indices) for label, indices in of_class.items()}, share)
    chosen = [index for label, indices in of_class.items() for index in indices[: quotas[label]]]
    return Subset(images=images, indices=sorted(chosen))


def _quotas(sizes: dict[int, int], share: float) -> dict[int, int]:
    """How many images are taken of each class."""
    exact = {
        label: round(share * size, 9) for label, size in sizes.items()
    }  # 0.29 x 100 is 29, not 28.999...
    quotas = {label: max(1, math.floor(wanted)) for label, wanted in exact.items()}
    over = math.floor(round(share * sum(sizes.values()), 9)) - sum(quotas.values())
    neediest = sorted(exact, key=lambda label: (quotas[label] - exact[label], label))
    for label in neediest[: max(over, 0)]:
        quotas[label] += 1
    return quotas


def listed(images: ImageSet, path: Path) -> Subset:
    """The images that a list names, one file name a line, as SimCLR's lists of ImageNet do.

    Folders before a name are passed over; in the order of `images`.

    Raises:
        DataError: the list can't be read or is empty, or a name is not that of exactly one image.
    """
    wanted, names = list_names(path), _file_names(images)
    counts = collections.Counter(names)
    odd = [name for name in wanted if counts[name] != 1]
    if odd:
        raise DataError(
            f"{path}: {len(odd)} of {len(wanted)} names are not those of exactly one image of {images.name} "
            f"{images.split}, such as {odd[0]} ({counts[odd[0]]} images): give a list of this data set's file names"
        )
    return Subset(
        images=images, indices=[index for index, name in enumerate(names) if name in wanted]
    )


def list_names(path: Path) -> dict[str, None]:
    """The file names in a list, without repetitions."""
    with data_errors(f"{path} can't be read", OSError, advice="It is to have one file name a line"):
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    names = dict.fromkeys(line.strip().rpartition("/")[2] for line in lines if line.strip())
    if not names:
        raise DataError(f"{path} names no images: it is to have one file name a line")
    return names
