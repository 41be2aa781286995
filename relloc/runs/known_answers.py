"""Checks evaluations against known answers: published numbers of random and supervised weights.

These weights are the same for everyone, so an evaluation that follows the published protocol must
give the published numbers. `python -m relloc.evaluate verdict=true` compares them.
"""

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

AVGPOOL_TOLERANCE = 1.0  # percentage points
# Top-1 accuracy (%) that torchvision reports of its supervised weights, rounded. The feature5 row
# of docs/protocols.md 4.2 agrees with 76.17.
SUPERVISED_TOP1 = 76.2
_NOT_MEASURED = "no such number was measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownAnswer:
    """A number that is known before it is measured.

    Args:
        published: the published number (%), which is the least that is expected.
        metric: the published metric, or another one of the same column.
        high: the most that is expected (%).
        tolerance: percentage points by which a number may lie outside.
    """

    published: Published
    metric: str
    high: float
    tolerance: float

    @property
    def what(self) -> str:
        """The weights, evaluation, layer, metric and images that the number is of."""
        number = self.published
        words = (number.known_answer_of, number.evaluation, number.layer, self.metric)
        return f"{' '.join(words)} on {number.dataset} {number.split}"

    def objection(self, row: Result) -> str:
        """Returns why `row` can't be compared with this answer, or "" if it can.

        It can if it was measured by the published protocol on the published images.
        """
        number = self.published
        expected = (
            number.known_answer_of,
            PUBLISHED_MODEL,
            "as_trained",
            number.table,
            number.column,
            self.metric,
        )
        actual = (row.checkpoint, row.model, row.batch_norm, row.table, row.column, row.metric)
        # The best layer is a column of its own; which one it is does not matter.
        is_same_layer = row.layer == number.layer or row.column == BEST_LAYER
        if actual != expected or not is_same_layer:
            return _NOT_MEASURED
        # From here on the row is of the right number, measured in another way.
        if (row.dataset, row.split) != (number.dataset, number.split):
            return f"measured on {row.dataset} {row.split}"
        if not is_on_card(row):
            n_published = parts_of(number.table)[0].images
            return f"measured on {row.n:,} images, where {n_published:,} are published"
        view = foreign_view(row)
        if view:
            return f"measured in another view, {view}"
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A measured number (%) beside the known answer."""

    answer: KnownAnswer
    value: float

    @property
    def passed(self) -> bool:
        """True if the number is within its tolerance, borders included."""
        answer = self.answer
        # A number on the border passes, whatever floating point makes of the sum.
        rounding = 1e-9
        margin = answer.tolerance + rounding
        return answer.published.value - margin <= self.value <= answer.high + margin

    def __str__(self) -> str:
        answer = self.answer
        low = answer.published.value
        high = answer.high
        expected = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{verdict}  {answer.what}: {self.value:.2f}, expected {expected} ± "
            f"{answer.tolerance:g} ({answer.published.source})"
        )


def known_answers() -> list[KnownAnswer]:
    """Returns all known answers.

    They are the published rows of random and supervised weights (docs/protocols.md 4.2), each
    number with its tolerance in published.csv. A supervised ResNet-50 under average pooling is
    accepted from 74.12 to 76.2, and 1.0 points on both sides: 74.12 is the published row of this
    very protocol, 76.2 the accuracy with the classifier that the network was trained with.
    """
    answers = []
    for number in published_numbers():
        metric = number.metric
        high = number.value
        tolerance = number.tolerance
        # This row alone is expected within a range, and of another metric.
        if (number.row, number.column) == (SUPERVISED, "avgpool"):
            metric = "top1"
            high = SUPERVISED_TOP1
            tolerance = AVGPOOL_TOLERANCE
        # Other published rows are of weights that were trained, which differ from ours.
        if number.known_answer_of:
            answers.append(
                KnownAnswer(published=number, metric=metric, high=high, tolerance=tolerance)
            )
    return answers


def applicable(
    backbones: Iterable[tuple[str, str]], evaluations: Collection[str], batch_norms: Collection[str]
) -> list[KnownAnswer]:
    """Returns the known answers that some evaluations can be compared with, before any is run.

    Args:
        backbones: checkpoint and model of each backbone, such as `("random", "resnet50")`.
        evaluations: names of the evaluations.
        batch_norms: batch norms that they are run with; published numbers are "as_trained".
    """
    if "as_trained" not in batch_norms:
        return []
    weights = {checkpoint for checkpoint, model in backbones if model == PUBLISHED_MODEL}
    return [
        answer
        for answer in known_answers()
        if answer.published.known_answer_of in weights
        and answer.published.evaluation in evaluations
    ]


def check(rows: Sequence[Result], answers: Sequence[KnownAnswer]) -> list[Verdict]:
    """Returns a verdict on each of the answers that `rows` measure.

    Of several measurements the last counts. Low-shot numbers are those at the published row's
    layer. Rows on other images than the published ones, of another model or with recalibrated batch
    norm are not compared.
    """
    verdicts = []
    for answer in answers:
        measured = [row.value for row in rows if not answer.objection(row)]
        if measured:
            verdicts.append(Verdict(answer=answer, value=measured[-1]))
    return verdicts


def unchecked(rows: Sequence[Result], answers: Sequence[KnownAnswer]) -> list[str]:
    """Returns a line for each answer that no row can be compared with, which says why."""
    lines = []
    for answer in answers:
        objections = [answer.objection(row) for row in rows]
        if "" in objections:
            continue
        # A row of the right number says best what has to be changed.
        closest = [objection for objection in objections if objection != _NOT_MEASURED]
        reason = closest[-1] if closest else _NOT_MEASURED
        lines.append(f"{answer.what}: {reason}")
    return lines
