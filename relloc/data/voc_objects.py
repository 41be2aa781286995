"""PASCAL VOC for detection: boxes of 20 classes, trained on the images of several years.

The XML files count pixels from 1. Two references for the card's detection row read them in two
ways (docs/protocols.md 3.8):

- mmdet: coordinates are cut to integers, and 1 is subtracted from all four.
- detectron2: 1 is subtracted from xmin and ymin alone, so that a box ends after its last pixel.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relloc import checks
from relloc.data.annotated_folders import ObjectFolder
from relloc.data.image_set import Splits
from relloc.data.lists import VOC_CLASSES, checked_splits, voc_devkit, voc_list
from relloc.data.object_table import ObjectTable, boxes_outside
from relloc.errors import DataError, UnreadableImage, reason
from relloc.terminal import quantity

REFERENCES = ("mmdet", "detectron2")
# The years of the published split, which the setting published_images gives counts of.
PUBLISHED_YEARS = (2007, 2012)
PUBLISHED_TEST_YEAR = 2007
# More than cores: threads wait for a file server.
_THREADS = 16
_CLASS_OF = {name: number for number, name in enumerate(VOC_CLASSES)}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ROW_LENGTH = 8


class _Content(NamedTuple):
    """The annotation of one image.

    `size` is its height and width, and `rows` are numbers of each object (see `_annotation`).
    `left_out` names objects of other classes than those of PASCAL VOC.
    """

    size: tuple[int, int]
    rows: list[list[float]]
    left_out: list[str]


def voc_detection(
    *,
    root: str | None,
    years: Sequence[int],
    train: str,
    held_out: str,
    held_out_year: int,
    reference: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns the images of PASCAL VOC with the boxes of their objects.

    The training split is the list `train` of all `years`, one after the other; the held-out split
    is the list `held_out` of `held_out_year`. `reference` says how coordinates are read: "mmdet" or
    "detectron2". Every annotation is read now; one that is wrong counts as an unreadable image. An
    object of a class that is none of VOC's 20 is left out, as mmdetection does it.

    Raises:
        DataError: a folder or list is missing or empty, or both splits have the same image.
        UsageError: a setting is wrong.

    Example:
        >>> voc_detection(
        ...     root="/data",
        ...     years=[2007, 2012],
        ...     train="trainval",
        ...     held_out="test",
        ...     held_out_year=2007,
        ...     reference="mmdet",
        ... )
    """
    checks.wholes("data.source.years", years)
    checks.whole("data.source.held_out_year", held_out_year)
    checks.one_of("data.source.reference", reference, REFERENCES)
    if len(set(years)) < len(years):
        raise DataError(f"data.source.years is {list(years)}: name each year once")
    # Which archives of which year are read, for errors.
    archives = {year: [train] for year in years}
    archives.setdefault(held_out_year, []).append(held_out)
    kits = []
    for year, names in archives.items():
        kits.append(f"PASCAL VOC{year} ({' and '.join(names)})")
    holding = f"the development kits of {', '.join(kits)}, with boxes, from the PASCAL VOC site"
    _check_folders(root, {*years, held_out_year}, holding)
    train_images, train_remarks = _split(root, years, train, reference)
    held_out_images, held_out_remarks = _split(root, [held_out_year], held_out, reference)
    splits = [train_images, held_out_images]
    remarks = train_remarks + held_out_remarks
    # A split may be made of the lists of several years, so messages name it and not a file.
    lists = [Path(f"{split.name} {split.split}") for split in splits]
    # Published counts are those of the published years alone.
    own_years = (*years, held_out_year)
    published_years = (*PUBLISHED_YEARS, PUBLISHED_TEST_YEAR)
    if own_years != published_years:
        published_images = None
    return checked_splits(splits, lists, published_images, remarks=remarks)


def _check_folders(root: str | None, years: set[int], holding: str) -> None:
    """Checks that each year has a folder of its own; `holding` says what `root` is to hold.

    Raises:
        DataError: a folder is missing, or `root` is the folder of one year only.
    """
    folders = {voc_devkit(root, year, holding=holding) for year in years}
    # A root that is itself the folder of a year is taken for every year.
    if len(folders) < len(years):
        names = [f"VOC{year}" for year in sorted(years)]
        named = ", ".join(names)
        raise DataError(
            f"data.root={root} is the folder of one year: give the folder above, which holds "
            f"{named}"
        )


def _split(
    root: str | None, years: Sequence[int], split: str, reference: str
) -> tuple[ObjectFolder, tuple[str, ...]]:
    """Returns the images of the lists of some years, with their objects, and remarks on those."""
    images = []
    annotations = []
    # Each year has a development kit of its own, with its own lists.
    for year in years:
        devkit = voc_devkit(root, year)
        folder = devkit / "Annotations"
        listed = voc_list(devkit, "Main", split)
        if not folder.is_dir():
            raise DataError(
                f"{folder} is missing: it holds the boxes of objects. Unpack the archives of "
                f"PASCAL VOC{year} again, those of trainval and of test in one folder"
            )
        image_folder = devkit / "JPEGImages"
        images += [f"{image_folder}/{image}.jpg" for image in listed]
        annotations += [folder / f"{image}.xml" for image in listed]
    table, left_out = _table(annotations, reference)
    remarks = ()
    if left_out:
        objects = quantity(len(left_out), "object is", "objects are")
        remarks = (
            f"{split}: {objects} of no class of PASCAL VOC and left out, such as {left_out[0]}",
        )
    of_split = ObjectFolder(
        name=_name(years),
        split=split,
        paths=images,
        classes=VOC_CLASSES,
        table=table,
        reading=reference,
    )
    return of_split, remarks


