"""Known answers: what random and supervised weights must give, as a check of the evaluations themselves."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from relloc.reports.published import (
    BEST_LAYER,
    PUBLISHED_MODEL,
    SUPERVISED,
    Published,
    foreign_view,
    is_on_card,
    parts_of,
    published_numbers,
)
from relloc.results import Result

AVGPOOL_TOLERANCE = 1.0
# What torchvision reports of these weights, rounded: also the feature5 row of protocols.md 4.2 is 76.17
SUPERVISED_TOP1 = 76.2
_NOT_MEASURED = "no such number was measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownAnswer:
    """A number that is known beforehand: between that of `published` and `high` percent, give or take `tolerance`.

    `metric` is the published one, or another of the same column.
    """

    published: Published
    metric: str
    high: float
    tolerance: float

    @property
    def what(self) -> str:
        number = self.published
        named = (number.known_answer_of, number.evaluation, number.layer, self.metric)
        return f"{' '.join(named)} on {number.dataset} {number.split}"

    def objection(self, row: Result) -> str:
        """Why `row` does not measure this by the published protocol on the published images; "" where it does."""
        number = self.published
        asked = (
            number.known_answer_of,
            PUBLISHED_MODEL,
            "as_trained",
            number.table,
            number.column,
            self.metric,
        )
        found = (row.checkpoint, row.model, row.batch_norm, row.table, row.column, row.metric)
        if found != asked or (row.layer != number.layer and row.column != BEST_LAYER):
            return _NOT_MEASURED
        if (row.dataset, row.split) != (number.dataset, number.split):
            return f"measured on {row.dataset} {row.split}"
        if not is_on_card(row):
            return f"measured on {row.n:,} images, where {parts_of(number.table)[0].images:,} are published"
        view = foreign_view(row)
        return f"measured in another view, {view}" if view else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A measured number against a known answer."""

    answer: KnownAnswer
    value: float

    @property
    def passed(self) -> bool:
        answer, rounding = self.answer, 1e-9
        room = answer.tolerance + rounding
        return answer.published.value - room <= self.value <= answer.high + room

    def __str__(self) -> str:
        answer = self.answer
        low, high = answer.published.value, answer.high
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return (
            f"{'pass' if self.passed else 'FAIL'}  {answer.what}: {self.value:.2f}, expected {span} ± "
            f"{answer.tolerance:g} ({answer.published.source})"
        )


def known_answers() -> list[KnownAnswer]:
    """All known answers.

    Random and supervised rows are the published controls (protocols.md 4.2), each number give or
    take its tolerance in published.csv. Supervised ResNet-50 under average pooling is accepted from
    74.12, the published row by this very protocol, to 76.2, its accuracy with the classifier it was
    trained with, and 1.0 points on both sides.
    """
    answers = []
    for number in published_numbers():
        metric, high, tolerance = number.metric, number.value, number.tolerance
        if (number.row, number.column) == (SUPERVISED, "avgpool"):
            metric, high, tolerance = "top1", SUPERVISED_TOP1, AVGPOOL_TOLERANCE
        if number.known_answer_of:
            answers.append(
                KnownAnswer(published=number, metric=metric, high=high, tolerance=tolerance)
            )
    return answers


def asked(
    subjects: Iterable[tuple[str, str]], evaluations: Collection[str], batch_norms: Collection[str]
) -> list[KnownAnswer]:
    """The known answers that evaluations of (checkpoint, model) give on the published images, before any is run."""
    if "as_trained" not in batch_norms:
        return []
    who = {checkpoint for checkpoint, model in subjects if model == PUBLISHED_MODEL}
    return [
        answer
        for answer in known_answers()
        if answer.published.known_answer_of in who and answer.published.evaluation in evaluations
    ]


def check(rows: Sequence[Result], answers: Sequence[KnownAnswer]) -> list[Verdict]:
    """A verdict on each of the answers that `rows` measure; of several measurements the last counts.

    Low-shot numbers are those at the published row's layer. Rows on other images than the
    published ones, of another model or with recalibrated batch norm say nothing.
    """
    verdicts = []
    for answer in answers:
        measured = [row.value for row in rows if not answer.objection(row)]
        if measured:
            verdicts.append(Verdict(answer=answer, value=measured[-1]))
    return verdicts


def unchecked(rows: Sequence[Result], answers: Sequence[KnownAnswer]) -> list[str]:
    """Those of the answers that `rows` say nothing about, and why, in words."""
    told = []
    for answer in answers:
        objections = [answer.objection(row) for row in rows]
        if "" not in objections:
            closest = [objection for objection in objections if objection != _NOT_MEASURED]
            told.append(f"{answer.what}: {closest[-1] if closest else _NOT_MEASURED}")
    return told
