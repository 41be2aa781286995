"""Data sets whose images are named in list files: PASCAL VOC, Places205 and iNaturalist 2018.

Settings and traps are described in docs/protocols.md 6. Building a data set reads only the lists:
looking for 2.4 million files would take longer than reading their names. An image that is listed
but missing counts as unreadable when it is read.
"""

import dataclasses
import functools
import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from relloc.data.folder import FolderImages, require_root, require_some_of
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.errors import DataError, MissingData, data_errors
from relloc.files import read_text

_VOC_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
VOC_CLASSES = tuple(_VOC_NAMES.split())
# The year of VOC that benchmarks use, and that the setting published_images gives counts of.
COUNTED_YEAR = 2007
# Labels may have so many digits: there is a class for each number up to the largest label, so that
# a damaged list could ask for much memory.
_LABEL_DIGITS = 6
# Presence of a class in an image, by the numbers in the class lists of PASCAL VOC.
THERE = 1
DIFFICULT = 0
NOT_THERE = -1

# For error messages: what data.root is to hold, and where to get it.
_VOC = (
    "the PASCAL VOC{year} development kit (images and lists, of trainval and of test), "
    "from the PASCAL VOC site"
)
_PLACES = "Places205 (images at 256 px, and the split lists), from the Places site of MIT"
_INATURALIST = "the iNaturalist 2018 competition's images and annotations, from its FGVC repository"
_UNPACK = "Unpack it again"


@runtime_checkable
class MultiLabeled(Protocol):
    """A set of images each of which may show several classes."""

    def presence(self) -> list[list[int]]:
        """Returns a number for each image and class: whether the image shows the class.

        1: it does. 0: it does, but is difficult to recognize. -1: it does not.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocImages(FolderImages):
    """The images of a PASCAL VOC list, which have no labels as each may show several classes."""

    devkit: Path
    listed: Sequence[str]

    def presence(self) -> list[list[int]]:
        """Returns 1, 0 (difficult) or -1 (not there) for each image and class, read once.

        Raises:
            DataError: a class list names other images than the split, or an annotation is missing
                or damaged.
        """
        return self._presence

    @functools.cached_property
    def _presence(self) -> list[list[int]]:
        folder = self.devkit / "ImageSets" / "Main"
        class_lists = []
        for name in VOC_CLASSES:
            class_lists.append(folder / f"{name}_{self.split}.txt")
        # The official splits have a list for each class. A split that users made themselves may
        # have none: then the annotations of the images say the same.
        if not any(map(Path.exists, class_lists)):
            annotations = self.devkit / "Annotations"
            files = [annotations / f"{image}.xml" for image in self.listed]
            return [_annotated_presence(file) for file in files]
        columns = [self._class_list(path) for path in class_lists]
        # From lists by class to lists by image
        rows = zip(*columns, strict=True)
        return [list(row) for row in rows]

    def _class_list(self, path: Path) -> list[int]:
        """Returns for each image whether it shows one class, from the list of that class."""
        # By name, as the list of a class may have another order than that of the split.
        presence = {}
        year = self.devkit.name.removeprefix("VOC")
        for number, line in numbered_lines(path, _VOC.format(year=year)):
            # The name of an image, one or two spaces, and a number
            image, *rest = line.split()
            if rest not in (["1"], ["0"], ["-1"]):
                raise DataError(
                    f"{path} line {number}: {line!r} is not an image and 1, 0 or -1. {_UNPACK}"
                )
            presence[image] = int(rest[0])
        in_one_list = set(self.listed) ^ set(presence)
        if in_one_list:
            raise DataError(
                f"{path} and {self.split}.txt beside it name different images, such as "
                f"{min(in_one_list)}: unpack both from the same archive again"
            )
        return [presence[image] for image in self.listed]


def _annotated_presence(path: Path) -> list[int]:
    """Returns the presence of each class in one image, from its annotation file."""
    if not path.exists():
        raise DataError(
            f"{path} is missing: without lists of classes it says what the image shows. {_UNPACK}"
        )
    with data_errors(f"{path} is not XML", OSError, ET.ParseError, advice=_UNPACK):
        root = ET.parse(path).getroot()
    # Classes that have no object in the annotation are not there.
    presence = dict.fromkeys(VOC_CLASSES, NOT_THERE)
    for annotated in root.findall("object"):
        name = annotated.findtext("name", "")
        if name not in presence:
            continue
        flag = annotated.findtext("difficult", "0")
        of_object = DIFFICULT if flag.strip() == "1" else THERE
        # A class is difficult only if all its objects are: one that is not outweighs others.
        presence[name] = max(presence[name], of_object)
    return list(presence.values())


def voc(
    *,
    name: str,
    root: str | None,
    year: int,
    train: str,
    held_out: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns PASCAL VOC of a year, with any two of its lists as splits.

    `train` and `held_out` are the names of lists in VOC<year>/ImageSets/Main, such as "trainval"
    and "test". `root` holds VOCdevkit, or is VOCdevkit or VOC<year> itself.

    Raises:
        DataError: a folder or list is missing or empty, or both lists name the same image.

    Example:
        >>> voc(name="voc", root="/data", year=2007, train="trainval", held_out="test")
    """
    devkit = voc_devkit(root, year)
    splits = []
    lists = []
    for split in (train, held_out):
        lists.append(_list_file(devkit, "Main", split))
        listed = voc_list(devkit, "Main", split)
        folder = devkit / "JPEGImages"
        images = VocImages(
            name=name,
            split=split,
            paths=[f"{folder}/{image}.jpg" for image in listed],
            classes=VOC_CLASSES,
            devkit=devkit,
            listed=listed,
        )
        splits.append(images)
    # Official numbers of images are those of one year.
    counts = published_images if year == COUNTED_YEAR else None
    return checked_splits(splits, lists, counts)


