"""Checks a data set: images that can't be read, look wrong, are repeated, or are in both splits."""

import dataclasses
import functools
import math
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
        # Only the first few have been kept.
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
        fields = _with_types(content)
        for role in ROLES:
            fields_of_split = _with_types(content[role])
            fields[role] = SplitCheck(**fields_of_split)
        return Check(**fields)

    def findings(self) -> list[str]:
        """Returns a sentence for each problem, the most serious first."""
        sentences = []
        if self.leaked.n:
            train = self.train.split
            held_out = self.held_out.split
            images = quantity(
                self.leaked.n,
                f"image of {held_out} is",
                f"images of {held_out} are",
            )
            sentences.append(
                f"LEAK: {images} also in {train}, with the same bytes ({self.leaked}): "
                f"results on {held_out} would be too good"
            )
        sentences += _findings(self.train)
        sentences += _findings(self.held_out)
        return sentences


def check(
    data: Splits,
    *,
    workers: int,
    progress: Progress,
) -> Check:
    """Reads every image of both splits once, in `workers` processes, and returns the result."""
    parts = divide_into_parts(data, _IMAGES_PER_PART)
    total = len(data.train) + len(data.held_out)
    # Processes hand over their records in files, which nobody needs after the summary.
    with tempfile.TemporaryDirectory(prefix="relloc_check_") as name:
        folder = Path(name)
        work = functools.partial(_examine, data, folder)
        work_through(
            work,
            parts,
            workers=workers,
            total=total,
            done=0,
            progress=progress,
        )
        return summary(data, folder, parts)


def summary(
    data: Splits,
    folder: Path,
    parts: Sequence[Part],
) -> Check:
    """Returns the check of a data set all of whose parts are finished in `folder`."""
    counts = data.published_images
    train_parts = [part for part in parts if part.role == "train"]
    held_out_parts = [part for part in parts if part.role == "held_out"]
    # Files are compared by their hashes: the images are not read again.
    train, train_files = _split_check(data.train, folder, train_parts, counts)
    held_out, held_out_files = _split_check(data.held_out, folder, held_out_parts, counts)
    # The first of several equal training files is named.
    train_name_of: dict[bytes, str] = {}
    for name, content in train_files:
        train_name_of.setdefault(content, name)
    leaks = []
    for name, content in held_out_files:
        if content in train_name_of:
            leaks.append(f"{name} = {train_name_of[content]}")
    return Check(
        name=data.train.name,
        train=train,
        held_out=held_out,
        leaked=_counted(leaks),
    )


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
    # A record of zeros has height 0, which says that the image can't be read.
    records = np.zeros(len(part), kind)
    unreadable: dict[int, str] = {}
    indices = range(part.start, part.stop)
    for record, index in zip(records, indices, strict=True):
        try:
            file = original(images, index)
            if store:
                store(record, index, file)
            # Afterwards, as `store` may still refuse the image.
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
        if not isinstance(images, CheckedAnnotations):
            return
        # Annotations are compared with the size of the image, which is known only now.
        found = images.check_annotation(index, file.rgb.height, file.rgb.width)
        if found:
            odd[index] = found

    records, unreadable = examine(images, part, FACTS, tick, check_annotation)
    about = {"unreadable": unreadable, "odd": odd}
    save_part(folder, part, records, about)


def _split_check(
    images: ImageSet,
    folder: Path,
    parts: list[Part],
    published: Mapping[str, int],
) -> tuple[SplitCheck, list[tuple[str, bytes]]]:
    """Returns the check of a split, and the names and hashes of its readable files."""
    image_names = names(images)
    records = records_of(folder, parts)
    # Which side is the height does not matter here.
    sides = [records["height"], records["width"]]
    short, long = np.sort(sides, axis=0)
    # Sides are 0 where the image can't be read.
    readable = np.flatnonzero(short)
    readable_short = short[readable]

    # Hashes of files: evenly spaced ones are kept, equal ones are repetitions.
    hashes = records["sha256"][readable]
    files: list[tuple[str, bytes]] = []
    for index, content in zip(readable, hashes, strict=True):
        name = image_names[index]
        files.append((name, content.tobytes()))
    # Rounded up, so that at most _HASHED of them are kept.
    sampling_step = math.ceil(len(files) / _HASHED)
    sampled = files[:: max(1, sampling_step)]
    repeated = _repeated(files)

    # What the processes that read the images have noted beside the records
    unreadable, odd = _noted(folder, parts, image_names)

    # Statistics over classes and sizes, where there are labels and readable images.
    class_images = None
    if images.labels is not None:
        labels = np.asarray(images.labels)
        # Classes without images count as well, with zero.
        counts = np.bincount(labels, minlength=len(images.classes))
        class_images = (int(counts.min()), int(counts.max()))
    short_px = None
    if len(readable):
        smallest = int(readable_short.min())
        median = int(np.median(readable_short))
        largest = int(readable_short.max())
        short_px = (smallest, median, largest)

    # Unreadable images have no size, and are counted as unreadable only.
    def counted(chosen: np.ndarray) -> CountedImages:
        indices = np.flatnonzero(chosen & (short > 0))
        chosen_names = [image_names[index] for index in indices]
        return _counted(chosen_names)

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


def _repeated(files: Sequence[tuple[str, bytes]]) -> list[str]:
    """Returns a text NAME = EARLIER NAME for each file with the bytes of an earlier one.

    `files` are pairs of a name and the hash of the content.
    """
    first_name_of: dict[bytes, str] = {}
    repeated = []
    for name, content in files:
        if content in first_name_of:
            repeated.append(f"{name} = {first_name_of[content]}")
        else:
            first_name_of[content] = name
    return repeated


def _noted(
    folder: Path,
    parts: list[Part],
    image_names: Sequence[str],
) -> tuple[dict[str, str], dict[str, CountedImages]]:
    """Returns why images can't be read, by image, and images by what is odd in annotations."""
    unreadable: dict[str, str] = {}
    odd: dict[str, list[str]] = {}
    for part in parts:
        about = read_part(folder, part) or {}
        # JSON has turned the numbers of images into texts.
        for index, reason in about["unreadable"].items():
            name = image_names[int(index)]
            unreadable[name] = reason
        # Packing does not look at annotations.
        for index, found in about.get("odd", {}).items():
            name = image_names[int(index)]
            for kind, where in found.items():
                lines = odd.setdefault(kind, [])
                lines.append(f"{name}: {where}")
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
    unreadable = split_check.unreadable
    if unreadable:
        images = quantity(len(unreadable), "image")
        # One reason is enough: most often all have the same.
        name, reason = next(iter(unreadable.items()))
        sentences.append(
            f"{split}: {images} can't be read, such as {escaped(name)}: {escaped(reason)}"
        )
    # Only labeled images have classes.
    if split_check.class_images:
        fewest, _ = split_check.class_images
        if fewest == 0:
            sentences.append(f"{split}: a class has no images")
    # Boxes outside of the image and the like, by the words of the check of annotations
    for kind, counted in split_check.odd_annotations.items():
        images = quantity(counted.n, "image has", "images have")
        sentences.append(f"{split}: {images} {kind} ({counted})")
    # What may be intended comes last: small images, or one color, are no mistake of a data set.
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
    # JSON has lists where the fields are tuples.
    fields: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict) and value.keys() == {"n", "examples"}:
            # A dict with these two keys is what dataclasses.asdict made of a `CountedImages`.
            examples = tuple(value["examples"])
            value = CountedImages(n=value["n"], examples=examples)
        elif name == "odd_annotations":
            value = _with_types(value)
        fields[name] = value
    return fields
