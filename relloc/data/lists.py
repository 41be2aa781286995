"""Data sets whose images are named in lists: PASCAL VOC, Places205 and iNaturalist 2018 (protocols.md 6).

Only the lists are read. An image that they name and that is not there is told when it is read, as
unreadable: looking for 2.4 million files takes longer than reading their names.
"""

import dataclasses
import functools
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from relloc.data.folder import FolderImages, require_root
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.errors import DataError, data_errors
from relloc.files import read_text

_VOC_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
VOC_CLASSES = tuple(_VOC_NAMES.split())
COUNTED_YEAR = 2007  # whose counts published_images has: the benchmark is of this year
_LABEL_DIGITS = 6  # there is a class for each number up to the largest label
THERE, DIFFICULT, NOT_THERE = 1, 0, -1  # as the class lists of PASCAL VOC have it

_VOC = "the PASCAL VOC{year} development kit (images and lists, of trainval and of test), from the PASCAL VOC site"
_PLACES = "Places205 (images at 256 px, and the split lists), from the Places site of MIT"
_UNPACK = "Unpack it again"
_INATURALIST = "the iNaturalist 2018 competition's images and annotations, from its FGVC repository"


@runtime_checkable
class MultiLabeled(Protocol):
    """Images that may show several classes."""

    def presence(self) -> list[list[int]]:
        """For each image and class: 1 there, 0 there but difficult to recognize, -1 not there."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocImages(FolderImages):
    """The images of a list of PASCAL VOC: no labels, as each may show several classes."""

    devkit: Path
    listed: Sequence[str]

    def presence(self) -> list[list[int]]:
        return self._presence

    @functools.cached_property
    def _presence(self) -> list[list[int]]:
        """From the lists `<class>_<split>.txt`; without those of a split of one's own, from its annotations.

        Where neither says more, 1 is an object not marked difficult, 0 are difficult ones only.

        Raises:
            DataError: a list is about other images than the split, or an annotation is missing or broken.
        """
        lists = [
            self.devkit / "ImageSets" / "Main" / f"{name}_{self.split}.txt" for name in VOC_CLASSES
        ]
        if not any(path.exists() for path in lists):
            return [
                _annotated_presence(self.devkit / "Annotations" / f"{image}.xml")
                for image in self.listed
            ]
        columns = [self._class_list(path) for path in lists]
        return [list(row) for row in zip(*columns, strict=True)]

    def _class_list(self, path: Path) -> list[int]:
        """Of each image: whether it shows one class."""
        presence = {}
        for number, line in _lines(path, _VOC.format(year=self.devkit.name.removeprefix("VOC"))):
            image, *rest = line.split()
            if rest not in (["1"], ["0"], ["-1"]):
                raise DataError(f"{path} line {number}: {line!r} is not an image and 1, 0 or -1")
            presence[image] = int(rest[0])
        if odd := set(self.listed) ^ set(presence):
            raise DataError(
                f"{path} and {self.split}.txt beside it name different images, such as {min(odd)}: unpack both from "
                "the same archive again"
            )
        return [presence[image] for image in self.listed]


def _annotated_presence(path: Path) -> list[int]:
    if not path.exists():
        raise DataError(f"{path} is missing: without lists of classes it says what the image shows")
    with data_errors(f"{path} is not XML", OSError, ET.ParseError, advice=_UNPACK):
        root = ET.parse(path).getroot()
    presence = dict.fromkeys(VOC_CLASSES, NOT_THERE)
    for one in root.findall("object"):
        name, is_difficult = one.findtext("name", ""), one.findtext("difficult", "0").strip() == "1"
        if name in presence:
            presence[name] = max(presence[name], DIFFICULT if is_difficult else THERE)
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
    """The images that VOC<year>/ImageSets/Main/`train`.txt and `held_out`.txt name, any two lists there.

    `root` holds VOCdevkit, or is VOCdevkit or VOC<year> itself.

    Raises:
        DataError: a folder or list is missing or empty, or both lists name an image.
    """
    holding = _VOC.format(year=year)
    above = require_root(root, holding)
    candidates = (above / "VOCdevkit" / f"VOC{year}", above / f"VOC{year}", above)
    devkit = next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), None)
    if devkit is None:
        raise DataError(
            f"{candidates[0] / 'JPEGImages'} is missing: data.root is to hold {holding}"
        )
    splits = []
    lists = [devkit / "ImageSets" / "Main" / f"{split}.txt" for split in (train, held_out)]
    for split, path in zip((train, held_out), lists, strict=True):
        listed = [line.split()[0] for _, line in _lines(path, holding)]
        paths = [f"{devkit / 'JPEGImages'}/{image}.jpg" for image in listed]
        splits.append(
            VocImages(
                name=name,
                split=split,
                paths=paths,
                classes=VOC_CLASSES,
                devkit=devkit,
                listed=listed,
            )
        )
    return _checked(splits, lists, published_images if year == COUNTED_YEAR else None)


def places205(
    *,
    name: str,
    root: str | None,
    train_list: str,
    val_list: str,
    images: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Places205: `train_list` and `val_list` have a line "path label" an image, its path below `images`.

    All three are below `root`. A class is called after the folder of its first training image.

    Raises:
        DataError: a list is missing, empty, or has a line of another form, or both name an image.
    """
    base = require_root(root, _PLACES)
    lists = [base / train_list, base / val_list]
    train, val = map(_labeled_lines, lists)
    folder_of: dict[int, str] = {}
    for path, label in train:
        folder_of.setdefault(label, str(Path(path).parent))
    classes = tuple(folder_of.get(label, str(label)) for label in range(max(folder_of) + 1))
    largest = max(label for _, label in val)
    if largest >= len(classes):
        raise DataError(f"{lists[1]}: label {largest} is in no line of {lists[0]}")
    # Images of one folder are to have one label in both lists; but only where each folder has one label in the
    # training list, and each label one folder: in other layouts folders say nothing.
    pairs = {(os.path.dirname(path), label) for path, label in train}
    label_of = dict(pairs)
    if len(pairs) == len(label_of) == len(set(label_of.values())):
        for path, label in val:
            expected = label_of.get(os.path.dirname(path), label)
            if label != expected:
                raise DataError(
                    f"{lists[1]}: {path} has label {label}, images of its folder {os.path.dirname(path)} in {lists[0]} "
                    f"have {expected}: take both lists from the same release of the data set"
                )
    return _labeled_splits(name, base / images, classes, lists, [train, val], published_images)


