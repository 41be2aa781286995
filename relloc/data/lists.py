"""Data sets whose images are named in lists: PASCAL VOC, Places205 and iNaturalist 2018 (protocols.md 6).

Only the lists are read. An image that they name and that is not there is told when it is read, as
unreadable: looking for 2.4 million files takes longer than reading their names.
"""

import dataclasses
import functools
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from relloc.data.folder import FolderImages, require_root
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.errors import DataError

_VOC_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
VOC_CLASSES = tuple(_VOC_NAMES.split())
_COUNTED_YEAR = 2007  # whose counts published_images has: the benchmark is of this year
_LABEL_DIGITS = 6  # there is a class for each number up to the largest label
THERE, DIFFICULT, NOT_THERE = 1, 0, -1  # as the class lists of PASCAL VOC have it

_VOC = "the PASCAL VOC{year} development kit (images and lists, of trainval and of test), from the PASCAL VOC site"
_PLACES = "Places205 (images at 256 px, and the split lists), from the Places site of MIT"
_INATURALIST = "the iNaturalist 2018 competition's images and annotations, from its FGVC repository"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedImages(FolderImages):
    """An `ImageSet` of files whose labels stand in a list, and are therefore part of its digest."""

    def _told_by_list(self) -> Iterable[str]:
        return map(str, self.labels or ())


@runtime_checkable
class MultiLabeled(Protocol):
    """Images that may show several classes."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def presence(self) -> list[list[int]]:
        """For each image and class: 1 there, 0 there but difficult to recognize, -1 not there."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocImages(ListedImages):
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
        lists = self.devkit / "ImageSets" / "Main"
        if not any((lists / f"{name}_{self.split}.txt").exists() for name in VOC_CLASSES):
            return [_annotated_presence(self.devkit / "Annotations" / f"{image}.xml") for image in self.listed]
        columns = [self._class_list(lists / f"{name}_{self.split}.txt") for name in VOC_CLASSES]
        return [list(row) for row in zip(*columns, strict=True)]

    def _class_list(self, path: Path) -> list[int]:
        marks = {}
        for number, line in _lines(path, _VOC.format(year=self.devkit.name.removeprefix("VOC"))):
            image, *rest = line.split()
            if rest not in (["1"], ["0"], ["-1"]):
                raise DataError(f"{path} line {number}: {line!r} is not an image and 1, 0 or -1")
            marks[image] = int(rest[0])
        unmarked = [image for image in self.listed if image not in marks]
        if unmarked or len(marks) != len(set(self.listed)):
            example = unmarked[0] if unmarked else next(image for image in marks if image not in set(self.listed))
            raise DataError(
                f"{path} and {self.split}.txt beside it name different images, such as {example}: unpack both from "
                "the same archive again"
            )
        return [marks[image] for image in self.listed]


def _annotated_presence(path: Path) -> list[int]:
    try:
        objects = ET.parse(path).getroot().findall("object")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: without lists of classes it says what the image shows") from error
    except ET.ParseError as error:
        raise DataError(f"{path} is not XML: {error}") from error
    easy = {one.findtext("name") for one in objects if one.findtext("difficult", "0").strip() != "1"}
    shown = {one.findtext("name") for one in objects}
    return [THERE if name in easy else DIFFICULT if name in shown else NOT_THERE for name in VOC_CLASSES]


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
    where = _VOC.format(year=year)
    base = _voc_folder(require_root(root, where), year, where)
    splits = Splits(train=_voc_split(name, base, train, where), held_out=_voc_split(name, base, held_out, where))
    _refuse_shared(splits, f"{train}.txt", f"{held_out}.txt")
    warn_of_other_counts(splits, published_images if year == _COUNTED_YEAR else None)
    return splits


