"""Scores of single classes beside that of all classes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from relloc.results import Score


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
    for name, value in zip(classes, values, strict=True):
        if not math.isnan(value):
            class_name = name.replace(" ", "_")
            yield dataclasses.replace(
                of_all,
                table="",
                column="",
                metric=f"{metric}_{class_name}",
                value=100 * value,
                headline=False,
            )
