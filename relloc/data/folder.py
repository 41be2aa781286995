"""Data sets that are folders of image files: `data=folder`, ImageNet, Imagenette and others.

Two layouts are understood:

- Labeled: ROOT/train/CLASS/* and ROOT/val/CLASS/*, with the same classes in both splits.
- Unlabeled: every image in and below one or more folders. A share of them is held out, chosen by
  the hash of each name. Folders that look like the splits of a data set are refused, because
  pooling them would train on test images (see `relloc.data.split_folders`).
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
from relloc.data.images import SUFFIXES, Undecoded, read_rgb, read_undecoded
from relloc.data.listing import (
    PassedOver,
    class_folders_of,
    describe_passed_over,
    first_names,
    images_below,
    outside_of_classes,
)
from relloc.data.manifest import is_packed
from relloc.data.processes import Progress, without_progress
from relloc.data.split_folders import FolderTree, images_by_folder, refuse_pooled_splits
from relloc.errors import DataError, MissingData
from relloc.terminal import escaped, quantity

# How many of the empty class folders an error message names.
_MOST_EMPTY_NAMED = 5
TRAIN = "train"
VAL = "val"
# Usual names of a folder with all images of a split, whose labels lie elsewhere (as for YOLO) or
# do not exist. Such a folder is no class.
_NOT_CLASS_NAMES = {
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
    """The images of one split as files on disk: an `ImageSet` whose sources are paths."""

    name: str
    split: str
    paths: Sequence[str]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    # True if labels come from a list instead of folder names: then the digest has to include them.
    labels_are_listed: bool = False
    # The digest once it is computed. A list, since fields of a frozen dataclass can't be assigned.
    _made: list[str] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return read_rgb(Path(self.paths[index]))

    def read_undecoded(self, index: int) -> Undecoded:
        """Returns the JPEG of a file undecoded, or else pixels (see `images.as_jpeg`)."""
        return read_undecoded(Path(self.paths[index]))

    def source(self, index: int) -> str:
        return self.paths[index]

    def digest(self, progress: Progress = without_progress) -> str:
        """Returns a hash of file names, labels and file contents, computed on the first call.

        `relloc.data.contents` describes how much of each file counts. `progress` shows the files
        that are read.
        """
        # Hashing reads many files: it is done once, and only where the digest is needed.
        if not self._made:
            names = self.names()
            other_content = self.other_content(progress)
            digest = hash_files(self.paths, names, other_content, progress)
            self._made.append(digest)
        return self._made[0]

    def other_content(self, progress: Progress) -> Iterator[str]:
        """Yields what the digest covers beside the files: classes, labels, and annotations."""
        del progress
        yield str(len(self.classes))
        yield from self.classes
        if self.labels_are_listed:
            yield from map(str, self.labels or ())

    def names(self) -> Iterator[str]:
        """Yields each file's path below the folder that all files share.

        These names are the same wherever the data set lies on disk.
        """
        return names_below_common_folder(self.paths)


def missing_paths(paths: Sequence[str]) -> list[str]:
    """Returns the paths at which there is nothing."""
    # Listing folders is faster than asking for each file, above all on a file server.
    existing: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in existing:
            existing[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        # Some file systems find a file by a name that they list in other letters.
        if name not in existing[folder] and not os.path.exists(path):
            missing.append(path)
    return missing


def names_below_common_folder(paths: Sequence[str]) -> Iterator[str]:
    """Yields each path below the folder that all paths share."""
    # Millions of files lie in a few thousand folders: only these are made absolute.
    folders = {os.path.dirname(path) for path in paths}
    absolute = {folder: os.path.abspath(folder) for folder in folders}
    common = os.path.commonpath(absolute.values())
    # The common folder may be / itself, the only one that ends with a slash.
    length = len(common.rstrip("/")) + 1
    for path in paths:
        folder, _, name = path.rpartition("/")
        absolute_path = f"{absolute[folder]}/{name}"
        yield absolute_path[length:]


def require_root(root: str | Sequence[str] | None, holding: str) -> Path:
    """Returns the folder that the setting data.root names; `holding` says what it should hold.

    Raises:
        MissingData: data.root is not set.
        DataError: data.root is no folder, or is a folder that relloc.prepare packed.
    """
    if not root:
        raise MissingData(
            "data.root is not set: give data.root=FOLDER, or set the environment variable "
            f"RELLOC_DATA, to a folder with {holding}",
            holding=holding,
        )
    if not isinstance(root, str) or not os.path.isdir(root):
        raise DataError(f"data.root={root} is not a folder: give the folder that holds {holding}")
    if is_packed(Path(root)):
        raise DataError(
            f"data.root={root} holds images that relloc.prepare packed: give data.shards={root} "
            "instead"
        )
    return Path(root)


def require_some_of(base: Path, parts: Sequence[str], holding: str) -> None:
    """Checks that a folder has at least one of the files and folders that make up a data set.

    `holding` says what the folder should hold. That something of it is there tells a damaged data
    set from the folder of another one.

    Raises:
        MissingData: the folder has none of `parts`.
    """
    if not any((base / part).exists() for part in parts):
        message = f"{base / parts[0]} is missing: data.root is to hold {holding}"
        raise MissingData(message, holding=holding)


def _labeled(
    name: str,
    folder: Path,
    classes: tuple[str, ...],
    passed_over: PassedOver,
) -> FolderImages:
    """Returns one split from its class folders; what is skipped is counted in `passed_over`."""
    paths = []
    labels = []
    empty = []
    # Images beside the class folders have no label.
    outside_of_classes(folder, passed_over)
    for label, class_name in enumerate(classes):
        class_folder = folder / class_name
        in_class = list(images_below(class_folder, passed_over))
        paths += in_class
        labels += [label] * len(in_class)
        if not in_class:
            empty.append(class_name)
    # An empty class is most often an archive that was unpacked in part.
    if empty:
        problem = (
            f"{folder}: {len(empty)} of {len(classes)} class folders hold no images "
            f"({first_names(empty, _MOST_EMPTY_NAMED)}): unpack or copy them again, or remove a "
            "class that you want to leave out from both splits"
        )
        if not paths:
            problem = f"{folder} holds no images ({', '.join(SUFFIXES)})"
        sentences = (problem, describe_passed_over(passed_over))
        raise DataError(". ".join(filter(None, sentences)))
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
    """Returns a labeled data set from the files ROOT/`train`/CLASS/* and ROOT/`val`/CLASS/*.

    The label of an image is the index of its CLASS in sorted order. `holding` describes for error
    messages what `root` should hold and where to get it. `published_images` gives the official
    number of images by split; a differing number is a warning.

    Raises:
        MissingData: no root is given, or it has neither of the splits.
        DataError: the root or a split is missing, a split or a class is empty, or the classes of
            the two splits differ.

    Example:
        >>> splits = class_folders(name="in1k", root="/data/imagenet", train="train", val="val")
    """
    base = require_root(root, holding)
    require_some_of(base, [train, val], holding)
    # The names of the folders of one level are read, which takes no time even for ImageNet.
    train_folder = base / train
    val_folder = base / val
    classes = class_folders_of(train_folder)
    val_classes = class_folders_of(val_folder)

    # Each split needs class folders, and both the same, or labels would not mean the same.
    if not classes or not val_classes:
        without_classes = val_folder if classes else train_folder
        raise DataError(
            f"{without_classes} has no class folders: {name} needs {base}/{train}/CLASS/* and "
            f"{base}/{val}/CLASS/*; data.root is to hold {holding}"
        )
    # Labels are numbers of classes in order: one more class would shift them.
    in_one_split = set(classes) ^ set(val_classes)
    if in_one_split:
        raise DataError(
            f"{base}: {train} and {val} differ in "
            f"{quantity(len(in_one_split), 'class', 'classes')}, such as "
            f"{escaped(min(in_one_split))}: both splits need the same class folders"
        )
    # A single folder called "images" holds unlabeled images, and would become a class otherwise.
    if len(classes) == 1 and classes[0].lower() in _NOT_CLASS_NAMES:
        raise DataError(
            f"{train_folder} and {val_folder} hold one folder each, {escaped(classes[0])}, whose "
            f"name is not that of a class: its images have no labels. data.root={train_folder} "
            f"takes {train} alone, without labels"
        )

    passed_over = PassedOver()
    train_images = _labeled(name, train_folder, classes, passed_over)
    val_images = _labeled(name, val_folder, classes, passed_over)

    # Remarks for the user: what was found, and what was not used.
    n_classes = quantity(len(classes), "class", "classes")
    counts = []
    for images in (train_images, val_images):
        n_images = quantity(len(images), "image")
        counts.append(f"{images.split}: {n_images} of {n_classes}")
    remarks = ["; ".join(counts)]
    unused = [folder for folder in class_folders_of(base) if folder not in (train, val)]
    if unused:
        remarks.append(f"not used: the folders {first_names(unused)}")
    # An empty text if nothing was passed over
    remarks.append(describe_passed_over(passed_over))
    splits = Splits(
        train=train_images,
        held_out=val_images,
        remarks=tuple(filter(None, remarks)),
        published_images=published_images or {},
    )
    warn_of_other_counts(splits)
    return splits


def _unlabeled(
    name: str,
    roots: Sequence[Path],
    held_out_share: float,
    *,
    pool_splits: bool,
) -> Splits:
    """Returns all images in and below `roots` without labels, a share of them held out."""
    # No image may be counted twice, least of all in both splits.
    for outer, inner in itertools.permutations(roots, 2):
        # Resolved, since one of them may be a link into the other.
        is_inside = inner.resolve().is_relative_to(outer.resolve())
        if is_inside:
            raise DataError(
                f"data.root: {inner} lies in {outer}, so that its images would be taken twice: "
                "name one of them"
            )

    # Each image goes to one split by the hash of its name, which is stable when others are added.
    paths_of: dict[Role, list[str]] = {"train": [], "held_out": []}
    sentences = []
    for root in roots:
        passed_over = PassedOver()
        paths = list(images_below(root, passed_over))
        tree = images_by_folder(root, paths)
        if not pool_splits:
            refuse_pooled_splits(tree, is_only_root=len(roots) == 1)
        sentences.append(_unlabeled_remark(tree))
        sentences.append(describe_passed_over(passed_over))
        for path in paths:
            relative_path = os.path.relpath(path, root)
            is_held_out = _hash_fraction(relative_path) < held_out_share
            role: Role = "held_out" if is_held_out else "train"
            paths_of[role].append(path)

    remarks = tuple(filter(None, sentences))
    train_paths = paths_of["train"]
    held_out_paths = paths_of["held_out"]
    if not train_paths and not held_out_paths:
        raise DataError(
            f"there is no image to train on: give a folder of images as data.root. Read are files "
            f"called {', '.join(SUFFIXES)}. Found was {'. '.join(remarks)}"
        )
    if not train_paths or not held_out_paths:
        raise DataError(
            f"{', '.join(map(str, roots))}: {quantity(len(train_paths), 'image')} to train on and "
            f"{len(held_out_paths)} held out; both need some. Few images need another "
            f"data.source.held_out_share than {held_out_share:g}, such as 0.4. "
            f"Found was {'. '.join(remarks)}"
        )
    return Splits(
        train=FolderImages(name=name, split="train", paths=train_paths),
        held_out=FolderImages(name=name, split="held_out", paths=held_out_paths),
        remarks=remarks,
    )


def _hash_fraction(name: str) -> float:
    """Returns a number in [0, 1) from the hash of a name, as good as uniformly distributed.

    It depends on this name alone, so that adding images moves none to the other split.
    """
    # Names of files may have bytes that are no UTF-8.
    encoded = name.encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(encoded).digest()
    # The first 64 bits, as a whole number, in parts of 2^64
    number = int.from_bytes(digest[:8], "big")
    return number / 2**64


def _unlabeled_remark(tree: FolderTree) -> str:
    """Returns a sentence on how many images a root has, and in which of its folders."""
    remark = f"{tree.path}: {quantity(tree.images, 'image')} without labels"
    counts = [f"{name} {inner.images}" for name, inner in sorted(tree.folders.items())]
    if counts:
        remark += f", in {quantity(len(counts), 'folder')} ({first_names(counts)})"
    empty = [name for name in class_folders_of(tree.path) if name not in tree.folders]
    if empty:
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
    """Returns the data set in one or more folders, labeled if it lies in class folders.

    A single `root` with class folders in its folders `train` and `val` is a labeled data set. Any
    other root, or several, is a set of unlabeled images, of which `held_out_share` (between 0 and
    1) is held out. Whether an image is held out depends only on its path below its root, so that
    adding images moves none. With `pool_splits` all images of a root become one unlabeled set,
    even if its folders are called train and test.

    Raises:
        DataError: a root does not exist, holds too few images, or has folders that look like
            several splits while `pool_splits` is off.

    Example:
        >>> splits = folder(name="mine", root="/data/photographs", held_out_share=0.1)
    """
    if not 0 < held_out_share < 1:
        raise DataError(
            f"data.source.held_out_share is {held_out_share}: give a number between 0 and 1"
        )
    given_roots = root if isinstance(root, (list, tuple)) else [root]
    roots = [require_root(each, "the images") for each in given_roots]

    # Named splits ask for a labeled set, pooling and several roots for an unlabeled one.
    splits_are_named = (train, val) != (TRAIN, VAL)
    if splits_are_named and (pool_splits or len(roots) > 1):
        raise DataError(
            f"data.source.train={train} and data.source.val={val} name the splits of one labeled "
            "data set: leave them out where data.source.pool_splits=true or several roots make "
            "one set without labels"
        )
    # The same folder for both would pass every other check.
    if train == val:
        raise DataError(
            f"data.source.train and data.source.val are both {train}: testing on training images "
            "means nothing, name two splits"
        )

    first_root = roots[0]
    has_class_folders = (
        len(roots) == 1
        and class_folders_of(first_root / train)
        and class_folders_of(first_root / val)
    )
    # Named splits without class folders are refused in there.
    is_labeled = splits_are_named or has_class_folders
    if is_labeled and not pool_splits:
        return class_folders(name=name, root=str(first_root), train=train, val=val)
    return _unlabeled(name, roots, held_out_share, pool_splits=pool_splits)