def _voc_folder(root: Path, year: int, where: str) -> Path:
    candidates = (root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", root)
    for folder in candidates:
        if (folder / "JPEGImages").is_dir():
            return folder
    raise DataError(f"{candidates[0] / 'JPEGImages'} is missing: data.root is to hold {where}")


def _voc_split(name: str, base: Path, split: str, where: str) -> VocImages:
    path = base / "ImageSets" / "Main" / f"{split}.txt"
    found = [line.split()[0] for _, line in _lines(path, where)]
    if not found:
        raise DataError(f"{path} names no images")
    paths = [f"{base / 'JPEGImages'}/{one}.jpg" for one in found]
    return VocImages(name=name, split=split, paths=paths, classes=VOC_CLASSES, devkit=base, listed=found)


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
    (paths, labels), (val_paths, val_labels) = (_labeled_lines(base / name) for name in (train_list, val_list))
    first = dict(zip(reversed(labels), reversed(paths), strict=True))
    classes = tuple(str(Path(first[label]).parent) if label in first else str(label) for label in range(max(first) + 1))
    if max(val_labels) >= len(classes):
        raise DataError(f"{base / val_list}: label {max(val_labels)} is in no line of {base / train_list}")
    _refuse_other_labels(base / train_list, paths, labels, base / val_list, val_paths, val_labels)
    splits = Splits(
        train=_images(name, "train", base / images, base / train_list, paths, labels, classes),
        held_out=_images(name, "val", base / images, base / val_list, val_paths, val_labels, classes),
    )
    _refuse_shared(splits, train_list, val_list)
    warn_of_other_counts(splits, published_images)
    return splits


def _labeled_lines(path: Path) -> tuple[list[str], list[int]]:
    paths, labels = [], []
    for number, line in _lines(path, _PLACES):
        image, _, label = line.rpartition(" ")
        if not image or not label.isdecimal() or len(label) > _LABEL_DIGITS:
            raise DataError(f"{path} line {number}: {line!r} is not a path, a space and a class number")
        paths.append(image.strip())
        labels.append(int(label))
    if not paths:
        raise DataError(f"{path} names no images")
    return paths, labels


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
    content = {path: _annotations(base / path) for path in (train_annotations, val_annotations)}
    label_of, classes = _categories(content[train_annotations], base / train_annotations)
    _refuse_other_categories(content[val_annotations], base / val_annotations, label_of, classes, train_annotations)

    def split(split_name: str, path: str) -> ListedImages:
        files, labels = _annotated(content[path], base / path, images, label_of)
        return _images(name, split_name, base / images, base / path, files, labels, classes)

    splits = Splits(train=split("train", train_annotations), held_out=split("val", val_annotations))
    _refuse_shared(splits, train_annotations, val_annotations)
    warn_of_other_counts(splits, published_images)
    return splits


def _annotations(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(_text(path, _INATURALIST))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise DataError(f"{path} is no annotation file: it has no images, annotations and categories")
    return content


def _categories(content: Mapping[str, list[Any]], path: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    """Labels by category number, in the order of the numbers, and the names in that order."""
    try:
        called = {category["id"]: category["name"] for category in content["categories"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a category without id or name: {error}") from error
    twice = next((one for one in content["categories"] if called[one["id"]] != one["name"]), None)
    if twice:
        raise DataError(f"{path}: category {twice['id']} is both {twice['name']} and {called[twice['id']]}")
    return {category: label for label, category in enumerate(sorted(called))}, tuple(
        called[one] for one in sorted(called)
    )


def _refuse_other_categories(
    content: Mapping[str, list[Any]], path: Path, label_of: Mapping[int, int], classes: Sequence[str], train: str
) -> None:
    """Raises `DataError` where both files have a number for a category, and not the same category."""
    other_labels, other_classes = _categories(content, path)
    for category, label in other_labels.items():
        name, known = other_classes[label], label_of.get(category)
        if known is not None and classes[known] != name:
            raise DataError(
                f"{path}: category {category} is {name}, in {train} it is {classes[known]}: labels would not mean the "
                "same in both splits. Take both files from the same release of the data set"
            )


def _annotated(
    content: Mapping[str, list[Any]], path: Path, folder: str, label_of: Mapping[int, int]
) -> tuple[list[str], list[int]]:
    try:
        category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        for entry in content["annotations"]:
            if category_of[entry["image_id"]] != entry["category_id"]:
                raise DataError(f"{path}: image {entry['image_id']} is annotated with two categories: which is right?")
        files = [entry["file_name"].removeprefix(f"{folder}/") for entry in content["images"]]
        labels = [label_of[category_of[entry["id"]]] for entry in content["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: an image without file name, annotation or known category: {error}") from error
    return files, labels


def _refuse_other_labels(
    train: Path,
    paths: Sequence[str],
    labels: Sequence[int],
    val: Path,
    val_paths: Sequence[str],
    val_labels: Sequence[int],
) -> None:
    """Raises `DataError` where images of one folder have one label in the training list, another in the other list.

    Only where each folder has one label there, and each label one folder: in other layouts folders say nothing.
    """
    label_of = dict(zip(map(os.path.dirname, paths), labels, strict=True))
    pairs = set(zip(map(os.path.dirname, paths), labels, strict=True))
    if len(pairs) != len(label_of) or len(set(label_of.values())) != len(label_of):
        return
    for path, label in zip(val_paths, val_labels, strict=True):
        folder = os.path.dirname(path)
        if label_of.get(folder, label) != label:
            raise DataError(
                f"{val}: {path} has label {label}, images of its folder {folder} in {train} have {label_of[folder]}: "
                "take both lists from the same release of the data set"
            )


def _refuse_shared(splits: Splits, train_list: str, held_out_list: str) -> None:
    """Raises `DataError` where an image is in both splits: what it shows would be known before it is asked."""
    train, held_out = splits.train, splits.held_out
    tested = {held_out.source(place) for place in range(len(held_out))}
    shared = tested.intersection(train.source(place) for place in range(len(train)))
    if shared:
        raise DataError(
            f"{train.name}: {len(shared)} of {len(tested)} images of {held_out_list} are also in {train_list}, such as "
            f"{min(shared)}: results on images that were trained on mean nothing; name lists that share none"
        )


def _text(path: Path, where: str) -> str:
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise DataError(f"{path} is no file: data.root is to hold {where}")
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: data.root is to hold {where}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


def _lines(path: Path, where: str) -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    for number, line in enumerate(_text(path, where).split("\n"), start=1):
        if "\0" in line:  # of which no file name is made
            raise DataError(f"{path} line {number} holds a NUL byte: the file is damaged, unpack it again")
        if line.strip():
            yield number, line.strip()


def _images(
    name: str,
    split: str,
    folder: Path,
    listed_in: Path,
    files: Sequence[str],
    labels: Sequence[int] | None = None,
    classes: tuple[str, ...] = (),
) -> ListedImages:
    if not files:
        raise DataError(f"{listed_in} names no images")
    paths = [f"{folder}/{file}" for file in files]
    return ListedImages(name=name, split=split, paths=paths, labels=labels, classes=classes)
