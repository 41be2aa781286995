"""Subsets of a data set: a share of each class, or the images that a list names.

They are the training sets of semi-supervised evaluations with 1 % or 10 % of the labels. A subset
has the same images wherever they lie on disk, and whether or not they are packed.
"""

import collections
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from relloc import checks
from relloc.data.image_set import ImageSet, hash_lines, read_undecoded
from relloc.data.images import Undecoded
from relloc.errors import DataError, data_errors
from relloc.terminal import quantity


class Subset:
    """The images of another `ImageSet` at `indices`, in that order; an `ImageSet` itself."""

    def __init__(self, *, images: ImageSet, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices
        self.name = images.name
        self.split = images.split
        self.classes = images.classes
        labels = images.labels
        self.labels: Sequence[int] | None = None
        if labels is not None:
            self.labels = [labels[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image:
        index_of_all = self.indices[index]
        return self.images.read(index_of_all)

    def read_undecoded(self, index: int) -> Undecoded:
        """Returns an image undecoded, where the set that it is of can do so, or its pixels."""
        index_of_all = self.indices[index]
        return read_undecoded(self.images, index_of_all)

    def source(self, index: int) -> str:
        index_of_all = self.indices[index]
        return self.images.source(index_of_all)

    def digest(self) -> str:
        # Which images they are, and in which order: labels and contents are in the digest of all.
        digest_of_all = self.images.digest()
        chosen = map(str, self.indices)
        return hash_lines([digest_of_all, *chosen])

    def list_hash(self) -> str:
        """Returns a hash of the sorted file names.

        It is the same for the same images in any folder, order or packing.
        """
        names = _file_names(self)
        return hash_lines(sorted(names))


def _file_names(images: ImageSet) -> list[str]:
    """Returns the name of each image without its folders."""
    names = []
    for index in range(len(images)):
        path = images.source(index)
        _, _, name = path.rpartition("/")
        names.append(name)
    return names


def evenly_spaced(n: int, most: int) -> list[int]:
    """Returns `most` of the numbers 0 to n - 1 in even steps, or all if there are no more.

    Example:
        >>> evenly_spaced(10, 4)
        [0, 2, 5, 7]
    """
    count = min(n, most)
    return [step * n // count for step in range(count)]


def stratified(images: ImageSet, share: float, *, seed: int) -> Subset:
    """Returns the same share of each class, at least one image a class, in the order of `images`.

    Together they are floor(share x n) images, as in the published lists of ImageNet (12,811 and
    128,116 of 1,281,167). A smaller share with the same seed is part of a larger one, but for a few
    images that rounding decides.

    Raises:
        DataError: the images have no labels.

    Example:
        >>> stratified(images, 0.01, seed=0)
    """
    checks.number("the share of images", share, above=0, at_most=1)
    if images.labels is None:
        raise DataError(
            f"{images.name} {images.split} has no labels: no share of each class can be taken"
        )
    # Within a class images are taken in the order of a hash of seed and file name, so that their
    # folders and their order do not matter.
    hashes = []
    for name in _file_names(images):
        text = f"{seed} {name}"
        encoded = text.encode("utf-8", "surrogateescape")
        hasher = hashlib.sha256(encoded)
        hashes.append(hasher.digest())
    all_indices = range(len(images))
    in_order = sorted(all_indices, key=hashes.__getitem__)
    indices_of: dict[int, list[int]] = collections.defaultdict(list)
    for index in in_order:
        label = images.labels[index]
        indices_of[label].append(index)
    class_sizes = {}
    for label, indices in indices_of.items():
        class_sizes[label] = len(indices)
    quotas = _quotas(class_sizes, share)
    # The first ones of each class: a larger share takes these and more.
    chosen = []
    for label, indices in indices_of.items():
        quota = quotas[label]
        chosen += indices[:quota]
    return Subset(images=images, indices=sorted(chosen))


def _quotas(sizes: dict[int, int], share: float) -> dict[int, int]:
    """Returns how many images are taken of each class, by the number of images that it has."""
    # Rounded, since 0.29 x 100 is 28.999... in floating point.
    exact = {}
    quotas = {}
    for label, size in sizes.items():
        exact[label] = round(share * size, 9)
        rounded_down = math.floor(exact[label])
        # At least one, so that no class is without images.
        quotas[label] = max(1, rounded_down)
    n_images = sum(sizes.values())
    total = math.floor(round(share * n_images, 9))
    left_over = max(total - sum(quotas.values()), 0)

    # What rounding down leaves over goes to the classes that lost most by it; of classes that lost
    # the same, to the one with the lower number.
    def gain(label: int) -> tuple[float, int]:
        return quotas[label] - exact[label], label

    neediest = sorted(exact, key=gain)
    for label in neediest[:left_over]:
        quotas[label] += 1
    return quotas


def listed(images: ImageSet, path: Path) -> Subset:
    """Returns the images that a list file names, in the order of `images`.

    A list has one file name a line, as SimCLR's lists of ImageNet; folders before it are ignored.

    Raises:
        DataError: the list can't be read or is empty, or a name is not that of exactly one image.
    """
    wanted = list_names(path)
    image_names = _file_names(images)
    counts = collections.Counter(image_names)
    # A name that several images have does not say which one is meant.
    ambiguous = [name for name in wanted if counts[name] != 1]
    if ambiguous:
        first = ambiguous[0]
        n_images = quantity(counts[first], "image")
        raise DataError(
            f"{path}: {len(ambiguous)} of {len(wanted)} names are not those of exactly one image "
            f"of {images.name} {images.split}, such as {first} "
            f"({n_images}): give a "
            "list of this data set's file names"
        )
    # In the order of the images, so that the order of the list does not count.
    indices = []
    for index, name in enumerate(image_names):
        if name in wanted:
            indices.append(index)
    return Subset(images=images, indices=indices)


def list_names(path: Path) -> dict[str, None]:
    """Returns the file names in a list as keys, in its order and without repetitions.

    Raises:
        DataError: the list can't be read or is empty.
    """
    with data_errors(
        f"{path} can't be read",
        OSError,
        advice="It is to have one file name a line",
    ):
        # Names of files may have bytes that are no UTF-8.
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    # Not splitlines, which would also split at characters that names may have.
    names: dict[str, None] = {}
    for line in text.split("\n"):
        listed_path = line.strip()
        if listed_path:
            _, _, name = listed_path.rpartition("/")
            names[name] = None
    if not names:
        raise DataError(f"{path} names no images: it is to have one file name a line")
    return names
