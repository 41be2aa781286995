"""How much work each row of the card is, and how long that takes at the rates of a machine.

Amounts follow from the settings of the evaluations (epochs, iterations, heads) and from the numbers
of images of the published splits (conf/data/*.yaml, `published_images`); none is written here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from relloc.data.order import StepPlan
from relloc.evals.knn import Knn
from relloc.evals.linear import Linear
from relloc.evals.training import draw_held_back
from relloc.evals.voc07 import Voc07
from relloc.evaluation.contract import Evaluation
from relloc.runs.build import Pretraining
from relloc.transfer.iterations import IterativeFineTuning
from relloc.transfer.semisup import SemiSupervised

COMPUTING, READING = "computing", "reading"
_SECONDS_PER_HOUR = 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of one kind of work a row has: `n` times `unit`, such as images."""

    work: str
    n: float
    unit: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Units of a kind of work per second.

    Attributes:
        running: as the evaluation runs, reading and computing beside each other.
        computing: with samples in memory; None where it was not measured alone.
        reading: of what makes samples, beside which no network computes; None where it was not
            measured alone.
        decodes_on_device: whether the device that computes takes part in `reading`.
    """

    running: float
    computing: float | None = None
    reading: float | None = None
    decodes_on_device: bool = False

    @property
    def lasting(self) -> float:
        """The rate of a long run: what readers had ready at the beginning is soon used up."""
        return min(self.running, self.reading or math.inf)

    @property
    def limited_by(self) -> str:
        """`COMPUTING` or `READING`, whichever is slower alone; "" where that is not known."""
        if self.computing is None or self.reading is None:
            return ""
        # Both take the device then: it may be what limits either.
        if self.decodes_on_device:
            return ""
        return READING if self.reading < self.computing else COMPUTING


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedWork:
    """A kind of work of a row, and the rate at which a machine does it."""

    amount: Amount
    rate: Rate

    @property
    def hours(self) -> float:
        """The hours that all of it takes."""
        return self.amount.n / self.rate.lasting / _SECONDS_PER_HOUR


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedRow:
    """A row of the card with all of its work."""

    name: str
    works: Sequence[TimedWork]

    @property
    def hours(self) -> float:
        """The hours that the row takes."""
        return sum(each.hours for each in self.works)

    @property
    def limited_by(self) -> str:
        """What limits the work that takes longest."""
        return max(self.works, key=lambda each: each.hours).rate.limited_by


def timed_row(name: str, amounts: Sequence[Amount], rates: Mapping[str, Rate]) -> TimedRow:
    """Returns a row of these amounts, whose rates are given by the names of the work."""
    works = [TimedWork(amount=each, rate=rates[each.work]) for each in amounts]
    return TimedRow(name=name, works=works)


def pretraining_amounts(settings: Pretraining, n_train: int) -> list[Amount]:
    """Returns the images that a pretraining on `n_train` images trains on."""
    plan = StepPlan(
        n_images=n_train,
        images_per_step=settings.images_per_step,
        images_per_batch_norm=settings.images_per_batch_norm,
    )
    n_steps = round(settings.schedule.epochs * plan.steps_per_epoch)
    return [Amount(work="training", n=n_steps * settings.images_per_step, unit="images")]


def evaluation_amounts(evaluation: Evaluation, n_train: int, n_held_out: int) -> list[Amount]:
    """Returns the work of an evaluation of a network whose splits have so many images.

    Raises:
        TypeError: the evaluation is of a kind that is not known here.
    """
    if isinstance(evaluation, Linear):
        n_tested = n_held_out
        # The best epoch is found by a test after each of them.
        if evaluation.best_epoch:
            n_tested += evaluation.epochs * n_held_out
        # A tenth of the training images chooses among the heads of the grid.
        if evaluation.grid_lrs:
            n_tested += len(draw_held_back(n_train, seed=0))
        return [
            Amount(work="training", n=evaluation.epochs * n_train, unit="images"),
            Amount(work="test", n=n_tested, unit="images"),
        ]
    if isinstance(evaluation, Knn):
        return [
            Amount(work="features", n=n_train + n_held_out, unit="images"),
            Amount(work="search", n=n_held_out, unit="queries"),
        ]
    if isinstance(evaluation, Voc07):
        return [
            Amount(work="features", n=n_train + n_held_out, unit="images"),
            Amount(work="solving", n=len(evaluation.layers), unit="layers"),
        ]
    if isinstance(evaluation, SemiSupervised):
        n_settings = len(evaluation.settings)
        n_labeled = math.floor(evaluation.share * n_train)
        n_tested = n_held_out
        # Of several settings one is chosen by other training images.
        if n_settings > 1:
            n_tested += evaluation.choosing_images
        return [
            Amount(work="training", n=n_settings * evaluation.epochs * n_labeled, unit="images"),
            Amount(work="test", n=n_settings * n_tested, unit="images"),
        ]
    if isinstance(evaluation, IterativeFineTuning):
        # Trainings that are counted in epochs have their number of iterations here, too.
        iterations = evaluation.iterations or int(evaluation.published["iterations"])
        n_tests = math.ceil(iterations / evaluation.evaluate_every)
        return [
            Amount(work="training", n=iterations, unit="iterations"),
            Amount(work="test", n=n_tests * n_held_out, unit="images"),
        ]
    raise TypeError(f"the work of {type(evaluation).__name__} is not known: add it here")