def _labeled_lines(path: Path) -> list[tuple[str, int]]:
    """Path and label of each image that a list names, one at least."""
    found = []
    for number, line in _lines(path, _PLACES):
        image, _, label = line.rpartition(" ")
        if not image or not label.isdecimal() or len(label) > _LABEL_DIGITS:
            raise DataError(
                f"{path} line {number}: {line!r} is not a path, a space and a class number"
            )
        found.append((image.strip(), int(label)))
    return found


def inaturalist2018(
    *,
    name: str,
    root: str | None,
    train_annotations: str,
    val_annotations: str,
    images: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """iNaturalist 2018: two annotation files in COCO's form, and the folder `images`, all below `root`.

    File names count from `images`, also where they begin with its name, as the official ones do.

    Raises:
        DataError: a file is missing or not of that form, or both name an image.
    """
    base = require_root(root, _INATURALIST)
    lists = [base / train_annotations, base / val_annotations]
    content = [_annotations(path) for path in lists]
    classes, other_classes = map(_categories, content, lists)
    for category, called in classes.items():
        other = other_classes.get(category, called)
        if called != other:
            raise DataError(
                f"{lists[1]}: category {category} is {other}, in {train_annotations} it is {called}: "
                "labels would not mean the same in both splits. Take both files from the same release of the data set"
            )
    label_of = {category: label for label, category in enumerate(classes)}
    named = [
        _annotated(one, path, images, label_of) for one, path in zip(content, lists, strict=True)
    ]
    return _labeled_splits(
        name, base / images, tuple(classes.values()), lists, named, published_images
    )


def _annotations(path: Path) -> dict[str, list[Any]]:
    text = read_text(path, f"data.root is to hold {_INATURALIST}")
    with data_errors(f"{path} is not JSON", ValueError, RecursionError, advice=_UNPACK):
        content = json.loads(text)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise DataError(
            f"{path} is no annotation file: it has no images, annotations and categories"
        )
    return content


def _categories(content: Mapping[str, list[Any]], path: Path) -> dict[int, str]:
    """The names of categories by their numbers, in the order of the numbers, which is that of the labels."""
    called: dict[int, str] = {}
    with data_errors(f"{path}: a category without id or name", KeyError, TypeError, advice=_UNPACK):
        for category in content["categories"]:
            number, name = category["id"], category["name"]
            if called.setdefault(number, name) != name:
                raise DataError(f"{path}: category {number} is both {called[number]} and {name}")
        return dict(sorted(called.items()))


def _annotated(
    content: Mapping[str, list[Any]], path: Path, folder: str, label_of: Mapping[int, int]
) -> list[tuple[str, int]]:
    """File and label of each image."""
    category_of: dict[int, int] = {}
    problem = f"{path}: an image without file name, annotation or known category"
    with data_errors(problem, KeyError, TypeError, AttributeError, advice=_UNPACK):
        for entry in content["annotations"]:
            image, category = entry["image_id"], entry["category_id"]
            if category_of.setdefault(image, category) != category:
                raise DataError(
                    f"{path}: image {image} is annotated with two categories: which is right?"
                )
        found = [
            (entry["file_name"].removeprefix(f"{folder}/"), label_of[category_of[entry["id"]]])
            for entry in content["images"]
        ]
    if not found:
        raise DataError(f"{path} names no images")
    return found


def _labeled_splits(
    name: str,
    folder: Path,
    classes: tuple[str, ...],
    lists: Sequence[Path],
    named: Sequence[Sequence[tuple[str, int]]],
    published_images: Mapping[str, int] | None,
) -> Splits:
    """Both splits: paths below `folder` and labels that the two lists have `named`."""
    splits = []
    for split, images in zip(("train", "val"), named, strict=True):
        paths = [f"{folder}/{path}" for path, _ in images]
        labels = [label for _, label in images]
        splits.append(
            FolderImages(
                name=name,
                split=split,
                paths=paths,
                labels=labels,
                classes=classes,
                labels_are_listed=True,
            )
        )
    return _checked(splits, lists, published_images)


def _checked(
    images: Sequence[FolderImages],
    lists: Sequence[Path],
    published_images: Mapping[str, int] | None,
) -> Splits:
    """Training and held-out images that two lists name.

    Raises:
        DataError: both name an image: what it shows would be known before it is asked.
    """
    splits = Splits(train=images[0], held_out=images[1])
    tested = set(images[1].paths)
    shared = tested.intersection(images[0].paths)
    if shared:
        raise DataError(
            f"{splits.train.name}: {len(shared)} of {len(tested)} images of {lists[1].name} are also in "
            f"{lists[0].name}, such as {min(shared)}: results on images that were trained on mean nothing; name lists "
            "that share none"
        )
    warn_of_other_counts(splits, published_images)
    return splits


def _lines(path: Path, holding: str) -> list[tuple[int, str]]:
    """The lines that hold something, one at least, with their numbers."""
    found = []
    text = read_text(path, f"data.root is to hold {holding}")
    for number, line in enumerate(text.split("\n"), start=1):
        if "\0" in line:  # of which no file name is made
            raise DataError(
                f"{path} line {number} holds a NUL byte: the file is damaged, unpack it again"
            )
        if line.strip():
            found.append((number, line.strip()))
    if not found:
        raise DataError(f"{path} names no images")
    return found
