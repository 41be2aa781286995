"""Checks a data set: images that can't be read, look wrong, are repeated, or are in both splits."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relloc.data.annotated_folders import ObjectFolder
from relloc.data.annotations import CheckedAnnotations
from relloc.data.image_set import ROLES, ImageSet, Splits
from relloc.data.images import ImageFile
from relloc.data.listing import first_names
from relloc.data.parts import (
    FACTS,
    Part,
    divide_into_parts,
    fill_facts,
    names,
    original,
    read_part,
    records_of,
    save_part,
)
from relloc.data.processes import Progress, Tick, work_through
from relloc.errors import UnreadableImage
from relloc.terminal import escaped, quantity

# An image is reported as small if its short side is under SMALL_PX, and as long if its long side is
# over LONG_RATIO times the short one.
SMALL_PX = 64
LONG_RATIO = 5
# How many images of each kind are named, and how many files' hashes are kept.
_EXAMPLES = 5
_HASHED = 16
_IMAGES_PER_PART = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedImages:
    """The number of images that have some property, and the names of the first of them."""

    n: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        text = first_names(self.examples)
        if self.n > len(self.examples):
            text += ", …"
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """The result of checking one split.

    `published` is the official number of images. `class_images` are the smallest and the largest
    number of images of a class; `short_px` the smallest, the median and the largest short side.
    `unreadable` gives reasons by image. `small` images have a short side under 64 px, `long` ones
    a long side over 5 times the short one. `repeated` images have the same bytes as an earlier
    one. `sha256` has the hashes of a few files, evenly spread over the split. Of annotated images,
    `objects` is the number of objects, and `odd_annotations` has images by what is odd.
    """

    split: str
    images: int
    published: int | None
    class_images: tuple[int, int] | None
    short_px: tuple[int, int, int] | None
    unreadable: dict[str, str]
    small: CountedImages
    long: CountedImages
    single_color: CountedImages
    repeated: CountedImages
    sha256: dict[str, str]
    objects: int | None = None
    odd_annotations: dict[str, CountedImages] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The result of checking a data set.

    `leaked` are held-out images whose file is also in the training split.
    """

    name: str
    train: SplitCheck
    held_out: SplitCheck
    leaked: CountedImages

    def as_json(self) -> dict[str, Any]:
        """Returns the check as a value that can be written as JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Check":
        """Returns the check that `as_json` returned, from the JSON that it was written as."""
        splits = {role: SplitCheck(**_with_types(content[role])) for role in ROLES}
        return Check(**{**_with_types(content), **splits})

    def findings(self) -> list[str]:
        """Returns a sentence for each problem, the most serious first."""
        sentences = []
        if self.leaked.n:
            held_out = self.held_out.split
            leaked = quantity(self.leaked.n, f"image of {held_out} is", f"images of {held_out} are")
            sentences.append(
                f"LEAK: {leaked} also in "
                f"{self.train.split}, with the same bytes ({self.leaked}): results on "
                f"{held_out} would be too good"
            )
        return sentences + _findings(self.train) + _findings(self.held_out)


def check(
    data: Splits, *, published: Mapping[str, int] | None, workers: int, progress: Progress
) -> Check:
    """Reads every image of both splits once, in `workers` processes, and returns the result.

    `published` gives the official number of images by the name of the split.
    """
    parts = divide_into_parts(data, _IMAGES_PER_PART)
    total = len(data.train) + len(data.held_out)
    with tempfile.TemporaryDirectory(prefix="relloc_check_") as folder:
        work = functools.partial(_examine, data, Path(folder))
        work_through(work, parts, workers=workers, total=total, done=0, progress=progress)
        return summary(data, Path(folder), parts, published)


def summary(
    data: Splits, folder: Path, parts: Sequence[Part], published: Mapping[str, int] | None
) -> Check:
    """Returns the check of a data set all of whose parts are finished in `folder`."""
    published_counts = published or {}
    train_parts = [part for part in parts if part.role == "train"]
    held_out_parts = [part for part in parts if part.role == "held_out"]
    train, train_files = _split_check(data.train, folder, train_parts, published_counts)
    held_out, held_out_files = _split_check(data.held_out, folder, held_out_parts, published_counts)
    # Reversed, so that the first of several equal training files is named.
    train_name_of = {content: name for name, content in reversed(train_files)}
    leaks = [
        f"{name} = {train_name_of[content]}"
        for name, content in held_out_files
        if content in train_name_of
    ]
    return Check(name=data.train.name, train=train, held_out=held_out, leaked=_counted(leaks))


def examine(
    images: ImageSet,
    part: Part,
    kind: np.dtype,
    tick: Tick,
    store: Callable[[np.void, int, ImageFile], None] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Reads the images of a part; returns a record of each, and why images can't be read.

    `kind` is the type of the records, which are zeros for unreadable images; the reasons are given
    by image number. `store(record, index, file)` is called for each image before its facts are
    recorded, and may raise `UnreadableImage`. `tick` is called after each image.
    """
    records = np.zeros(len(part), kind)
    unreadable: dict[int, str] = {}
    for record, index in zip(records, range(part.start, part.stop), strict=True):
        try:
            file = original(images, index)
            if store:
                store(record, index, file)
            fill_facts(record, file)
        except UnreadableImage as error:
            unreadable[index] = str(error)
        tick()
    return records, unreadable


