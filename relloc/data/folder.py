"""`data=folder` and every data set that lies on disk as folders of images.

Two layouts are understood. ROOT/train/CLASS/* and ROOT/val/CLASS/* with the same classes on both
sides is a labeled data set (ImageNet, Imagenette, Places as everyone has them). Any other folder,
or several, is unlabeled: every image below it, a share of them held out by the hash of its name.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from relloc.data.image_set import Splits, hash_lines, warn_of_other_counts
from relloc.data.images import SUFFIXES, read_rgb
from relloc.errors import DataError

_SIZES_ASKED = 1000
_NAMED = 5  # of class folders that are empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderImages:
    """An `ImageSet` of files, each named by its path."""

    name: str
    split: str
    paths: Sequence[str]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return read_rgb(Path(self.paths[index]))

    def source(self, index: int) -> str:
        return self.paths[index]

    def digest(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        """Of names below the folder they share, and sizes of some files: the same set wherever it lies.

        Sizes tell copies of another resolution apart. To ask for all takes an hour on some file servers.
        """
        paths = [os.path.abspath(path) for path in self.paths]
        common = os.path.commonpath({os.path.dirname(path) for path in paths})
        asked = paths[:: max(1, len(paths) // _SIZES_ASKED)]
        names = (os.path.relpath(path, common) for path in paths)
        return hash_lines([*self.classes, *names, *map(_size, asked), *self._told_by_list()])

    def _told_by_list(self) -> Iterable[str]:
        """What the files do not say themselves."""
        return ()


def _size(path: str) -> str:
    try:
        return str(os.path.getsize(path))
    except (OSError, ValueError):  # ValueError: a NUL in a name that a list gave. Told when it is read
        return "none"


def _images_below(folder: Path) -> Iterator[str]:
    entered: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:  # a link led here again: no image is taken twice
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.path.join(parent, file)


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in os.scandir(folder) if _is_class(entry)))


def _require(root: str | None, setting: str, holding: str = "") -> Path:
    with_what = f", to a folder with {holding}" if holding else ""
    if not root:
        raise DataError(
            f"{setting} is not set: give {setting}=FOLDER, or set the environment variable RELLOC_DATA{with_what}"
        )
    if not Path(root).is_dir():
        raise DataError(f"{setting}={root} is not a folder: give the folder that holds {holding or 'the images'}")
    return Path(root)


def _labeled(name: str, folder: Path, classes: tuple[str, ...]) -> FolderImages:
    paths, labels, empty = [], [], []
    for label, class_name in enumerate(classes):
        found = list(_images_below(folder / class_name))
        paths += found
        labels += [label] * len(found)
        empty += [] if found else [class_name]
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    if empty:
        named = ", ".join(empty[:_NAMED]) + (", …" if len(empty) > _NAMED else "")
        raise DataError(
            f"{folder}: {len(empty)} of {len(classes)} class folders hold no images ({named}): unpack or copy them "
            "again; a class that is to be left out has no folder in either split"
        )
    return FolderImages(name=name, split=folder.name, paths=paths, labels=labels, classes=classes)


def class_folders(
    *,
    name: str,
    root: str | None,
    train: str,
    val: str,
    holding: str = "",
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """ROOT/`train`/CLASS/* and ROOT/`val`/CLASS/*; the label is the place of CLASS in sorted order.

    `holding` says what belongs there, and where to get it, for who has not got it.
    `published_images` gives the official counts: another count is a warning, since its results
    are not those of the published data set.

    Raises:
        DataError: the root or a split is missing, a split or a class is empty, or the two splits have other classes.
    """
    base = _require(root, "data.root", holding)
    for split in (train, val):
        if not _class_folders(base / split):
            raise DataError(
                f"{base / split} has no class folders: {name} needs {base}/{train}/CLASS/* and {base}/{val}/CLASS/*"
                + (f"; data.root is to hold {holding}" if holding else "")
            )
    classes, other = _class_folders(base / train), _class_folders(base / val)
    if classes != other:
        odd = sorted(set(classes) ^ set(other))
        raise DataError(f"{base}: {train} and {val} differ in {len(odd)} classes, such as {odd[0]}")
    splits = Splits(train=_labeled(name, base / train, classes), held_out=_labeled(name, base / val, classes))
    warn_of_other_counts(splits, published_images)
    return splits


def _hashed_share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _unlabeled(name: str, roots: Sequence[Path], held_out_share: float) -> Splits:
    for one, other in itertools.permutations(roots, 2):
        if other.resolve().is_relative_to(one.resolve()):
            raise DataError(f"data.root: {other} lies in {one}, so that its images would be taken twice; name one")
    parts: dict[bool, list[str]] = {True: [], False: []}
    for root in roots:
        for path in _images_below(root):
            held_out = _hashed_share(os.path.relpath(path, root)) < held_out_share
            parts[held_out].append(path)
    if not parts[False] or not parts[True]:
        where = ", ".join(map(str, roots))
        raise DataError(
            f"{where}: {len(parts[False])} images to train on and {len(parts[True])} held out "
            f"({', '.join(SUFFIXES)}); both need some: check data.root and data.source.held_out_share"
        )
    return Splits(
        train=FolderImages(name=name, split="train", paths=parts[False]),
        held_out=FolderImages(name=name, split="held_out", paths=parts[True]),
    )


def folder(*, name: str, root: str | Sequence[str] | None, held_out_share: float) -> Splits:
    """A labeled data set if `root` has train/ and val/ with class folders, else unlabeled images.

    Several roots are pooled, unlabeled. Whether an image is held out depends on its path below
    its root alone, so that adding images moves none.

    Raises:
        DataError: a root that does not exist or holds too few images.
    """
    if not 0 < held_out_share < 1:
        raise DataError(f"data.source.held_out_share is {held_out_share}, not between 0 and 1")
    roots = [_require(one, "data.root") for one in ([root] if isinstance(root, str) or root is None else root)]
    if len(roots) == 1 and _class_folders(roots[0] / "train") and _class_folders(roots[0] / "val"):
        return class_folders(name=name, root=str(roots[0]), train="train", val="val")
    return _unlabeled(name, roots, held_out_share)
