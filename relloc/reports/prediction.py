"""Tells how well measures without labels, or early ones, rank weights by their accuracy.

Rank correlations have intervals of a bootstrap over settings: weights that differ in their seed
alone are no independent samples of what settings do, and are drawn together.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau, spearmanr

from relloc.errors import DataError
from relloc.reports.as_csv import as_text
from relloc.reports.early import early_observations
from relloc.reports.observations import FEWEST_POINTS, Observations, Quantity
from relloc.reports.parts import MISSING, Cell, Group, Report, Row, Table
from relloc.results import LAYERS
from relloc.seeds import Use, seed_for
from relloc.terminal import quantity

_DRAWS = 2000
_LOW, _HIGH = 2.5, 97.5  # percentiles of a 95 % interval
_WHOLE_NETWORK = "network"  # the column of correlations of which neither side is of a layer
TITLE = "Do measures without labels predict accuracy?"
LEGEND = (
    f"{TITLE} Correlations of ranks over runs, each with its 95 % interval: percentiles of "
    f"{_DRAWS:,} draws of a bootstrap over settings, whose seeds stay together. Of few settings "
    "such intervals are too narrow rather than too wide. Random and supervised weights are left "
    f"out. {MISSING}: fewer than {FEWEST_POINTS} settings, or all values are the same."
)

EARLY_TITLE = "Early answers: do measures after a tenth of the training predict its end?"
EARLY_LEGEND = (
    f"{EARLY_TITLE} The same correlations, of what monitors and `relloc.evaluate watch=` measured "
    "closest to a tenth of the steps, between 5 and 15 %, with the accuracy at the end."
)

Vector = Float[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlation:
    """A rank correlation from -1 to 1 with its 95 % interval, which is None if it can't be told."""

    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a measure and an accuracy go together over `n_weights` weights of `n_points` points.

    `spearman` is Spearman's rho, and `kendall` Kendall's tau-b. They are None where there are too
    few points, or where all weights have the same value.
    """

    measure: Quantity
    accuracy: Quantity
    n_weights: int
    n_points: int
    spearman: Correlation | None
    kendall: Correlation | None

    @property
    def layer(self) -> str:
        """The layer that the correlation is of, "" if it is of whole networks."""
        return self.measure.layer or self.accuracy.layer


def predictions(observed: Observations) -> list[Prediction]:
    """Returns the correlations of all measures with all accuracies that they may be held against.

    Each is over the weights of which both values are known.
    """
    found = []
    for measure, accuracy in observed.pairs():
        of_measure = observed.measures[measure]
        of_accuracy = observed.accuracies[accuracy]
        weights = sorted(of_measure.keys() & of_accuracy.keys())
        points = [observed.points[each] for each in weights]
        x = np.array([of_measure[each] for each in weights])
        y = np.array([of_accuracy[each] for each in weights])
        n_points = len(set(points))
        spearman = kendall = None
        if n_points >= FEWEST_POINTS and not (_is_constant(x) or _is_constant(y)):
            spearman, kendall = correlations(x, y, points)
        found.append(
            Prediction(
                measure=measure,
                accuracy=accuracy,
                n_weights=len(weights),
                n_points=n_points,
                spearman=spearman,
                kendall=kendall,
            )
        )
    return found


def _is_constant(values: Vector) -> bool:
    return bool((values == values[0]).all())


def correlations(
    x: Vector,
    y: Vector,
    points: Sequence[str],
) -> tuple[Correlation, Correlation]:
    """Returns Spearman's rho and Kendall's tau-b of two series, each with its interval.

    Args:
        x: The values of one series, not all the same.
        y: Those of the other, likewise.
        points: For each pair of values the point that it belongs to: the pairs of one point are
            drawn together.
    """
    draws = _drawn_counts(points)
    # The first of each is the coefficient, and the second a p-value that takes pairs as independent
    spearman, _ = np.asarray(spearmanr(x, y))
    kendall, _ = np.asarray(kendalltau(x, y))
    return (
        _with_interval(float(spearman), counted_spearman(x, y, draws)),
        _with_interval(float(kendall), counted_kendall(x, y, draws)),
    )


def _drawn_counts(points: Sequence[str]) -> Float[np.ndarray, "draws m"]:
    """Returns how often each pair of values is in each draw of as many points as there are."""
    names = sorted(set(points))
    generator = np.random.default_rng(seed_for(Use.BOOTSTRAP))
    drawn = generator.integers(len(names), size=(_DRAWS, len(names)))
    of_point = np.array([names.index(point) for point in points])
    counts = np.zeros((_DRAWS, len(names)))
    np.add.at(counts, (np.arange(_DRAWS)[:, None], drawn), 1)
    return counts[:, of_point]


def counted_spearman(
    x: Vector, y: Vector, counts: Float[np.ndarray, "draws m"]
) -> Float[np.ndarray, "draws"]:
    """Returns Spearman's rho of each draw, in which pair i occurs `counts[:, i]` times.

    It is nan where all values of a draw are the same.
    """
    ranks_x = _counted_ranks(x, counts)
    ranks_y = _counted_ranks(y, counts)
    total = counts.sum(axis=1, keepdims=True)
    # Both have the mean of 1 to `total`, also with ties
    x_around = ranks_x - (total + 1) / 2
    y_around = ranks_y - (total + 1) / 2
    covariances = (counts * x_around * y_around).sum(axis=1)
    variances_x = (counts * x_around**2).sum(axis=1)
    variances_y = (counts * y_around**2).sum(axis=1)
    return _divided(covariances, np.sqrt(variances_x * variances_y))


def _counted_ranks(
    values: Vector, counts: Float[np.ndarray, "draws m"]
) -> Float[np.ndarray, "draws m"]:
    """Returns the rank of each value in each draw; equal values have the mean of their ranks."""
    is_less = (values[None, :] < values[:, None]).astype(float)
    is_equal = (values[None, :] == values[:, None]).astype(float)
    return counts @ is_less.T + (counts @ is_equal.T + 1) / 2


def counted_kendall(
    x: Vector, y: Vector, counts: Float[np.ndarray, "draws m"]
) -> Float[np.ndarray, "draws"]:
    """Returns Kendall's tau-b of each draw, in which pair i occurs `counts[:, i]` times.

    It is nan where all values of a draw are the same.
    """
    signs_x = np.sign(x[:, None] - x[None, :])
    signs_y = np.sign(y[:, None] - y[None, :])

    def summed(signs: Float[np.ndarray, "m m"]) -> Float[np.ndarray, "draws"]:
        return ((counts @ signs) * counts).sum(axis=1)

    # Concordant less discordant pairs, over the pairs that each side does not tie
    untied = summed(signs_x**2) * summed(signs_y**2)
    return _divided(summed(signs_x * signs_y), np.sqrt(untied))


def _divided(
    numerators: Float[np.ndarray, "draws"], denominators: Float[np.ndarray, "draws"]
) -> Float[np.ndarray, "draws"]:
    """Returns quotients, nan where the denominator is 0."""
    result = np.full(len(numerators), np.nan)
    return np.divide(numerators, denominators, out=result, where=denominators > 0)


def _with_interval(value: float, draws: Float[np.ndarray, "draws"]) -> Correlation:
    """Returns a correlation with the percentiles of those draws that define one."""
    defined = draws[np.isfinite(draws)]
    # Most draws of few points may have the same value throughout
    if len(defined) < len(draws) / 2:
        return Correlation(value=value, low=None, high=None)
    low, high = np.percentile(defined, [_LOW, _HIGH])
    return Correlation(value=value, low=float(low), high=float(high))


def check_enough(observed: Observations, of: str) -> None:
    """Checks that there are points enough for a correlation.

    Raises:
        DataError: there are too few; the message says how many, and begins with `of`.
    """
    if observed.n_points < FEWEST_POINTS:
        n_points = quantity(observed.n_points, "setting")
        raise DataError(
            f"{of}: a measure without labels (eval=label_free, or pretext accuracy) and an "
            f"accuracy are known together of {n_points}, but a correlation needs {FEWEST_POINTS}. "
            "Evaluate more runs, or name more folders"
        )


def all_predictions(observed: Observations) -> list[Prediction]:
    """Returns the correlations of measures at the end of trainings, and of those early in them."""
    return predictions(observed) + predictions(early_observations(observed))


def prediction_report(found: Sequence[Prediction], title: str) -> Report:
    """Returns a report of correlations alone."""
    groups = prediction_groups(found)
    return Report(
        title=title,
        groups=groups,
        legend=prediction_legend(groups),
        advice="",
        missing=(),
    )


def prediction_groups(found: Sequence[Prediction]) -> tuple[Group, ...]:
    """Returns the tables of measures at the end, and those of early ones if there are any."""
    at_end = [each for each in found if each.measure.progress == 1]
    early = [each for each in found if each.measure.progress < 1]
    groups = (prediction_group(at_end), prediction_group(early, EARLY_TITLE))
    return tuple(group for group in groups if group.tables)


def prediction_legend(groups: Sequence[Group]) -> tuple[str, ...]:
    """Returns what is to be said of the tables of `prediction_groups`."""
    if any(group.title == EARLY_TITLE for group in groups):
        return (LEGEND, EARLY_LEGEND)
    return (LEGEND,)


def prediction_group(found: Sequence[Prediction], title: str = TITLE) -> Group:
    """Returns the tables of correlations: one for each accuracy, with a column for each layer.

    Accuracies of which no correlation can be told have no table.
    """
    by_accuracy: dict[Quantity, list[Prediction]] = {}
    for each in found:
        by_accuracy.setdefault(each.accuracy.without_layer, []).append(each)
    tables = []
    for accuracy, of_accuracy in by_accuracy.items():
        if any(each.spearman for each in of_accuracy):
            tables.append(_table(accuracy, of_accuracy))
    return Group(title=title, tables=tuple(tables))


def _table(accuracy: Quantity, found: Sequence[Prediction]) -> Table:
    columns = [each for each in (*LAYERS, "") if any(each == one.layer for one in found)]
    by_measure: dict[Quantity, dict[str, Prediction]] = {}
    for each in found:
        by_measure.setdefault(each.measure.without_layer, {})[each.layer] = each
    rows = []
    for measure, by_layer in by_measure.items():
        for coefficient in ("Spearman", "Kendall"):
            cells = []
            for column in columns:
                cells.append(_cell(by_layer.get(column), coefficient))
            row = Row(
                label=_label(measure),
                setting=coefficient,
                is_published=False,
                cells=tuple(cells),
                empty=MISSING,
            )
            rows.append(row)
    return Table(
        title=_title(accuracy, found),
        columns=tuple(column or _WHOLE_NETWORK for column in columns),
        rows=tuple(rows),
    )


def _title(accuracy: Quantity, found: Sequence[Prediction]) -> str:
    recalibrated = "recalibrated" if accuracy.batch_norm == "recalibrated" else ""
    told = [each for each in found if each.spearman]
    runs = _range([each.n_weights for each in told])
    settings = _range([each.n_points for each in told])
    words = (
        f"{accuracy.eval}/{accuracy.metric} on {accuracy.dataset} {accuracy.split}",
        accuracy.model,
        recalibrated,
        accuracy.decoder,
        accuracy.variant,
        f"{runs} runs of {settings} settings",
    )
    return ", ".join(filter(None, words))


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _label(measure: Quantity) -> str:
    unit = "pair" if measure.kind == "pretext" else "image"
    recalibrated = ", recalibrated" if measure.batch_norm == "recalibrated" else ""
    images = f"{quantity(measure.n, unit, commas=True)} of {measure.dataset} {measure.split}"
    decoder = f", {measure.decoder}" if measure.decoder else ""
    return f"{measure.name} ({images}{recalibrated}{decoder})"


def _cell(prediction: Prediction | None, coefficient: str) -> Cell | None:
    if prediction is None:
        return None
    is_spearman = coefficient == "Spearman"
    correlation = prediction.spearman if is_spearman else prediction.kendall
    if correlation is None:
        return None
    spread = ""
    if correlation.low is not None and correlation.high is not None:
        spread = f"({correlation.low:.2f} to {correlation.high:.2f})"
    runs = quantity(prediction.n_weights, "run")
    settings = quantity(prediction.n_points, "setting")
    return Cell(
        text=f"{correlation.value:.2f}",
        details=f"{correlation.value:.4f}, {runs} of {settings}",
        spread=spread,
    )


def as_prediction_csv(found: Sequence[Prediction]) -> str:
    """Returns CSV with a line for each measure, accuracy and layer, also where none can be told."""
    lines = list(map(_csv_line, found))
    text = io.StringIO()
    columns = list(lines[0]) if lines else []
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: as_text(value) for name, value in line.items()})
    return text.getvalue()


def _csv_line(prediction: Prediction) -> Mapping[str, object]:
    line: dict[str, object] = {"layer": prediction.layer, "model": prediction.accuracy.model}
    for side, measured in (("measure", prediction.measure), ("accuracy", prediction.accuracy)):
        line[side] = measured.name
        for field, value in dataclasses.asdict(measured).items():
            # Accuracies are those at the end.
            is_accuracy_of_end = (side, field) == ("accuracy", "progress")
            if field not in ("layer", "model") and not is_accuracy_of_end:
                line[f"{side}_{field}"] = value
    line["runs"] = prediction.n_weights
    line["settings"] = prediction.n_points
    line.update(_csv_numbers("spearman", prediction.spearman))
    line.update(_csv_numbers("kendall", prediction.kendall))
    return line


def _csv_numbers(name: str, correlation: Correlation | None) -> Iterator[tuple[str, object]]:
    for field in ("value", "low", "high"):
        number = getattr(correlation, field) if correlation else None
        column = name if field == "value" else f"{name}_{field}"
        yield column, "" if number is None or math.isnan(number) else number
