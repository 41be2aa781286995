"""The interface of a data set: `ImageSet` (the images of one split) and `Splits` (two of them).

Everything that reads images (pretraining, evaluations, studies, packing) knows them only through
this interface. Files in folders, photographs cut into tiles and packed shards implement it.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from relloc import ranks
from relloc.data.images import Undecoded

Role = Literal["train", "held_out"]
ROLES: tuple[Role, ...] = ("train", "held_out")


@runtime_checkable
class ImageSet(Protocol):
    """The images of one split of a data set, numbered from 0 to len - 1.

    Example:
        >>> images = photos(tiles=[0.25], stride=0.5).train
        >>> images.read(0).size, images.labels[0], images.source(0)
    """

    @property
    def name(self) -> str:
        """Name of the data set, such as "imagenette"."""
        ...

    @property
    def split(self) -> str:
        """Name of the split, such as "train" or "val"."""
        ...

    @property
    def labels(self) -> Sequence[int] | None:
        """Class number of each image, an index into `classes`; None where images have no labels."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Returns the image in RGB. Raises `UnreadableImage` where its file can't be read."""
        ...

    def source(self, index: int) -> str:
        """Returns the name of what the image was taken from: its path, or its photograph.

        Images of one source are not independent samples; confidence intervals are clustered by it.
        """
        ...

    def digest(self) -> str:
        """Returns a hash of names, labels and image contents.

        It identifies the data set in results: copies in other places have the same hash.
        """
        ...


@runtime_checkable
class UndecodedImages(Protocol):
    """What an `ImageSet` has beside if its images can be decoded elsewhere, such as on a GPU."""

    def read_undecoded(self, index: int) -> Undecoded:
        """Returns a JPEG undecoded, or pixels of all others. Raises what `ImageSet.read` raises."""
        ...


def read_undecoded(images: ImageSet, index: int) -> Undecoded:
    """Returns an image of a set undecoded, where the set can do so, or its pixels.

    Raises:
        UnreadableImage: the file can't be read.
    """
    if isinstance(images, UndecodedImages):
        return images.read_undecoded(index)
    return np.asarray(images.read(index))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The training images and the held-out images of a data set.

    `remarks` are sentences for the user about how the folders on disk were understood.
    `published_images` are the numbers of images of the published splits, by their names; it is
    empty where the splits were chosen otherwise. `is_unnamed` says that the data set was given no
    name, so that it is called after its folder (`relloc.data.unnamed`).
    """

    train: ImageSet
    held_out: ImageSet
    remarks: tuple[str, ...] = ()
    published_images: Mapping[str, int] = dataclasses.field(default_factory=dict)
    is_unnamed: bool = False

    def of(self, role: Role) -> ImageSet:
        """Returns the training split or the held-out split."""
        if role == "train":
            return self.train
        return self.held_out

    @property
    def labeled(self) -> bool:
        """True if both splits have labels and the same classes."""
        if self.train.labels is None or self.held_out.labels is None:
            return False
        # Equal numbers would otherwise mean different classes.
        return self.train.classes == self.held_out.classes


def hash_lines(lines: Iterable[str]) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of lines of text; their order counts."""
    hasher = hashlib.sha256()
    for line in lines:
        # File names on Linux need not be valid Unicode; surrogateescape keeps their bytes.
        content = line.encode("utf-8", "surrogateescape")
        # The end of each line counts, so that "a", "bc" and "ab", "c" differ.
        hasher.update(content + b"\n")
    # 64 bits tell data sets apart, and fit into a name.
    return hasher.hexdigest()[:16]


def warn_of_other_counts(splits: Splits) -> None:
    """Warns if a split has another number of images than the published split of the same name.

    Results on such a split can't be compared with published ones. Of several processes, which all
    list the same images, the first one warns.
    """
    if ranks.rank() > 0:
        return
    for images in (splits.train, splits.held_out):
        # Of a split that is not among the published ones nothing is known.
        published = splits.published_images.get(images.split, len(images))
        if len(images) != published:
            warnings.warn(
                f"{images.name} {images.split} has {len(images)} images, "
                f"the published set {published}",
                stacklevel=3,
            )