def voc_devkit(root: str | None, year: int, *, holding: str = "") -> Path:
    """Returns the folder VOC<year>: `root` holds VOCdevkit, or is VOCdevkit or VOC<year> itself.

    `holding` says for errors what `root` should hold, where that is more than the lists and images
    of the year.

    Raises:
        MissingData: `root` is not set, or holds nothing of that year.
        DataError: `root` is no folder, or holds no JPEGImages of that year.
    """
    holding = holding or _VOC.format(year=year)
    above = require_root(root, holding)
    below_devkit = above / "VOCdevkit" / f"VOC{year}"
    candidates = (below_devkit, above / f"VOC{year}", above)
    for folder in candidates:
        if (folder / "JPEGImages").is_dir():
            _refuse_other_year(folder, year, holding)
            return folder
    # The message names the place where the official archives put it.
    expected = below_devkit / "JPEGImages"
    message = f"{expected} is missing: data.root is to hold {holding}"
    # The folder of the year without images is not missing, but damaged.
    if any(folder.is_dir() for folder in candidates[:2]):
        raise DataError(message)
    raise MissingData(message, holding=holding)


def _refuse_other_year(folder: Path, year: int, holding: str) -> None:
    """Raises `MissingData` if the name of a folder says that it is VOC of another year."""
    is_named_by_year = re.fullmatch(r"VOC\d{4}", folder.name) is not None
    if is_named_by_year and folder.name != f"VOC{year}":
        raise MissingData(
            f"data.root={folder} is the folder of one year: give the folder above, which is to "
            f"hold VOC{year} besides: {holding}",
            holding=holding,
        )


def voc_list(devkit: Path, kind: str, split: str) -> list[str]:
    """Returns the names of images in a list of VOC<year>/ImageSets/`kind`, without suffix.

    Raises:
        DataError: the list is missing, empty or damaged.
    """
    year = devkit.name.removeprefix("VOC")
    holding = _VOC.format(year=year)
    path = _list_file(devkit, kind, split)
    names = []
    for _, line in numbered_lines(path, holding):
        # Lists of a class have a second column, which is not part of the name.
        name, *_ = line.split()
        names.append(name)
    return names


def _list_file(devkit: Path, kind: str, split: str) -> Path:
    """Returns the file of a list: `kind` is "Main" or, for segmentation, "Segmentation"."""
    folder = devkit / "ImageSets" / kind
    return folder / f"{split}.txt"


