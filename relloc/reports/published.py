"""Reads the published results that ours are compared with.

card.csv has the tables of the published card, and published.csv the published numbers. Their
sources are listed in docs/protocols.md 4.1 to 4.3. A further published row is a line of
published.csv.
"""

import csv
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from relloc.results import LAYERS, Result

CARD_GROUP = "The published card"
CARD_DATASET = "in1k"  # what all published rows were pretrained on
BEST_LAYER = "best layer"  # the column of numbers at the layer at which they are highest
KINDS = ("card", "other")
# The rows of published.csv that ours are compared with
CARD, CARD_OSS = "mmselfsup Relative-Loc", "OpenSelfSup Relative-Loc"
RANDOM, SUPERVISED = "OpenSelfSup Random", "OpenSelfSup Supervised"
PUBLISHED_MODEL = "resnet50"  # all published rows are of this backbone


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardPart:
    """The columns of a table of the card that one evaluation fills; a line of card.csv.

    Attributes:
        table: The title of the table.
        evaluation: The name of the evaluation in conf/eval, or "" where it is not built.
        kind: The kind of the evaluation's results, such as "frozen" or "fine-tuned".
        columns: The columns that it fills.
        dataset, split, images: The images of the published numbers, and how many they are.
        view: How the published numbers saw whole images.
        hours: An estimate for a ResNet-50 on one GPU, from the rates in docs/benchmarks.md, or,
            for fine-tuned classification of VOC2007, from those that docs/card.md assumes. It is
            "" where hours.csv has measured hours.
        layer_best_in: The table whose best layer is the layer of these numbers, or "" where there
            is a column for each layer or the layer is given.
        may_decode_on_device: Whether `decode=device` holds for the evaluation; "yes" in card.csv.
    """

    table: str
    evaluation: str
    kind: str
    columns: tuple[str, ...]
    dataset: str
    split: str
    images: int
    view: str
    hours: str
    layer_best_in: str
    may_decode_on_device: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published number, in percent; a line of published.csv.

    Attributes:
        kind: "card" (relative location and its controls) or "other" (other pretext tasks).
        row: The name of the row, by project and method.
        table, column: Where the card has the number.
        variant: The variant of our results that it compares with, where one name stands for two
            protocols. It is "detectron2" for detection that detectron2 trained and tested.
        evaluation: The evaluation that measures it, as conf/eval names it.
        dataset, split: The images that it was measured on.
        layer: The layer, or "" where the source names none or the whole network was trained.
        metric: The metric of our results that it compares with.
        printed: The number with its digits as published.
        tolerance: The difference, in points, up to which our number agrees with it. It is 1.0 for
            the SVM, 1.5 for linear classifiers, 0.7 for AP and 1.0 for mIoU; 2.2 for low-shot, the
            widest spread between the two published runs of this recipe; and 1.5 for nearest
            neighbors and semi-supervised rows, of which no spread is known.
        edition: Distinguishes several values of one row, such as two versions of a page.
        known_answer_of: The weights whose evaluation must give this number, "random" or
            "torchvision", or "" for none.
        source: The project and file that publish it.

    Raises:
        ValueError: A field has a value that it can't have, or card.csv lacks the column.
    """

    kind: str
    row: str
    table: str
    column: str
    variant: str
    evaluation: str
    dataset: str
    split: str
    layer: str
    metric: str
    printed: str
    tolerance: float
    edition: str
    known_answer_of: str
    source: str

    def __post_init__(self) -> None:
        # A misspelt cell of the CSV file is found here, and not as a wrong table
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, not one of {', '.join(KINDS)}")
        if self.layer not in ("", *LAYERS):
            raise ValueError(
                f"layer is {self.layer!r}, neither empty nor one of {', '.join(LAYERS)}"
            )
        if not (0 < self.value < 100 and 0 < self.tolerance < 10):
            raise ValueError(
                f"{self.printed} ± {self.tolerance} is no number in percent "
                "with a tolerance in points"
            )
        part = part_with(self.table, self.column)
        if (self.dataset, self.split) != (part.dataset, part.split):
            raise ValueError(
                f"dataset and split are {self.dataset} and {self.split}, but card.csv has "
                f"{part.dataset} and {part.split} for the column {self.column!r} of the table "
                f"{self.table!r}"
            )

    @property
    def value(self) -> float:
        """The number in percent."""
        return float(self.printed)


def _lines(name: str) -> Iterable[dict[str, str]]:
    """Returns the lines of a CSV file beside this module."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return csv.DictReader(text.splitlines())


