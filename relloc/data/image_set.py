"""What a set of images is to everything else: numbered, readable, perhaps labeled."""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

Role = Literal["train", "held_out"]
ROLES: tuple[Role, ...] = ("train", "held_out")


@runtime_checkable
class ImageSet(Protocol):
    """Images 0..len-1 of one split.

    `labels` is None for unlabeled images, else one class number an image. `source(index)` names
    what the image was taken from (a path, a photograph): images of one source are not independent.
    """

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def labels(self) -> Sequence[int] | None: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The image in RGB. Raises `UnreadableImage`."""
        ...

    def source(self, index: int) -> str: ...

    def digest(self) -> str:
        """Hash of what the set consists of: names, labels and what the images hold; the same wherever it lies."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Images to train on, and others held out; `remarks` say what was made of the folders they lie in."""

    train: ImageSet
    held_out: ImageSet
    remarks: tuple[str, ...] = ()

    def of(self, role: Role) -> ImageSet:
        """The split that plays this role."""
        return self.train if role == "train" else self.held_out

    @property
    def labeled(self) -> bool:
        """Whether both splits have labels, of the same classes."""
        both = self.train.labels is not None and self.held_out.labels is not None
        return both and self.train.classes == self.held_out.classes


def hash_lines(lines: Iterable[str]) -> str:
    """Short hash of lines of text, order included."""
    hasher = hashlib.sha256()
    for line in lines:
        hasher.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return hasher.hexdigest()[:16]


def warn_of_other_counts(splits: Splits, published_images: Mapping[str, int] | None) -> None:
    """Warn where a split has not as many images as the published one of its name: its results are others."""
    for images in (splits.train, splits.held_out):
        published = (published_images or {}).get(images.split, len(images))
        if len(images) != published:
            warnings.warn(
                f"{images.name} {images.split} has {len(images)} images, the published set {published}",
                stacklevel=3,
            )
