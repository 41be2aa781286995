"""The published card: its tables (card.csv), and the published numbers (published.csv; protocols.md 4.1 to 4.3)."""

import csv
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from relloc.results import LAYERS, Result

CARD_GROUP = "The published card"
BEST_LAYER = "best layer"  # the column of numbers at the layer at which they are highest
KINDS = ("card", "other")
CARD, CARD_OSS = "mmselfsup Relative-Loc", "OpenSelfSup Relative-Loc"
RANDOM, SUPERVISED = "OpenSelfSup Random", "OpenSelfSup Supervised"
PUBLISHED_MODEL = "resnet50"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardPart:
    """What one evaluation fills of a table of the card.

    `evaluation` is its name in conf/eval, "" where it is not built; `kind` is that of its results. `view` is the
    published one, and `images` the number of images that the published numbers are of. `hours` is an estimate for a
    ResNet-50 on one GPU, from the rates in docs/benchmarks.md. `layer_best_in` is the table whose best layer is the
    layer of these numbers; "" where they have columns for layers, or the layer is given.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published number, in percent; `printed` has its digits as published.

    `kind` is "card" (relative location and its controls) or "other" (other pretext tasks). `layer`
    is "" where the source names none, or the whole network was trained. `edition` tells several
    values of one row apart. `tolerance` is the difference, in points, up to which a number of ours
    agrees with it: 1.0 for the SVM, 1.5 for linear classifiers, 0.7 for AP, 1.0 for mIoU; 2.2 for
    low-shot, the widest spread between the two published runs of this recipe; and 1.5 for nearest
    neighbors and semi-supervised rows, of which no spread is known. `known_answer_of` names the weights whose
    evaluation must give this number, "random" or "torchvision"; "" for none.
    """

    kind: str
    row: str
    table: str
    column: str
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
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, not one of {', '.join(KINDS)}")
        if self.layer not in ("", *LAYERS):
            raise ValueError(
                f"layer is {self.layer!r}, neither empty nor one of {', '.join(LAYERS)}"
            )
        if not (0 < self.value < 100 and 0 < self.tolerance < 10):
            raise ValueError(
                f"{self.printed} ± {self.tolerance} is no number in percent with a tolerance in points"
            )

    @property
    def value(self) -> float:
        return float(self.printed)


def _lines(name: str) -> Iterable[dict[str, str]]:
    return csv.DictReader(Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines())


@functools.cache
def card_parts() -> tuple[CardPart, ...]:
    """The parts of the card, in the order of its tables."""
    parts = []
    for line in _lines("card.csv"):
        typed: dict[str, Any] = dict(line)
        typed["columns"] = tuple(line["columns"].split("|"))
        typed["images"] = int(line["images"])
        parts.append(CardPart(**typed))
    return tuple(parts)


@functools.cache
def published_numbers() -> tuple[Published, ...]:
    """All published numbers, in the order of the file."""
    return tuple(
        Published(**line | {"tolerance": float(line["tolerance"])})  # type: ignore[arg-type]
        for line in _lines("published.csv")
    )


def parts_of(table: str) -> list[CardPart]:
    """The parts of a table; none if the card does not have it."""
    return [part for part in card_parts() if part.table == table]


def is_on_card(row: Result) -> bool:
    """Whether a number stands in a table of the card, of as many images as the published ones, named so."""
    measured = (row.dataset, row.split, row.n)
    return any(measured == (part.dataset, part.split, part.images) for part in parts_of(row.table))


def foreign_view(row: Result) -> str:
    """The view of a number on the card if it is known and not the published one, else ""."""
    return row.view if is_on_card(row) and row.view != parts_of(row.table)[0].view else ""


def accepted(numbers: Sequence[Published]) -> tuple[float, float]:
    """From where to where a number agrees with `numbers`, at least one: with any, or between them."""
    return min(each.value - each.tolerance for each in numbers), max(
        each.value + each.tolerance for each in numbers
    )
