"""Collects, from many runs, measures without labels and accuracies that compare between runs.

A measure is a number that is known without evaluating with labels: held-out pretext accuracy, or a
measure of the features. An accuracy is the headline number of an evaluation with labels.
"""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.reports.load import Measured
from relloc.reports.pretrainings import is_training, pretraining_of
from relloc.results import REFERENCE_MODELS, Result
from relloc.tracking.record import RUN_FILE, RunRecord

FEWEST_POINTS = 5
PRETEXT = "pretext accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantity:
    """What is measured: all that rows must share for their values to compare between weights.

    The fields are those of `Result`; `images` is the digest of the images, "" where it was not
    recorded. `layer` is "" for what is of the whole network. `progress` is the part of the training
    after which it was measured, from 0 to 1.
    """

    eval: str
    kind: str
    metric: str
    variant: str
    layer: str
    dataset: str
    split: str
    images: str
    n: int
    model: str
    batch_norm: str
    view: str
    precision: str
    protocol: str
    decoder: str = ""
    progress: float = 1.0

    @property
    def without_layer(self) -> "Quantity":
        """The same of the whole network."""
        return dataclasses.replace(self, layer="")

    @property
    def name(self) -> str:
        """A measure's name, such as "RankMe"."""
        if self.kind == "pretext":
            return PRETEXT
        return self.variant or self.metric


# The value of each weights, by their name
Values = Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observations:
    """Values of several trained weights.

    Attributes:
        points: The point of each weights: all that decides them but the seed.
        measures: The values of each measure.
        accuracies: The values of each accuracy.
    """

    points: Mapping[str, str]
    measures: Mapping[Quantity, Values]
    accuracies: Mapping[Quantity, Values]

    @property
    def n_points(self) -> int:
        """The largest number of points of which a measure and an accuracy are known together."""
        most = 0
        for measure, accuracy in self.pairs():
            both = self.measures[measure].keys() & self.accuracies[accuracy].keys()
            most = max(most, len({self.points[weights] for weights in both}))
        return most

    @property
    def has_features(self) -> bool:
        """Whether there is any measure of features, beside pretext accuracy."""
        return any(measure.kind != "pretext" for measure in self.measures)

    def pairs(self) -> list[tuple[Quantity, Quantity]]:
        """Returns the measures and accuracies that are of the same kind of features."""
        pairs = []
        for accuracy in self.accuracies:
            for measure in self.measures:
                if _belong_together(measure, accuracy):
                    pairs.append((measure, accuracy))
        return pairs


def observations(measured: Iterable[Measured]) -> Observations:
    """Returns the measures and accuracies among results.

    Random and supervised weights are left out: they are no points of a sweep, and lie so far from
    them that they would decide a correlation. Of a number that was measured twice the last counts;
    of several seeds of an evaluation of the same weights, the mean.

    Args:
        measured: Results, the oldest first, as `find_measured` returns them.
    """
    records: dict[Path, RunRecord | None] = {}
    points: dict[str, str] = {}
    measures: dict[Quantity, dict[tuple[str, int], float]] = defaultdict(dict)
    accuracies: dict[Quantity, dict[tuple[str, int], float]] = defaultdict(dict)
    for each in measured:
        row = each.result
        if is_measure(row):
            by_quantity = measures
        elif is_accuracy(row):
            by_quantity = accuracies
        else:
            continue
        folder = each.run.folder
        if folder not in records:
            # The run that a row was copied from may be gone
            exists = (folder / RUN_FILE).exists()
            records[folder] = RunRecord.read(folder) if exists else None
        weights, point = _weights_and_point(row, folder, records[folder])
        points[weights] = point
        by_quantity[quantity_of(each)][weights, row.seed] = row.value
    return Observations(
        points=points,
        measures=means_over_seeds(measures),
        accuracies=means_over_seeds(accuracies),
    )


def is_measure(row: Result) -> bool:
    """Returns whether a result is known without labels."""
    if row.checkpoint in REFERENCE_MODELS:
        return False
    if row.kind == "pretext":
        return row.headline
    # Which direction is good of a measure without labels is not known beforehand. It has a column
    # for each layer in its table; the terms of a measure have columns of their own
    is_whole = bool(row.table and row.layer) and row.column == row.layer
    return row.kind == "frozen" and row.higher_is_better is None and is_whole


def is_accuracy(row: Result) -> bool:
    """Returns whether a result is the headline accuracy of an evaluation with labels."""
    is_of_labels = row.kind in ("frozen", "fine-tuned") and row.higher_is_better is True
    is_headline = row.headline and row.unit == "%" and not row.spread
    return is_of_labels and is_headline and row.checkpoint not in REFERENCE_MODELS


def _weights_and_point(row: Result, folder: Path, record: RunRecord | None) -> tuple[str, str]:
    """Returns the names of a row's weights and of their point."""
    weights = os.path.abspath(row.checkpoint)
    if record is None:
        return weights, weights
    # A folder may have been moved since the row was written
    if is_training(record):
        weights = str(folder / BACKBONE_FILE)
    pretraining = pretraining_of(record, row.checkpoint)
    if not pretraining.settings:
        return weights, weights
    return weights, f"{pretraining.name} {pretraining.settings} {pretraining.images}"


def quantity_of(each: Measured) -> Quantity:
    """Returns what a result measures."""
    row = each.result
    return Quantity(
        eval=row.eval,
        kind=row.kind,
        metric=row.metric,
        # Nearest neighbors have a line of a table, which the variant names, for each layer
        variant="" if row.variant == row.layer else row.variant,
        # Of a network that is fine-tuned, all layers count
        layer="" if row.kind == "fine-tuned" else row.layer,
        dataset=row.dataset,
        split=row.split,
        images=each.digest,
        n=row.n,
        model=row.model,
        batch_norm=row.batch_norm,
        view=row.view,
        precision=row.precision,
        protocol=row.protocol,
        decoder=row.decoder,
    )


def means_over_seeds(
    values: Mapping[Quantity, Mapping[tuple[str, int], float]],
) -> dict[Quantity, Values]:
    """Returns the mean of each weights over the seeds of their evaluation."""
    means: dict[Quantity, Values] = {}
    for quantity, by_seed in values.items():
        of_weights: dict[str, list[float]] = defaultdict(list)
        for (weights, _), value in by_seed.items():
            of_weights[weights].append(value)
        means[quantity] = {name: sum(each) / len(each) for name, each in of_weights.items()}
    return means


def _belong_together(measure: Quantity, accuracy: Quantity) -> bool:
    """Returns whether a measure may be held against an accuracy.

    They are of one model, and of one layer where both are of a layer. Where both are of frozen
    features, these have the same batch norm and decoder of JPEGs; pretraining and fine-tuning have
    their own.
    """
    if measure.model != accuracy.model:
        return False
    both_frozen = measure.kind == accuracy.kind == "frozen"
    seen = [(each.batch_norm, each.decoder) for each in (measure, accuracy)]
    if both_frozen and len(set(seen)) > 1:
        return False
    layers: Sequence[str] = [each.layer for each in (measure, accuracy) if each.layer]
    return len(set(layers)) <= 1
