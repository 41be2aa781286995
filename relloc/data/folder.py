"""`data=folder` and every data set that lies on disk as folders of images.

Two layouts are understood. ROOT/train/CLASS/* and ROOT/val/CLASS/* with the same classes on both
sides is a labeled data set (ImageNet, Imagenette, Places as everyone has them). Any other folder,
or several, is unlabeled: every image below it, a share of them held out by the hash of its name;
but not where that would train on a split that was made for testing (`relloc.data.split_folders`).
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from relloc.data.contents import hash_files
from relloc.data.image_set import Role, Splits, warn_of_other_counts
from relloc.data.images import SUFFIXES, read_rgb
from relloc.data.listing import (
    PassedOver,
    class_folders_of,
    first_names,
    images_below,
    outside_of_classes,
    told_passed_over,
)
from relloc.data.manifest import is_packed
from relloc.data.processes import Progress, without_progress
from relloc.data.split_folders import Branch, images_by_folder, refuse_pooled_splits
from relloc.errors import DataError
from relloc.terminal import escaped

_NAMED = 5  # of class folders that are empty
TRAIN, VAL = "train", "val"
# What a folder of all images of a split is called where labels lie beside it (YOLO) or nowhere
_NO_CLASSES = {
    "images",
    "image",
    "imgs",
    "img",
    "jpegimages",
    "jpegs",
    "pictures",
    "photos",
    "frames",
    "data",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderImages:
    """An `ImageSet` of files, each named by its path."""

    name: str
    split: str
    paths: Sequence[str]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    labels_are_listed: bool = False  # so that the files do not say them, and the digest has to
    _made: list[str] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )  # the digest

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return read_rgb(Path(self.paths[index]))

    def source(self, index: int) -> str:
        return self.paths[index]

    def digest(self, progress: Progress = without_progress) -> str:
        """Hash of names, labels and what the files hold, as far as `relloc.data.contents` says. Made once, then kept.

        `progress` is told of the files that are read.
        """
        if not self._made:
            labels = map(str, self.labels or ()) if self.labels_are_listed else ()
            told = [str(len(self.classes)), *self.classes, *labels]
            self._made.append(hash_files(self.paths, self.names(), told, progress))
        return self._made[0]

    def names(self) -> Iterator[str]:
        """Names below the folder that all files share: the same wherever the set lies."""
        absolute = {
            folder: os.path.abspath(folder)
            for folder in {os.path.dirname(path) for path in self.paths}
        }
        common = os.path.commonpath(absolute.values()).rstrip("/")
        for path in self.paths:
            folder, _, name = path.rpartition("/")
            yield f"{absolute[folder]}/{name}"[len(common) + 1 :]


def require_root(root: str | Sequence[str] | None, holding: str) -> Path:
    """The folder that data.root names. Raises `DataError`, which says what is to be in it, where it is none."""
    if not root:
        raise DataError(
            "data.root is not set: give data.root=FOLDER, or set the environment variable RELLOC_DATA, to a folder "
            f"with {holding}"
        )
    if not isinstance(root, str) or not os.path.isdir(root):
        raise DataError(f"data.root={root} is not a folder: give the folder that holds {holding}")
    if is_packed(Path(root)):
        raise DataError(
            f"data.root={root} holds images that relloc.prepare packed: give data.shards={root} in its place"
        )
    return Path(root)


def _labeled(
    name: str, folder: Path, classes: tuple[str, ...], passed_over: PassedOver
) -> FolderImages:
    """One split, with its class folders. `passed_over` is added to."""
    paths, labels, empty = [], [], []
    outside_of_classes(folder, passed_over)
    for label, class_name in enumerate(classes):
        found = list(images_below(folder / class_name, passed_over))
        paths += found
        labels += [label] * len(found)
        if not found:
            empty.append(class_name)
    if empty:
        problem = (
            f"{folder}: {len(empty)} of {len(classes)} class folders hold no images ({first_names(empty, _NAMED)}): "
            "unpack or copy them again; a class that is to be left out has no folder in either split"
        )
        if not paths:
            problem = f"{folder} holds no images ({', '.join(SUFFIXES)})"
        raise DataError(". ".join(filter(None, (problem, told_passed_over(passed_over)))))
    return FolderImages(name=name, split=folder.name, paths=paths, labels=labels, classes=classes)


def class_folders(
    *,
    name: str,
    root: str | None,
    train: str,
    val: str,
    holding: str = "images in class folders",
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """ROOT/`train`/CLASS/* and ROOT/`val`/CLASS/*; the label is the place of CLASS in sorted order.

    `holding` says what belongs there, and where to get it, for who has not got it.
    `published_images` gives the official counts: another count is a warning, since its results
    are not those of the published data set.

    Raises:
        DataError: the root or a split is missing, a split or a class is empty, or the two splits have other classes.
    """
    base = require_root(root, holding)
    classes, other = (class_folders_of(base / split) for split in (train, val))
    if not classes or not other:
        raise DataError(
            f"{base / (val if classes else train)} has no class folders: {name} needs {base}/{train}/CLASS/* and "
            f"{base}/{val}/CLASS/*; data.root is to hold {holding}"
        )
    if odd := set(classes) ^ set(other):
        raise DataError(
            f"{base}: {train} and {val} differ in {len(odd)} classes, such as {escaped(min(odd))}"
        )
    if len(classes) == 1 and classes[0].lower() in _NO_CLASSES:
        raise DataError(
            f"{base / train} and {base / val} hold one folder each, {escaped(classes[0])}, which is not called as a "
            f"class is: its images have no labels. data.root={base / train} takes {train} alone, without labels"
        )
    passed_over = PassedOver()
    parts = [_labeled(name, base / split, classes, passed_over) for split in (train, val)]
    remarks = [
        "; ".join(f"{part.split}: {len(part)} images of {len(classes)} classes" for part in parts)
    ]
    if unused := [each for each in class_folders_of(base) if each not in (train, val)]:
        remarks.append(f"not used: the folders {first_names(unused)}")
    remarks.append(told_passed_over(passed_over))
    splits = Splits(train=parts[0], held_out=parts[1], remarks=tuple(filter(None, remarks)))
    warn_of_other_counts(splits, published_images)
    return splits


def _unlabeled(
    name: str, roots: Sequence[Path], held_out_share: float, *, pool_splits: bool
) -> Splits:
    for one, other in itertools.permutations(roots, 2):
        if other.resolve().is_relative_to(one.resolve()):
            raise DataError(
                f"data.root: {other} lies in {one}, so that its images would be taken twice; name one"
            )
    parts: dict[Role, list[str]] = {"train": [], "held_out": []}
    remarks = []
    for root in roots:
        passed_over = PassedOver()
        paths = list(images_below(root, passed_over))
        branch = images_by_folder(root, paths)
        if not pool_splits:
            refuse_pooled_splits(branch, alone=len(roots) == 1)
        remarks += [_unlabeled_remark(branch), told_passed_over(passed_over)]
        for path in paths:
            hashed = hashlib.sha256(
                os.path.relpath(path, root).encode("utf-8", "surrogateescape")
            ).digest()
            is_held_out = int.from_bytes(hashed[:8], "big") / 2**64 < held_out_share
            parts["held_out" if is_held_out else "train"].append(path)
    remarks = tuple(filter(None, remarks))
    if not all(parts.values()):
        raise DataError(
            f"{', '.join(map(str, roots))}: {len(parts['train'])} images to train on and {len(parts['held_out'])} held "
            f"out ({', '.join(SUFFIXES)}); both need some: check data.root and data.source.held_out_share. Found was "
            + ". ".join(remarks)
        )
    images = {
        role: FolderImages(name=name, split=role, paths=paths) for role, paths in parts.items()
    }
    return Splits(train=images["train"], held_out=images["held_out"], remarks=remarks)


def _unlabeled_remark(branch: Branch) -> str:
    """How many images a root has, in which of its folders."""
    remark = f"{branch.path}: {branch.images} images without labels"
    if held := [f"{name} {part.images}" for name, part in sorted(branch.folders.items())]:
        remark += f", in {len(held)} folders ({first_names(held)})"
    if empty := [name for name in class_folders_of(branch.path) if name not in branch.folders]:
        remark += f"; none in {first_names(empty)}"
    return remark


def folder(
    *,
    name: str,
    root: str | Sequence[str] | None,
    held_out_share: float,
    train: str = TRAIN,
    val: str = VAL,
    pool_splits: bool = False,
) -> Splits:
    """A labeled data set if `root` has `train` and `val` with class folders, else unlabeled images.

    Several roots are pooled, unlabeled. Whether an image is held out depends on its path below
    its root alone, so that adding images moves none. `pool_splits` takes all images of a root as
    one unlabeled set, also where its folders are called train and test.

    Raises:
        DataError: a root that does not exist, holds too few images, or holds folders of several splits
            that would be pooled although `pool_splits` is off.
    """
    if not 0 < held_out_share < 1:
        raise DataError(f"data.source.held_out_share is {held_out_share}, not between 0 and 1")
    roots = [
        require_root(one, "the images")
        for one in (root if isinstance(root, (list, tuple)) else [root])
    ]
    are_named = (train, val) != (TRAIN, VAL)
    if are_named and (pool_splits or len(roots) > 1):
        raise DataError(
            f"data.source.train={train} and data.source.val={val} name the splits of one labeled data set: leave them "
            "out where data.source.pool_splits=true or several roots make one set without labels"
        )
    if train == val:
        raise DataError(
            f"data.source.train and data.source.val are both {train}: images trained on test nothing"
        )
    labeled = (
        len(roots) == 1 and class_folders_of(roots[0] / train) and class_folders_of(roots[0] / val)
    )
    if not pool_splits and (are_named or labeled):
        return class_folders(name=name, root=str(roots[0]), train=train, val=val)
    return _unlabeled(name, roots, held_out_share, pool_splits=pool_splits)
