"""Checking a data set: what can't be read, what looks wrong, what is there twice."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relloc.data.image_set import ROLES, ImageSet, Splits
from relloc.data.images import ImageFile
from relloc.data.listing import first_names
from relloc.data.parts import (
    FACTS,
    Span,
    about_part,
    fill_facts,
    names,
    original,
    records_of,
    save_part,
    spans,
)
from relloc.data.processes import Progress, Tick, work_through
from relloc.errors import UnreadableImage
from relloc.terminal import escaped

SMALL_PX = 64
LONG_RATIO = 5
_EXAMPLES = 5
_HASHED = 16
_IMAGES_PER_PART = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """How many images something holds for, and the first of them."""

    n: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return first_names(self.examples) + (", …" if self.n > len(self.examples) else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """What was found in one split.

    `small` images have a short side under 64 px, `long` ones a long side over 5 times the short
    one. `repeated` are those whose file has the same bytes as an earlier one. `class_images` are
    the fewest and the most images of a class, `short_px` the least, the median and the greatest
    short side. `sha256` are the hashes of a few files, evenly spread.
    """

    split: str
    images: int
    published: int | None
    class_images: tuple[int, int] | None
    short_px: tuple[int, int, int] | None
    unreadable: dict[str, str]
    small: Found
    long: Found
    single_color: Found
    repeated: Found
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What was found in a data set; `leaked` are held-out images whose file is also in the training split."""

    name: str
    train: SplitCheck
    held_out: SplitCheck
    leaked: Found

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Check":
        """The check that `as_json` wrote."""
        splits = {role: SplitCheck(**_with_types(content[role])) for role in ROLES}
        return Check(**{**_with_types(content), **splits})

    def findings(self) -> list[str]:
        """A sentence for each thing to look at, the gravest first."""
        told = []
        if self.leaked.n:
            told.append(
                f"LEAK: {self.leaked.n} images of {self.held_out.split} are also in {self.train.split}, with the same "
                f"bytes ({self.leaked}): results on {self.held_out.split} would be too good"
            )
        return told + [line for split in (self.train, self.held_out) for line in _findings(split)]


def check(
    data: Splits, *, published: Mapping[str, int] | None, workers: int, progress: Progress
) -> Check:
    """Read every image of both splits once, in `workers` processes.

    `published` gives the official number of images by the name of the split.
    """
    jobs = spans(data, _IMAGES_PER_PART)
    total = len(data.train) + len(data.held_out)
    with tempfile.TemporaryDirectory(prefix="relloc_check_") as folder:
        work = functools.partial(_examine, data, Path(folder))
        work_through(work, jobs, workers=workers, total=total, done=0, progress=progress)
        return summary(data, Path(folder), jobs, published)


def summary(
    data: Splits, folder: Path, parts: Sequence[Span], published: Mapping[str, int] | None
) -> Check:
    """The check of a data set, all parts of which are finished in `folder`."""
    of_role = {role: [span for span in parts if span.role == role] for role in ROLES}
    train, trained_on = _split_check(data.train, folder, of_role["train"], published or {})
    held_out, files = _split_check(data.held_out, folder, of_role["held_out"], published or {})
    first_of = {content: name for name, content in reversed(trained_on)}
    leaks = [f"{name} = {first_of[content]}" for name, content in files if content in first_of]
    return Check(name=data.train.name, train=train, held_out=held_out, leaked=_found(leaks))


def examine(
    images: ImageSet,
    span: Span,
    kind: np.dtype,
    tick: Tick,
    store: Callable[[np.void, int, ImageFile], None] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Records of the images of a part, of the type `kind`, and why the images can't be read whose records are zeros.

    `store(record, index, file)` is called of each image before its facts are recorded, and may call it unreadable.
    """
    records = np.zeros(len(span), kind)
    unreadable: dict[int, str] = {}
    for record, index in zip(records, range(span.start, span.stop), strict=True):
        try:
            file = original(images, index)
            if store:
                store(record, index, file)
            fill_facts(record, file)
        except UnreadableImage as error:
            unreadable[index] = str(error)
        tick()
    return records, unreadable


def _examine(data: Splits, folder: Path, span: Span, tick: Tick) -> None:
    records, unreadable = examine(data.of(span.role), span, FACTS, tick)
    save_part(folder, span, records, {"unreadable": unreadable})


def _split_check(
    images: ImageSet, folder: Path, parts: list[Span], published: Mapping[str, int]
) -> tuple[SplitCheck, list[tuple[str, bytes]]]:
    """What was found in a split, and the names and hashes of its files that can be read."""
    called, records = names(images), records_of(folder, parts)
    short, long = np.sort([records["height"], records["width"]], axis=0)
    readable = np.flatnonzero(short)
    sides = short[readable]
    counts = (
        None
        if images.labels is None
        else np.bincount(np.asarray(images.labels), minlength=len(images.classes))
    )
    hashes = records["sha256"][readable]
    files = [
        (called[index], content.tobytes()) for index, content in zip(readable, hashes, strict=True)
    ]
    sampled = files[:: max(1, -(-len(files) // _HASHED))]
    first_of: dict[bytes, str] = {}
    repeated = []
    for name, content in files:
        if content in first_of:
            repeated.append(f"{name} = {first_of[content]}")
        first_of.setdefault(content, name)

    unreadable: dict[str, str] = {}
    for span in parts:
        reasons = (about_part(folder, span) or {})["unreadable"]
        unreadable |= {called[int(index)]: reason for index, reason in reasons.items()}

    def those(chosen: np.ndarray) -> Found:
        return _found([called[index] for index in np.flatnonzero(chosen & (short > 0))])

    found = SplitCheck(
        split=images.split,
        images=len(images),
        published=published.get(images.split),
        class_images=None if counts is None else (int(counts.min()), int(counts.max())),
        short_px=(int(sides.min()), int(np.median(sides)), int(sides.max()))
        if len(sides)
        else None,
        unreadable=unreadable,
        small=those(short < SMALL_PX),
        long=those(long > LONG_RATIO * short),
        single_color=those(records["single_color"]),
        repeated=_found(repeated),
        sha256={name: content.hex() for name, content in sampled},
    )
    return found, files


def _found(lines: Sequence[str]) -> Found:
    return Found(n=len(lines), examples=tuple(lines[:_EXAMPLES]))


def _findings(split: SplitCheck) -> list[str]:
    where, told = split.split, []
    if split.published not in (None, split.images):
        told.append(f"{where} has {split.images} images, the published set {split.published}")
    if split.unreadable:
        name, reason = next(iter(split.unreadable.items()))
        told.append(
            f"{where}: {len(split.unreadable)} images can't be read, such as {escaped(name)}: {escaped(reason)}"
        )
    if split.class_images and split.class_images[0] == 0:
        told.append(f"{where}: a class has no images")
    kinds = (
        (split.repeated, "repeat the bytes of an earlier one"),
        (split.small, f"have a short side under {SMALL_PX} px"),
        (split.long, f"are over {LONG_RATIO} times as long as wide"),
        (split.single_color, "have a single color"),
    )
    return told + [
        f"{where}: {found.n} images {what} ({found})" for found, what in kinds if found.n
    ]


def _with_types(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a check as they were before they became JSON, which has no tuples."""
    fields: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict) and value.keys() == {"n", "examples"}:
            value = Found(n=value["n"], examples=tuple(value["examples"]))
        fields[name] = value
    return fields
