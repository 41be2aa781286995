"""A part of an image set: a share of each class, the same wherever the images lie, or what a list names."""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from relloc import checks
from relloc.data.image_set import ImageSet, hash_lines
from relloc.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset:
    """An `ImageSet` of the images at `places` of another one, in that order."""

    images: ImageSet
    places: Sequence[int]

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def split(self) -> str:
        return self.images.split

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @property
    def labels(self) -> Sequence[int] | None:
        known = self.images.labels
        return None if known is None else [known[place] for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> Image.Image:
        return self.images.read(self.places[index])

    def source(self, index: int) -> str:
        return self.images.source(self.places[index])

    def digest(self) -> str:
        return hash_lines([self.images.digest(), *map(str, self.places)])

    def list_hash(self) -> str:
        """Hash of the file names, sorted: the same for the same images in any folder, order or packing."""
        return hash_lines(sorted(_file_name(self, index) for index in range(len(self))))


def evenly_spaced(n: int, most: int) -> list[int]:
    """`most` of the numbers 0..n-1 in even steps; all of them where there are no more."""
    count = min(n, most)
    return [place * n // count for place in range(count)]


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
        raise DataError(f"{images.name} {images.split} has no labels: no share of each class can be taken")
    of_class: dict[int, list[int]] = collections.defaultdict(list)
    for place, label in enumerate(images.labels):
        of_class[label].append(place)
    quotas = _quotas({label: len(places) for label, places in of_class.items()}, share)
    chosen: list[int] = []
    for label, places in of_class.items():
        by_luck = sorted(places, key=lambda place: (_luck(seed, _file_name(images, place)), place))
        chosen += by_luck[: quotas[label]]
    return Subset(images=images, places=sorted(chosen))


def _quotas(sizes: dict[int, int], share: float) -> dict[int, int]:
    exact = {label: round(share * size, 9) for label, size in sizes.items()}  # 0.29 x 100 is 29, not 28.999...
    quotas = {label: max(1, math.floor(wanted)) for label, wanted in exact.items()}
    over = math.floor(round(share * sum(sizes.values()), 9)) - sum(quotas.values())
    neediest = sorted(exact, key=lambda label: (quotas[label] - exact[label], label))
    for label in neediest[: max(over, 0)]:
        quotas[label] += 1
    return quotas


def _luck(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()


def _file_name(images: ImageSet, place: int) -> str:
    return images.source(place).rpartition("/")[2]


def listed(images: ImageSet, path: Path) -> Subset:
    """The images that a list names, one file name a line, as SimCLR's lists of ImageNet do.

    Folders before a name are passed over; in the order of `images`.

    Raises:
        DataError: the list can't be read or is empty, or a name is not that of exactly one image.
    """
    wanted = list_names(path)
    places: dict[str, list[int]] = collections.defaultdict(list)
    for place in range(len(images)):
        name = _file_name(images, place)
        if name in wanted:
            places[name].append(place)
    odd = [name for name in wanted if len(places[name]) != 1]
    if odd:
        count = len(places[odd[0]])
        raise DataError(
            f"{path}: {len(odd)} of {len(wanted)} names are not those of exactly one image of {images.name} "
            f"{images.split}, such as {odd[0]} ({count} images): give a list of this data set's file names"
        )
    return Subset(images=images, places=sorted(found[0] for found in places.values()))


def list_names(path: Path) -> dict[str, None]:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}. It is to have one file name a line") from error
    names = dict.fromkeys(line.strip().rpartition("/")[2] for line in lines if line.strip())  # without repetitions
    if not names:
        raise DataError(f"{path} names no images: it is to have one file name a line")
    return names