def _examine(data: Splits, folder: Path, part: Part, tick: Tick) -> None:
    """Checks the images of one part, with their annotations, and saves records in `folder`."""
    images = data.of(part.role)
    odd: dict[int, Mapping[str, str]] = {}

    def check_annotation(record: np.void, index: int, file: ImageFile) -> None:
        del record
        if isinstance(images, CheckedAnnotations):
            found = images.check_annotation(index, file.rgb.height, file.rgb.width)
            if found:
                odd[index] = found

    records, unreadable = examine(images, part, FACTS, tick, check_annotation)
    save_part(folder, part, records, {"unreadable": unreadable, "odd": odd})


def _split_check(
    images: ImageSet, folder: Path, parts: list[Part], published: Mapping[str, int]
) -> tuple[SplitCheck, list[tuple[str, bytes]]]:
    """Returns the check of a split, and the names and hashes of its readable files."""
    image_names = names(images)
    records = records_of(folder, parts)
    short, long = np.sort([records["height"], records["width"]], axis=0)
    # Sides are 0 where the image can't be read.
    readable = np.flatnonzero(short)
    readable_short = short[readable]

    # Hashes of files: evenly spaced ones are kept, equal ones are repetitions.
    files: list[tuple[str, bytes]] = []
    for index, content in zip(readable, records["sha256"][readable], strict=True):
        files.append((image_names[index], content.tobytes()))
    sampling_step = max(1, -(-len(files) // _HASHED))
    sampled = files[::sampling_step]
    first_name_of: dict[bytes, str] = {}
    repeated = []
    for name, content in files:
        if content in first_name_of:
            repeated.append(f"{name} = {first_name_of[content]}")
        first_name_of.setdefault(content, name)

    unreadable, odd = _noted(folder, parts, image_names)

    # Statistics over classes and sizes, where there are labels and readable images.
    class_images = None
    if images.labels is not None:
        counts = np.bincount(np.asarray(images.labels), minlength=len(images.classes))
        class_images = (int(counts.min()), int(counts.max()))
    short_px = None
    if len(readable):
        median = int(np.median(readable_short))
        short_px = (int(readable_short.min()), median, int(readable_short.max()))

    def counted(chosen: np.ndarray) -> CountedImages:
        indices = np.flatnonzero(chosen & (short > 0))
        return _counted([image_names[index] for index in indices])

    split_check = SplitCheck(
        split=images.split,
        images=len(images),
        published=published.get(images.split),
        class_images=class_images,
        short_px=short_px,
        unreadable=unreadable,
        small=counted(short < SMALL_PX),
        long=counted(long > LONG_RATIO * short),
        single_color=counted(records["single_color"]),
        repeated=_counted(repeated),
        sha256={name: content.hex() for name, content in sampled},
        objects=images.n_objects if isinstance(images, ObjectFolder) else None,
        odd_annotations=odd,
    )
    return split_check, files


def _noted(
    folder: Path, parts: list[Part], image_names: Sequence[str]
) -> tuple[dict[str, str], dict[str, CountedImages]]:
    """Returns why images can't be read, by image, and images by what is odd in annotations."""
    unreadable: dict[str, str] = {}
    odd: dict[str, list[str]] = {}
    for part in parts:
        about = read_part(folder, part) or {}
        for index, reason in about["unreadable"].items():
            unreadable[image_names[int(index)]] = reason
        # Packing does not look at annotations.
        for index, found in about.get("odd", {}).items():
            for kind, where in found.items():
                odd.setdefault(kind, []).append(f"{image_names[int(index)]}: {where}")
    return unreadable, {kind: _counted(lines) for kind, lines in odd.items()}


def _counted(lines: Sequence[str]) -> CountedImages:
    """Returns the number of lines and the first of them."""
    return CountedImages(n=len(lines), examples=tuple(lines[:_EXAMPLES]))


def _findings(split_check: SplitCheck) -> list[str]:
    """Returns a sentence for each problem of a split."""
    split = split_check.split
    sentences = []
    if split_check.published not in (None, split_check.images):
        sentences.append(
            f"{split} has {split_check.images} images, the published set {split_check.published}"
        )
    if split_check.unreadable:
        name, reason = next(iter(split_check.unreadable.items()))
        sentences.append(
            f"{split}: {quantity(len(split_check.unreadable), 'image')} can't be read, such as "
            f"{escaped(name)}: {escaped(reason)}"
        )
    if split_check.class_images and split_check.class_images[0] == 0:
        sentences.append(f"{split}: a class has no images")
    for kind, counted in split_check.odd_annotations.items():
        images = quantity(counted.n, "image has", "images have")
        sentences.append(f"{split}: {images} {kind} ({counted})")
    # What may be intended comes last.
    kinds = (
        (split_check.repeated, "repeats", "repeat", "the bytes of an earlier one"),
        (split_check.small, "has", "have", f"a short side under {SMALL_PX} px"),
        (split_check.long, "is", "are", f"over {LONG_RATIO} times as long as wide"),
        (split_check.single_color, "has", "have", "a single color"),
    )
    for counted, verb, verb_of_several, problem in kinds:
        if counted.n:
            images = quantity(counted.n, f"image {verb}", f"images {verb_of_several}")
            sentences.append(f"{split}: {images} {problem} ({counted})")
    return sentences


def _with_types(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a check from its JSON, which has neither tuples nor `CountedImages`."""
    fields: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict) and value.keys() == {"n", "examples"}:
            value = CountedImages(n=value["n"], examples=tuple(value["examples"]))
        elif name == "odd_annotations":
            value = _with_types(value)
        fields[name] = value
    return fields
