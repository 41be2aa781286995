"""Scores beside a headline: of other metrics, and of single classes."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from relloc.results import Score


def scores_beside(headline: Score, values: Mapping[str, float]) -> Iterator[Score]:
    """Yields a score for each further metric, which says what the headline says.

    Tables of reports have no columns for them. `values` are from 0 to 1, by metric.
    """
    for metric, value in values.items():
        yield dataclasses.replace(
            headline,
            table="",
            column="",
            metric=metric,
            value=100 * value,
            headline=False,
        )


def scores_by_class(
    of_all: Score, metric: str, classes: Sequence[str], values: Sequence[float]
) -> Iterator[Score]:
    """Yields a score for each class that has a value, which says what the score of all says.

    Tables of reports have no columns for classes.

    Args:
        of_all: the score of all classes.
        metric: the name of the metric, which that of the class follows.
        classes: names by class.
        values: from 0 to 1; nan for a class without a value.
    """
    of_classes = {}
    for name, value in zip(classes, values, strict=True):
        if not math.isnan(value):
            class_name = name.replace(" ", "_")
            of_classes[f"{metric}_{class_name}"] = value
    yield from scores_beside(of_all, of_classes)
