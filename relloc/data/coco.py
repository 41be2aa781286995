"""COCO for detection and instance segmentation: boxes, masks and crowds of 80 classes."""

import array
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from relloc.data.annotated_folders import ObjectFolder
from relloc.data.annotations import LEAST_POLYGON_NUMBERS
from relloc.data.folder import require_root, require_some_of
from relloc.data.image_set import Splits
from relloc.data.json_lists import read_lists
from relloc.data.lists import checked_splits
from relloc.data.object_table import MaskTable, ObjectTable, boxes_outside, in_hundredths
from relloc.errors import DataError

_COCO = (
    "COCO 2017 (train2017.zip, val2017.zip and annotations_trainval2017.zip, unpacked into one "
    "folder), from the COCO site"
)
_AGAIN = "Unpack or download it again"
# A larger side or identifier is a damaged number.
_MOST_PX = 1 << 20
_MOST_ID = 1 << 53


def coco(
    *,
    name: str,
    root: str | None,
    train: str,
    held_out: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns two splits of COCO with boxes and masks of their objects.

    `train` and `held_out` name a folder of images, ROOT/train2017 or ROOT/images/train2017, and the
    file ROOT/annotations/instances_train2017.json. The splits have these names without the year.
    Classes are numbered in the order of their category ids. Images come in the order of the file,
    those without objects too. An object with a wrong box, mask or category makes its image count as
    unreadable.

    Raises:
        DataError: a folder or file is missing, a file is cut off or has an image or annotation that
            belongs to nothing, or the two files have other categories.

    Example:
        >>> coco(name="coco2017", root="/data/coco", train="train2017", held_out="val2017")
    """
    base = require_root(root, _COCO)
    require_some_of(base, [train, held_out, "images", "annotations"], _COCO)
    train_images = _split(name, base, train)
    held_out_images = _split(name, base, held_out)
    train_file = _annotation_file(base, train)
    held_out_file = _annotation_file(base, held_out)
    # Class numbers follow from the categories, so other ones would give the numbers other meanings.
    if train_images.classes != held_out_images.classes:
        train_classes = set(train_images.classes)
        held_out_classes = set(held_out_images.classes)
        in_one = sorted(train_classes ^ held_out_classes)
        example = f", such as {in_one[0]}" if in_one else " in their order"
        raise DataError(
            f"{train_file} and {held_out_file.name} differ in their categories{example}: take both "
            "files from the same release of the data set"
        )
    images = [train_images, held_out_images]
    files = [train_file, held_out_file]
    return checked_splits(images, files, published_images)


def _annotation_file(base: Path, split: str) -> Path:
    return base / "annotations" / f"instances_{split}.json"


def _split(name: str, base: Path, split: str) -> ObjectFolder:
    """Returns the images of one split with their objects."""
    # As the archives are laid out, and as some frameworks ask for.
    usual_folder = base / split
    folder = usual_folder
    if not folder.is_dir():
        folder = base / "images" / split
    if not folder.is_dir():
        raise DataError(f"{usual_folder} is missing: data.root is to hold {_COCO}")
    path = _annotation_file(base, split)
    annotations = _Annotations(path)
    handlers = {
        "categories": annotations.add_category,
        "images": annotations.add_image,
        "annotations": annotations.add_annotation,
    }
    read_lists(path, handlers, f"data.root is to hold {_COCO}")
    if not annotations.file_names:
        raise DataError(f"{path} names no images. {_AGAIN}")
    return ObjectFolder(
        name=name,
        # In results the split of coco2017 is called val.
        split=split.rstrip("0123456789") or split,
        paths=[f"{folder}/{file_name}" for file_name in annotations.file_names],
        classes=tuple(annotations.class_names.values()),
        table=annotations.table(),
        ids=np.array(annotations.image_ids, np.int64),
    )


class _Annotations:
    """The content of an annotation file, gathered in arrays while the file is read.

    The lists of a file may come in any order, so that what refers to another list is resolved in
    `table`, at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name_of_category: dict[int, str] = {}
        # Of images.
        self.index_of_image: dict[int, int] = {}
        self.image_ids = array.array("q")
        self.sizes = array.array("q")
        self.file_names: list[str] = []
        # Of annotations: one value each, four of each box.
        self.ids = array.array("q")
        self.images = array.array("q")
        self.categories = array.array("q")
        self.crowd = array.array("b")
        self.areas = array.array("d")
        self.boxes = array.array("d")
        # Of masks, as in MaskTable.
        self.is_run_lengths = array.array("b")
        self.part_starts = array.array("q", [0])
        self.number_starts = array.array("q", [0])
        self.numbers = array.array("d")
        # What is wrong with the first wrong annotation of an image, by the image's id.
        self.problems: dict[int, str] = {}

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the classes by their category ids, in ascending order."""
        return dict(sorted(self.name_of_category.items()))

    def add_category(self, place: int, entry: Any) -> None:
        number = self._id(entry, "id", f"category {place + 1}")
        name = entry.get("name")
        # An entry that is there twice does no harm.
        is_first_name = self.name_of_category.setdefault(number, name) == name
        if not isinstance(name, str) or not is_first_name:
            raise DataError(f"{self.path}: category {number} has no name, or two. {_AGAIN}")

    def add_image(self, place: int, entry: Any) -> None:
        number = self._id(entry, "id", f"image {place + 1}")
        file_name = entry.get("file_name")
        # Opening a name with a zero byte would raise ValueError.
        if not isinstance(file_name, str) or not file_name or "\0" in file_name:
            raise DataError(f"{self.path}: image {number} has no file_name. {_AGAIN}")
        size = [entry.get("height"), entry.get("width")]
        for value in size:
            if not isinstance(value, int) or not 1 <= value <= _MOST_PX:
                raise DataError(
                    f"{self.path}: image {number} ({file_name}) has the height and width {size}. "
                    f"{_AGAIN}"
                )
        if number in self.index_of_image:
            raise DataError(f"{self.path} has two images {number}. {_AGAIN}")
        self.index_of_image[number] = len(self.file_names)
        self.image_ids.append(number)
        self.sizes.extend(size)
        self.file_names.append(file_name)

    def add_annotation(self, place: int, entry: Any) -> None:
        number = self._id(entry, "id", f"annotation {place + 1}")
        image = self._id(entry, "image_id", f"annotation {number}")
        # A wrong annotation makes its image unusable, and no other.
        try:
            category = _whole(entry.get("category_id"), "category_id")
            crowd = _whole(entry.get("iscrowd", 0), "iscrowd")
            if crowd not in (0, 1):
                raise ValueError(f"iscrowd is {crowd}, and should be 0 or 1")
            area = _numbers([entry.get("area")], "area")
            box = _numbers(entry.get("bbox"), "bbox")
            if len(box) != 4 or min(box[2:]) < 0:
                raise ValueError(
                    f"bbox is {list(box)}, and should be x, y, width and height of 0 or more"
                )
            parts = _parts(entry.get("segmentation"))
        except ValueError as error:
            problem = f"annotation {number} in {self.path}: {error}"
            self.problems.setdefault(image, problem)
            return
        # All is checked before the first array grows, so that they stay of one length.
        self.ids.append(number)
        self.images.append(image)
        self.categories.append(category)
        self.crowd.append(crowd)
        self.areas.extend(area)
        self.boxes.extend(box)
        self.is_run_lengths.append(isinstance(entry["segmentation"], dict))
        for part in parts:
            self.numbers.extend(part)
            self.number_starts.append(len(self.numbers))
        self.part_starts.append(len(self.number_starts) - 1)

    def _id(self, entry: Any, key: str, what: str) -> int:
        """Returns a number by which one thing refers to another, which nothing can do without."""
        value = entry.get(key) if isinstance(entry, dict) else None
        # Python's True is an int, too.
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MOST_ID:
            raise DataError(f"{self.path}: {what} has no {key}. {_AGAIN}")
        return value

    def table(self) -> ObjectTable:
        """Returns all objects, once the file has been read.

        Raises:
            DataError: an annotation belongs to no image of the file.
        """
        sizes = np.array(self.sizes, np.int64).reshape(-1, 2)
        image_of_object = self._image_of_object()
        ids = np.array(self.ids, np.int64)
        xywh = np.array(self.boxes, np.float64).reshape(-1, 4)
        masks = MaskTable(
            # Without a copy, for there are many.
            numbers=np.asarray(memoryview(self.numbers), np.float64),
            number_starts=np.array(self.number_starts, np.int64),
            part_starts=np.array(self.part_starts, np.int64),
            is_run_lengths=np.array(self.is_run_lengths, bool),
        )

        # What was noticed while the file was read.
        unusable = {}
        for image, problem in self.problems.items():
            if image not in self.index_of_image:
                raise DataError(f"{self.path} has no image {image}, and in it {problem}. {_AGAIN}")
            index = self.index_of_image[image]
            unusable[index] = problem

        # What can be noticed only now that images and categories are known.
        size_of_object = sizes[image_of_object]
        outside = boxes_outside(size_of_object, xywh).tolist()
        wrong = dict.fromkeys(outside, "its box lies outside of the image")
        wrong |= _wrong_masks(masks, size_of_object)
        classes = self._classes(wrong)
        for row, problem in sorted(wrong.items()):
            index = int(image_of_object[row])
            unusable.setdefault(index, f"annotation {ids[row]} in {self.path}: {problem}")

        # Objects are sorted by image: those of an image begin where those before it end.
        counts = np.bincount(image_of_object, minlength=len(sizes))
        ends = np.cumsum(counts)
        starts = np.concatenate([[0], ends])
        return ObjectTable(
            sizes=sizes,
            starts=starts.astype(np.int64),
            # Stable, since ties in metrics are decided by the order of the file.
            order=np.argsort(image_of_object, kind="stable"),
            ids=ids,
            xywh=xywh,
            classes=classes,
            difficult=np.zeros(len(ids), bool),
            crowd=np.array(self.crowd, bool),
            areas=np.array(self.areas, np.float64),
            unusable=unusable,
            masks=MaskTable(
                numbers=in_hundredths(masks.numbers),
                number_starts=masks.number_starts,
                part_starts=masks.part_starts,
                is_run_lengths=masks.is_run_lengths,
            ),
        )

    def _image_of_object(self) -> Int64[np.ndarray, "objects"]:
        """Returns the index of each object's image; raises `DataError` if it does not exist."""
        indices = np.empty(len(self.images), np.int64)
        for row, image in enumerate(self.images):
            index = self.index_of_image.get(image)
            if index is None:
                raise DataError(
                    f"{self.path}: annotation {self.ids[row]} is of image {image}, which the file "
                    f"does not have. {_AGAIN}"
                )
            indices[row] = index
        return indices

    def _classes(self, wrong: dict[int, str]) -> np.ndarray:
        """Returns the class of each object, and notes unknown categories in `wrong`."""
        # Category ids of COCO have gaps, and class numbers do not.
        class_of = {}
        for number, category in enumerate(self.class_names):
            class_of[category] = number
        classes = np.zeros(len(self.categories), np.int16)
        for row, category in enumerate(self.categories):
            if category in class_of:
                classes[row] = class_of[category]
            else:
                wrong[row] = f"the file has no category {category}"
        return classes


def _whole(value: Any, name: str) -> int:
    """Returns a whole number of an annotation. Raises `ValueError` if it is none."""
    if not isinstance(value, int) or abs(value) > _MOST_ID:
        raise ValueError(f"{name} is {value!r}, and should be a whole number")
    return int(value)


def _numbers(values: Any, name: str) -> "array.array[float]":
    """Returns numbers of an annotation. Raises `ValueError` if one is missing or infinite."""
    try:
        numbers = array.array("d", values)
    except (TypeError, OverflowError):
        numbers = None
    # A text would be taken as a list of its characters. A sum is finite only if all numbers are,
    # and one number is quicker to check than millions.
    if numbers is None or isinstance(values, str) or not math.isfinite(sum(numbers)):
        raise ValueError(f"{name} is {str(values)[:60]}, and should be finite numbers")
    return numbers


def _parts(segmentation: Any) -> Sequence["array.array[float]"]:
    """Returns the parts of a mask: polygons, or one part of run lengths.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        # As pycocotools writes it; COCO's own file has lists.
        if isinstance(counts, str):
            counts = counts_of_text(counts)
        lengths = _numbers(counts, "counts of segmentation")
        has_fractions = any(length % 1 for length in lengths)
        if not lengths or min(lengths) < 0 or has_fractions:
            raise ValueError("counts of segmentation should be whole numbers of 0 or more")
        return [lengths]
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("segmentation is missing or empty")
    parts = [_numbers(part, "segmentation") for part in segmentation]
    for part in parts:
        if len(part) % 2 or len(part) < LEAST_POLYGON_NUMBERS:
            raise ValueError(
                f"a polygon of segmentation has {len(part)} numbers, and should have x and y of at "
                "least 3 corners"
            )
    return parts


def counts_of_text(text: str) -> list[int]:
    """Returns the run lengths that pycocotools has compressed into text (rleToString).

    Each number is written in characters of 5 bits, the lowest first; a sixth bit says that more
    follow. From the fourth number on it is the difference to the number two before.

    Raises:
        ValueError: the text is cut off or no such text.
    """
    counts: list[int] = []
    value = 0
    shift = 0
    for character in text:
        # Six bits are written as a character from "0" on.
        code = ord(character) - ord("0")
        if not 0 <= code < 64:
            raise ValueError(f"counts of segmentation hold {character!r}")
        five_bits = code & 0b011111
        value |= five_bits << shift
        shift += 5
        continues = code & 0b100000
        if continues:
            continue
        # The highest bit of the last character is the sign.
        is_negative = code & 0b010000
        if is_negative:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    if shift:
        raise ValueError("counts of segmentation are cut off")
    return counts


def _wrong_masks(masks: MaskTable, sizes: Int64[np.ndarray, "masks 2"]) -> dict[int, str]:
    """Returns what is wrong with masks, by their row: they do not fit the size of their image."""
    wrong = {}
    starts = masks.number_starts
    first_parts = masks.part_starts[:-1]
    # Runs go on to the last pixel, so that their lengths add up to the image.
    for row in np.flatnonzero(masks.is_run_lengths).tolist():
        part = first_parts[row]
        start = starts[part]
        end = starts[part + 1]
        n_pixels = masks.numbers[start:end].sum()
        height, width = sizes[row].tolist()
        if n_pixels != height * width:
            wrong[row] = f"its mask has {n_pixels:.0f} pixels, its image {height * width}"
    # A polygon far outside would take memory without bounds when it is drawn.
    if len(starts) > 1:
        largest = _by_part(np.maximum, masks.numbers, starts)
        smallest = _by_part(np.minimum, masks.numbers, starts)
        rows = np.arange(len(first_parts))
        n_parts = np.diff(masks.part_starts)
        row_of_part = np.repeat(rows, n_parts)
        longest_side = sizes[row_of_part].max(axis=1)
        # By a whole image, as outlines that are a little outside are in COCO itself.
        is_far_behind = largest > 2 * longest_side
        is_far_before = smallest < -longest_side
        is_polygon = ~masks.is_run_lengths[row_of_part]
        is_far = (is_far_behind | is_far_before) & is_polygon
        for row in np.unique(row_of_part[is_far]).tolist():
            wrong[row] = "its mask reaches far out of the image"
    return wrong


def _by_part(
    reduce: np.ufunc, numbers: Float64[np.ndarray, "n"], starts: Int64[np.ndarray, "part_bounds"]
) -> Float64[np.ndarray, "parts"]:
    """Returns the largest or smallest number of each part, none of which is empty."""
    return reduce.reduceat(numbers, starts[:-1])
