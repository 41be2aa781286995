"""The published numbers of published.csv: the card, its controls, and other pretext tasks (protocols.md 4.1 to 4.3)."""

import csv
import dataclasses
import functools
import importlib.resources
from collections.abc import Iterable

from relloc.results import LAYERS

KINDS = ("card", "other")
CARD, CARD_OSS = "mmselfsup Relative-Loc", "OpenSelfSup Relative-Loc"
RANDOM, SUPERVISED = "OpenSelfSup Random", "OpenSelfSup Supervised"
PUBLISHED_MODEL = "resnet50"
# Images that the published numbers are of, by data set and split (protocols.md 3)
PUBLISHED_IMAGES = {
    ("in1k", "val"): 50_000,
    ("voc2007", "test"): 4_952,
    ("places205", "val"): 20_500,
    ("inat18", "val"): 24_426,
    ("coco2017", "val"): 5_000,
    ("voc2012", "val"): 1_449,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published number, in percent; `printed` has its digits as published.

    `kind` is "card" (relative location and its controls) or "other" (other pretext tasks). `layer`
    is "" where the source names none, or the whole network was trained. `edition` tells several
    values of one row apart. `tolerance` is the difference, in points, up to which a number of ours
    agrees with it: 1.0 for the SVM, 1.5 for linear classifiers, 0.7 for AP, 1.0 for mIoU; 2.2 for
    low-shot, the widest spread between the two published runs of this recipe; and 1.5 for nearest
    neighbors and semi-supervised rows, of which no spread is known.
    """

    kind: str
    row: str
    evaluation: str
    dataset: str
    split: str
    layer: str
    metric: str
    printed: str
    tolerance: float
    edition: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, not one of {', '.join(KINDS)}")
        if self.layer not in ("", *LAYERS):
            raise ValueError(f"layer is {self.layer!r}, neither empty nor one of {', '.join(LAYERS)}")
        if not (0 < self.value < 100 and 0 < self.tolerance < 10):
            raise ValueError(f"{self.printed} ± {self.tolerance} is no number in percent with a tolerance in points")

    @property
    def value(self) -> float:
        return float(self.printed)


@functools.cache
def published_numbers() -> tuple[Published, ...]:
    """All published numbers, in the order of the file."""
    text = importlib.resources.files("relloc.reports").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_number(line) for line in csv.DictReader(text.splitlines()))


def _number(line: dict[str, str]) -> Published:
    texts = {name: text for name, text in line.items() if name not in ("value", "tolerance")}
    return Published(**texts, printed=line["value"], tolerance=float(line["tolerance"]))


def accepted(numbers: Iterable[Published]) -> tuple[float, float]:
    """From where to where a number agrees with `numbers`, at least one: with any, or between them."""
    numbers = tuple(numbers)
    return min(each.value - each.tolerance for each in numbers), max(each.value + each.tolerance for each in numbers)