def _name(years: Sequence[int]) -> str:
    """Returns the usual name of some years of VOC: voc2007, voc0712."""
    if len(years) == 1:
        return f"voc{years[0]}"
    last_digits = [f"{year % 100:02d}" for year in years]
    return "voc" + "".join(last_digits)


def _table(annotations: Sequence[Path], reference: str) -> tuple[ObjectTable, list[str]]:
    """Returns the objects in annotation files, one for each image, and those that are left out."""

    def read(path: Path) -> _Content | str:
        # An error is kept as its text, as it is no error of the data set but of one image.
        try:
            return _annotation(path, reference)
        except UnreadableImage as error:
            return str(error)

    # One call for each file, as files of a server answer at different times.
    with ThreadPoolExecutor(_THREADS) as threads:
        contents = list(threads.map(read, annotations, chunksize=1))

    unusable: dict[int, str] = {}
    sizes = []
    counts = []
    rows: list[list[float]] = []
    left_out: list[str] = []
    for index, content in enumerate(contents):
        # An image that can't be used keeps its place, without objects.
        if isinstance(content, str):
            unusable[index] = content
            content = _Content(size=(0, 0), rows=[], left_out=[])
        sizes.append(content.size)
        counts.append(len(content.rows))
        rows += content.rows
        left_out += content.left_out
    numbers = np.array(rows, np.float64).reshape(-1, _ROW_LENGTH)
    whole_numbers = numbers[:, :4].astype(np.int64)
    ids, classes, difficult, occluded = whole_numbers.T
    xywh = np.ascontiguousarray(numbers[:, 4:])
    image_sizes = np.array(sizes, np.int64)
    indices = np.arange(len(sizes))
    image_of_row = np.repeat(indices, counts)

    # A box without any pixel of its image can't be cut to it.
    size_of_row = image_sizes[image_of_row]
    for row in boxes_outside(size_of_row, xywh).tolist():
        index = int(image_of_row[row])
        height, width = sizes[index]
        problem = (
            f"{annotations[index]}: the box of object {ids[row]} lies outside of the image, which "
            f"has {width} x {height} px"
        )
        unusable.setdefault(index, problem)
    # Rows are in the order of images already.
    table = ObjectTable(
        sizes=image_sizes,
        starts=np.cumsum([0, *counts], dtype=np.int64),
        order=np.arange(len(xywh)),
        ids=ids,
        xywh=xywh,
        classes=classes.astype(np.int16),
        difficult=difficult.astype(bool),
        crowd=np.zeros(len(xywh), bool),
        areas=xywh[:, 2] * xywh[:, 3],
        unusable=unusable,
        occluded=occluded.astype(bool),
    )
    return table, left_out


def _annotation(path: Path, reference: str) -> _Content:
    """Returns the annotation of an image.

    The row of an object is: its place in the file (from 1), its class, whether it is difficult (0
    or 1), whether it is occluded (likewise), x, y, width and height.

    Raises:
        UnreadableImage: the file is missing or not XML, or an object is not as it should be.
    """
    try:
        # Opening a pipe would wait for ever.
        if path.exists() and not path.is_file():
            raise UnreadableImage(f"its annotation {path} is no file")
        root = ET.fromstring(path.read_bytes())
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else "is not XML"
        raise UnreadableImage(f"its annotation {path} {problem}: {reason(error)}") from error
    size = root.find("size")
    height = _number(path, "the image", size, "height")
    width = _number(path, "the image", size, "width")
    if min(height, width) < 1:
        raise UnreadableImage(f"{path}: the image has {width:g} x {height:g} px")
    rows = []
    left_out = []
    for place, annotated in enumerate(root.findall("object"), start=1):
        name = annotated.findtext("name", "").strip()
        what = f"object {place} ({name})"
        if name not in _CLASS_OF:
            left_out.append(f"{what} in {path}")
            continue
        # The elements may be missing; annotations of 2007 do not say what is occluded.
        is_difficult = annotated.findtext("difficult", "0").strip() == "1"
        is_occluded = annotated.findtext("occluded", "0").strip() == "1"
        xywh = _box(path, what, annotated, reference)
        rows.append([place, _CLASS_OF[name], is_difficult, is_occluded, *xywh])
    return _Content(size=(int(height), int(width)), rows=rows, left_out=left_out)


def _box(path: Path, what: str, annotated: ET.Element, reference: str) -> list[float]:
    """Returns the box of an object as x, y, width and height, counted from 0."""
    element = annotated.find("bndbox")
    corners = [_number(path, what, element, corner) for corner in _CORNERS]
    if reference == "mmdet":
        # Some coordinates of VOC2012 have decimals.
        left, top, right, bottom = [int(corner) - 1 for corner in corners]
    else:
        left, top, right, bottom = corners
        left -= 1
        top -= 1
    if right <= left or bottom <= top:
        names = ", ".join(_CORNERS)
        values = ", ".join(f"{corner:g}" for corner in corners)
        raise UnreadableImage(f"{path}: the box of {what} is empty ({names} are {values})")
    return [left, top, right - left, bottom - top]


def _number(path: Path, what: str, parent: ET.Element | None, name: str) -> float:
    """Returns the number in an element of XML. Raises `UnreadableImage` if there is none."""
    text = "" if parent is None else parent.findtext(name, "").strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # float takes "nan" and "inf" too.
    if not math.isfinite(number):
        raise UnreadableImage(f"{path}: {name} of {what} is {text!r}, and should be a number")
    return number
