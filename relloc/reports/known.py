"""Known answers: what random and supervised weights must give, as a check of the evaluations themselves."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

from relloc.reports.groups import foreign_view, is_card
from relloc.reports.published import (
    PUBLISHED_IMAGES,
    PUBLISHED_MODEL,
    RANDOM,
    SUPERVISED,
    Published,
    published_numbers,
)
from relloc.results import Result

AVGPOOL_TOLERANCE = 1.0
# What torchvision reports of these weights, rounded: also the feature5 row of protocols.md 4.2 is 76.17
SUPERVISED_TOP1 = 76.2
_FROM_ROWS = {
    "random": (RANDOM, ("linear_in1k", "linear_avgpool", "linear_places205", "voc07_svm", "voc07_low_shot")),
    "torchvision": (SUPERVISED, ("voc07_svm", "voc07_low_shot")),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownAnswer:
    """A number that is known beforehand: between `low` and `high` percent, give or take `tolerance` points."""

    checkpoint: str
    evaluation: str
    dataset: str
    split: str
    layer: str
    metric: str
    low: float
    high: float
    tolerance: float
    source: str

    @property
    def what(self) -> str:
        return f"{self.checkpoint} {self.evaluation} {self.layer} {self.metric} on {self.dataset} {self.split}"

    def is_named_like(self, row: Result) -> bool:
        """Whether `row` is this number of the same weights, on whatever images in whatever view."""
        subject = (row.checkpoint, row.model, row.batch_norm) == (self.checkpoint, PUBLISHED_MODEL, "as_trained")
        same = (row.eval, row.metric) == (self.evaluation, self.metric)
        return subject and same and (row.layer == self.layer or self.metric == "map_best")

    def is_about(self, row: Result) -> bool:
        """Whether `row` is a measurement of this, by the published protocol on the published images."""
        images = (row.dataset, row.split) == (self.dataset, self.split)
        return self.is_named_like(row) and images and is_card(row) and not foreign_view(row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A measured number against a known answer; `expected` is (lowest, highest), the same for one value."""

    what: str
    value: float
    expected: tuple[float, float]
    tolerance: float
    source: str

    @property
    def passed(self) -> bool:
        low, high = self.expected
        rounding = 1e-9
        return low - self.tolerance - rounding <= self.value <= high + self.tolerance + rounding

    def __str__(self) -> str:
        low, high = self.expected
        span = f"{low:g}" if math.isclose(low, high) else f"{low:g} to {high:g}"
        word = "pass" if self.passed else "FAIL"
        return f"{word}  {self.what}: {self.value:.2f}, expected {span} ± {self.tolerance:g} ({self.source})"


def known_answers() -> list[KnownAnswer]:
    """All known answers.

    Random and supervised rows are the published controls (protocols.md 4.2), each number give or
    take its tolerance in published.csv. Supervised ResNet-50 under average pooling is accepted from
    74.12, the published row by this very protocol, to 76.2, its accuracy with the classifier it was
    trained with, and 1.0 points on both sides.
    """
    return [*_published_answers(), _supervised_avgpool()]


def _published_answers() -> Iterator[KnownAnswer]:
    for checkpoint, (name, evaluations) in _FROM_ROWS.items():
        for number in published_numbers():
            if number.row == name and number.evaluation in evaluations:
                yield _answer(number, checkpoint)


def _answer(number: Published, checkpoint: str, **changes: float | str) -> KnownAnswer:
    answer = KnownAnswer(
        checkpoint=checkpoint,
        evaluation=number.evaluation,
        dataset=number.dataset,
        split=number.split,
        layer=number.layer,
        metric=number.metric,
        low=number.value,
        high=number.value,
        tolerance=number.tolerance,
        source=number.source,
    )
    return dataclasses.replace(answer, **changes)  # type: ignore[arg-type]


def _supervised_avgpool() -> KnownAnswer:
    published = next(
        each for each in published_numbers() if (each.row, each.evaluation) == (SUPERVISED, "linear_avgpool")
    )
    return _answer(published, "torchvision", metric="top1", high=SUPERVISED_TOP1, tolerance=AVGPOOL_TOLERANCE)


def asked(
    subjects: Iterable[tuple[str, str]], evaluations: Collection[str], batch_norms: Collection[str]
) -> list[KnownAnswer]:
    """The known answers that evaluations of (checkpoint, model) give on the published images, before any is run."""
    if "as_trained" not in batch_norms:
        return []
    who = {checkpoint for checkpoint, model in subjects if model == PUBLISHED_MODEL}
    return [answer for answer in known_answers() if answer.checkpoint in who and answer.evaluation in evaluations]


def check(rows: Sequence[Result], answers: Sequence[KnownAnswer]) -> list[Verdict]:
    """A verdict on each of the answers that `rows` measure; of several measurements the last counts.

    Low-shot numbers are those at the published row's layer. Rows on other images than the
    published ones, of another model or with recalibrated batch norm say nothing.
    """
    verdicts = []
    for answer in answers:
        measured = [row.value for row in rows if answer.is_about(row)]
        if measured:
            verdicts.append(
                Verdict(
                    what=answer.what,
                    value=measured[-1],
                    expected=(answer.low, answer.high),
                    tolerance=answer.tolerance,
                    source=answer.source,
                )
            )
    return verdicts


def unchecked(rows: Sequence[Result], answers: Sequence[KnownAnswer]) -> list[str]:
    """Those of the answers that `rows` say nothing about, and why, in words."""
    return [
        f"{answer.what}: {_why_unchecked(answer, rows)}"
        for answer in answers
        if not any(answer.is_about(row) for row in rows)
    ]


def _why_unchecked(answer: KnownAnswer, rows: Sequence[Result]) -> str:
    row = next((row for row in reversed(rows) if answer.is_named_like(row)), None)
    if row is None:
        return "no such number was measured"
    if (row.dataset, row.split) != (answer.dataset, answer.split):
        return f"measured on {row.dataset} {row.split}"
    if not is_card(row):
        published = PUBLISHED_IMAGES[answer.dataset, answer.split]
        return f"measured on {row.n:,} images, where {published:,} are published"
    return f"measured in another view, {foreign_view(row)}"