def places205(
    *,
    name: str,
    root: str | None,
    train_list: str,
    val_list: str,
    images: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns Places205 from its two lists, which have a line "path label" for each image.

    Paths in the lists are relative to the folder `images`. The lists and this folder are below
    `root`. A class has the name of the folder of its first training image.

    Raises:
        DataError: a list is missing or empty or has a line of another form, both lists name the
            same image, or their labels disagree.
    """
    base = require_root(root, _PLACES)
    require_some_of(base, [train_list, val_list, images], _PLACES)
    lists = [base / train_list, base / val_list]
    train = _labeled_lines(lists[0])
    val = _labeled_lines(lists[1])

    # Names of classes, for all numbers up to the largest training label.
    folder_of: dict[int, str] = {}
    for path, label in train:
        folder = Path(path).parent
        folder_of.setdefault(label, str(folder))
    # A number without images is its own name.
    n_classes = max(folder_of) + 1
    classes = tuple(folder_of.get(label, str(label)) for label in range(n_classes))
    # A label that is tested but never trained on can't be right.
    largest = max(label for _, label in val)
    if largest >= n_classes:
        raise DataError(
            f"{lists[1]}: label {largest} is in no line of {lists[0]}: take both lists from the "
            "same release of the data set"
        )

    # Images of one folder should have one label in both lists. This is checked only if each folder
    # has one label in the training list, and each label one folder: in other layouts folders do
    # not stand for classes.
    pairs = {(os.path.dirname(path), label) for path, label in train}
    label_of = dict(pairs)
    distinct_labels = set(label_of.values())
    n_labels = len(distinct_labels)
    folders_are_classes = len(pairs) == len(label_of) == n_labels
    if folders_are_classes:
        for path, label in val:
            folder = os.path.dirname(path)
            expected = label_of.get(folder, label)
            if label != expected:
                raise DataError(
                    f"{lists[1]}: {path} has label {label}, images of its folder {folder} in "
                    f"{lists[0]} have {expected}: take both lists from the same release of the "
                    "data set"
                )
    return _labeled_splits(
        name,
        base / images,
        classes,
        lists,
        [train, val],
        published_images,
    )


def _labeled_lines(path: Path) -> list[tuple[str, int]]:
    """Returns the path and label of each image in a list; a list names at least one."""
    labeled = []
    for number, line in numbered_lines(path, _PLACES):
        # Only the last space separates: paths may have spaces, too.
        image, _, label = line.rpartition(" ")
        is_number = label.isdecimal() and len(label) <= _LABEL_DIGITS
        if not image or not is_number:
            raise DataError(
                f"{path} line {number}: {line!r} is not a path, a space and a class number. "
                f"{_UNPACK}"
            )
        labeled.append((image.strip(), int(label)))
    return labeled


def inaturalist2018(
    *,
    name: str,
    root: str | None,
    train_annotations: str,
    val_annotations: str,
    images: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns iNaturalist 2018 from two annotation files in the format of COCO.

    The two files and the folder `images` are below `root`. File names in them are relative to
    `images`, whether or not they begin with its name, as the official ones do.

    Raises:
        DataError: a file is missing or of another format, both name the same image, or their
            categories disagree.
    """
    base = require_root(root, _INATURALIST)
    require_some_of(base, [train_annotations, val_annotations, images], _INATURALIST)
    lists = [base / train_annotations, base / val_annotations]
    train_content = _annotations(lists[0])
    val_content = _annotations(lists[1])

    # A category number must have the same name in both files.
    classes = _categories(train_content, lists[0])
    val_classes = _categories(val_content, lists[1])
    for category, train_name in classes.items():
        val_name = val_classes.get(category, train_name)
        if train_name != val_name:
            raise DataError(
                f"{lists[1]}: category {category} is {val_name}, in {train_annotations} it is "
                f"{train_name}: labels would not mean the same in both splits. Take both files "
                "from the same release of the data set"
            )

    # Category numbers may have gaps; labels are their ranks.
    label_of = {category: label for label, category in enumerate(classes)}
    train = _annotated(train_content, lists[0], images, label_of)
    val = _annotated(val_content, lists[1], images, label_of)
    return _labeled_splits(
        name,
        base / images,
        tuple(classes.values()),
        lists,
        [train, val],
        published_images,
    )


def _annotations(path: Path) -> dict[str, list[Any]]:
    """Returns the content of an annotation file, which has the three lists that are needed."""
    text = read_text(path, f"data.root is to hold {_INATURALIST}")
    with data_errors(f"{path} is not JSON", ValueError, RecursionError, advice=_UNPACK):
        content = json.loads(text)
    needed = {"images", "annotations", "categories"}
    has_all = isinstance(content, dict) and needed <= set(content)
    if not has_all:
        raise DataError(
            f"{path} is no annotation file: it has no images, annotations and categories. {_UNPACK}"
        )
    return content


def _categories(content: Mapping[str, list[Any]], path: Path) -> dict[int, str]:
    """Returns the names of categories by their numbers, in the order of the numbers.

    This order is that of the labels.
    """
    name_of: dict[int, str] = {}
    with data_errors(f"{path}: a category without id or name", KeyError, TypeError, advice=_UNPACK):
        for category in content["categories"]:
            number = category["id"]
            name = category["name"]
            if name_of.setdefault(number, name) != name:
                raise DataError(
                    f"{path}: category {number} is both {name_of[number]} and {name}. {_UNPACK}"
                )
        return dict(sorted(name_of.items()))


def _annotated(
    content: Mapping[str, list[Any]],
    path: Path,
    folder: str,
    label_of: Mapping[int, int],
) -> list[tuple[str, int]]:
    """Returns the file name and label of each image in an annotation file."""
    category_of: dict[int, int] = {}
    labeled = []
    problem = f"{path}: an image without file name, annotation or known category"
    with data_errors(problem, KeyError, TypeError, AttributeError, advice=_UNPACK):
        # The images of this data set show one species each.
        for annotation in content["annotations"]:
            image = annotation["image_id"]
            category = annotation["category_id"]
            if category_of.setdefault(image, category) != category:
                raise DataError(
                    f"{path}: image {image} is annotated with two categories, {category_of[image]} "
                    f"and {category}: keep the right one"
                )
        for entry in content["images"]:
            # Official files name images with their folder, others without it.
            file_name = entry["file_name"].removeprefix(f"{folder}/")
            category = category_of[entry["id"]]
            label = label_of[category]
            labeled.append((file_name, label))
    if not labeled:
        raise DataError(f"{path} names no images. {_UNPACK}")
    return labeled


def _labeled_splits(
    name: str,
    folder: Path,
    classes: tuple[str, ...],
    lists: Sequence[Path],
    named: Sequence[Sequence[tuple[str, int]]],
    published_images: Mapping[str, int] | None,
) -> Splits:
    """Returns both splits; `named` has the path below `folder` and the label of each image."""
    splits = []
    for split, labeled in zip(("train", "val"), named, strict=True):
        # Labels are not part of the paths, so that the digest has to include them.
        images = FolderImages(
            name=name,
            split=split,
            paths=[f"{folder}/{path}" for path, _ in labeled],
            labels=[label for _, label in labeled],
            classes=classes,
            labels_are_listed=True,
        )
        splits.append(images)
    return checked_splits(splits, lists, published_images)


def checked_splits(
    images: Sequence[FolderImages],
    lists: Sequence[Path],
    published_images: Mapping[str, int] | None,
    *,
    remarks: tuple[str, ...] = (),
) -> Splits:
    """Returns the training and the held-out images of two lists, with remarks for the user.

    Raises:
        DataError: both lists name the same image, which would be tested after training on it.
    """
    train, held_out = images
    # Paths tell images from each other: the same file name may stand in several folders.
    tested = set(held_out.paths)
    shared = tested.intersection(train.paths)
    if shared:
        raise DataError(
            f"{train.name}: {len(shared)} of {len(tested)} images of {lists[1].name} are also in "
            f"{lists[0].name}, such as {min(shared)}: results on images that were trained on mean "
            "nothing; name lists that share none"
        )
    splits = Splits(
        train=train,
        held_out=held_out,
        remarks=remarks,
        published_images=published_images or {},
    )
    warn_of_other_counts(splits)
    return splits


def numbered_lines(path: Path, holding: str) -> list[tuple[int, str]]:
    """Returns the lines of a list that are not empty, at least one, with their line numbers."""
    numbered = []
    text = read_text(path, f"data.root is to hold {holding}")
    for number, line in enumerate(text.split("\n"), start=1):
        # No file name can hold a NUL byte.
        if "\0" in line:
            raise DataError(
                f"{path} line {number} holds a NUL byte: the file is damaged, unpack it again"
            )
        # Lists may end with empty lines.
        stripped = line.strip()
        if stripped:
            numbered.append((number, stripped))
    if not numbered:
        raise DataError(f"{path} names no images. {_UNPACK}")
    return numbered