@functools.cache
def card_parts() -> tuple[CardPart, ...]:
    """Returns the parts of the card, in the order of its tables."""
    # Both files are read once: reports ask for them for each of their numbers
    parts = []
    for line in _lines("card.csv"):
        # All other fields are texts
        typed: dict[str, Any] = dict(line)
        typed["columns"] = tuple(line["columns"].split("|"))
        typed["images"] = int(line["images"])
        typed["may_decode_on_device"] = line["may_decode_on_device"] == "yes"
        parts.append(CardPart(**typed))
    return tuple(parts)


@functools.cache
def published_numbers() -> tuple[Published, ...]:
    """Returns all published numbers, in the order of published.csv."""
    numbers = []
    for line in _lines("published.csv"):
        typed: dict[str, Any] = dict(line)
        typed["tolerance"] = float(line["tolerance"])
        numbers.append(Published(**typed))
    return tuple(numbers)


def parts_of(table: str) -> list[CardPart]:
    """Returns the parts of a table, none if the card does not have it."""
    return [part for part in card_parts() if part.table == table]


def part_with(table: str, column: str) -> CardPart:
    """Returns the part of the card that a column of a table belongs to.

    Raises:
        ValueError: card.csv has no such table or column.
    """
    for part in parts_of(table):
        if column in part.columns:
            return part
    raise ValueError(
        f"card.csv has no column {column!r} of a table {table!r}: correct the spelling in "
        "published.csv, or add the column to card.csv first"
    )


def published_variant(row: Result) -> str:
    """Returns the variant of the published numbers that one of ours compares with, mostly "".

    It is the variant of the row where that names a published protocol, and not only a choice or a
    layer of ours.
    """
    for number in published_numbers():
        if (number.table, number.variant) == (row.table, row.variant):
            return row.variant
    return ""


def is_on_card(row: Result) -> bool:
    """Returns whether a number of ours was measured on the images of its table of the card.

    Images are recognized by data set, split and number, so that a subset is not compared with the
    published numbers.
    """
    measured = (row.dataset, row.split, row.n)
    published = [(part.dataset, part.split, part.images) for part in parts_of(row.table)]
    return measured in published


def concerns_card(row: Result) -> bool:
    """Returns whether one of our numbers is a reason to look at the published card.

    It was measured by one of the card's evaluations, on any images, or on the images of a table of
    the card; or it is of a pretraining of the card's model on the card's images.
    """
    if row.kind == "pretext":
        return (row.model, row.dataset) == (PUBLISHED_MODEL, CARD_DATASET)
    evaluations = [part.evaluation for part in card_parts()]
    return row.eval in evaluations or is_on_card(row)


def foreign_view(row: Result) -> str:
    """Returns how a number on the card saw its images if that is not as published, else ""."""
    if not is_on_card(row):
        return ""
    # All parts of a table have one view
    published = parts_of(row.table)[0].view
    return row.view if row.view != published else ""


def accepted(numbers: Sequence[Published]) -> tuple[float, float]:
    """Returns the lowest and the highest number that agree with at least one of `numbers`.

    Numbers between several editions of one row agree as well.
    """
    low = min(number.value - number.tolerance for number in numbers)
    high = max(number.value + number.tolerance for number in numbers)
    return low, high
