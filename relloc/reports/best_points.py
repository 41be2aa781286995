"""Tells which points of a sweep are best, and what published choices of gap and jitter lose.

Of each measure: the best point, and how far those that lie nearest to the choices of the paper and
of the published card are below it. Of all: whether they agree on the order of the points, and when
in the trainings that order settles. `analysis/gap_jitter.py` draws the same.
"""

import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student

from relloc.reports.parts import Cell, Group, Report, Row, Table
from relloc.reports.sweep import COLUMN, EFFECT, TITLE, WEIGHTS, Frame, SweepNumbers
from relloc.results import REFERENCE_MODELS
from relloc.terminal import quantity
from relloc.tracking import read_journal
from relloc.tracking.record import RUN_FILE, RunRecord

GAP, JITTER, PATCH = "grid.gap_px", "grid.jitter_px", "grid.patch_px"
DEEP = ("", "feature3", "feature4", "feature5")  # the layers that pretraining is judged by
SETTLED = 0.9  # a rank correlation from which on two orders count as the same
WATCHED = ("monitor/pretext/top1", "monitor/knn/feature")  # what begins the names of its curves
_FEWEST_POINTS = 3  # that have an order
TITLE_OF_GROUP = "Best points"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A published gap, how far patches move from end to end of their jitter, and side of a patch.

    All are in pixels.
    """

    gap_px: float
    moved_px: float
    patch_px: float

    def distance(self, gap_px: float, jitter: object, patch_px: float) -> float:
        """Returns how far a setting is from this choice, in sides of a patch."""
        of_gap = gap_px / patch_px - self.gap_px / self.patch_px
        of_jitter = jitter_width(jitter) / patch_px - self.moved_px / self.patch_px
        return math.hypot(of_gap, of_jitter)


# conf/grid/doersch2015.yaml and conf/grid/mmselfsup.yaml
CHOICES = {
    "paper": Choice(gap_px=48, moved_px=14, patch_px=96),
    "card": Choice(gap_px=21, moved_px=21, patch_px=64),
}


def jitter_width(jitter: object) -> float:
    """Returns how far patches move at most, in px: 7 is -7 to 7, and [0, 21] is 0 to 21."""
    values = json.loads(str(jitter))
    return 2 * values if isinstance(values, int | float) else values[1] - values[0]


def half_width_of_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns half the width of Welch's 95 % interval of the difference of two means.

    It takes the deviation of each side by itself. Single values have none: nan.
    """
    sides = [np.asarray(one, dtype=float), np.asarray(other, dtype=float)]
    if min(map(len, sides)) < 2:
        return math.nan
    variances = np.array([side.var(ddof=1) / len(side) for side in sides])
    if not variances.sum() > 0:
        return math.nan
    freedom = variances.sum() ** 2 / sum(
        variance**2 / (len(side) - 1) for variance, side in zip(variances, sides, strict=True)
    )
    return float(student.ppf(0.975, freedom) * np.sqrt(variances.sum()))


def rank_correlation(
    one: Mapping[Hashable, float] | Frame, other: Mapping[Hashable, float] | Frame
) -> float:
    """Returns Spearman's rho over the points that have both values, nan if it can't be told."""
    pairs = [(value, other[point]) for point, value in one.items() if point in other]
    pairs = np.array(pairs, dtype=float)
    pairs = pairs[~np.isnan(pairs).any(axis=1)] if len(pairs) else pairs
    if len(pairs) < _FEWEST_POINTS or any(len(np.unique(side)) < 2 for side in pairs.T):
        return math.nan
    return float(np.asarray(spearmanr(pairs[:, 0], pairs[:, 1]))[0])


def settles(orders: Mapping[float, float] | Frame) -> float:
    """Returns from where on an order is that of the end, nan if it never was before the end.

    Args:
        orders: Rank correlations with the order at the end, by step or by images seen, rising.
    """
    last_other = max((at for at, rho in orders.items() if not rho >= SETTLED), default=-math.inf)
    later = [at for at, _ in orders.items() if at > last_other]
    return later[0] if len(later) > 1 else math.nan


def with_best_points(report: Report, sweep: SweepNumbers) -> Report:
    """Returns the report of a sweep with the table of `best_points`, where there is one."""
    group = best_points(sweep)
    return dataclasses.replace(report, groups=(*report.groups, group)) if group else report


def best_points(sweep: SweepNumbers) -> Group | None:
    """Returns a table of the best points by measure, or None where a sweep has too few points.

    Measures are accuracies, of which higher is better, and what shortcuts bring, where lower is.
    The text below the table tells whether accuracies agree on the order of the points.
    """
    rows = sweep.rows
    is_shortcut = rows["metric"].str.startswith(EFFECT, na=False)
    # Which direction is good of other numbers is not known: theirs is None
    has_direction = rows["higher_is_better"].eq(True) | is_shortcut
    rows = rows[has_direction & ~rows[WEIGHTS].isin(REFERENCE_MODELS) & (rows["spread"] == "")]
    rows = rows[rows["layer"].isin(DEEP)]
    axes = [axis for axis in sweep.axes if axis in sweep.swept]
    if not axes or rows.groupby(axes, observed=True).ngroups < _FEWEST_POINTS:
        return None
    nearest = _nearest(rows, axes)

    lines, accuracies = [], {}
    pretext: dict[Hashable, float] = {}
    for (title, column), of_measure in rows.groupby([TITLE, COLUMN], observed=True, sort=False):
        sign = -1 if of_measure["metric"].iloc[0].startswith(EFFECT) else 1
        values = {
            point: list(seeds) for point, seeds in of_measure.groupby(axes, observed=True)["value"]
        }
        if len(values) < _FEWEST_POINTS:
            continue
        means = {point: float(np.mean(seeds)) for point, seeds in values.items()}
        if of_measure["kind"].iloc[0] == "pretext":
            pretext = means
        elif sign > 0:
            accuracies[title, column] = means
        label = f"{title}, {column}" if of_measure["layer"].iloc[0] else str(title)
        lines.append(_line(label, values, sign, axes, nearest))
    if not lines:
        return None
    columns = ["best point", "mean there", *(f"the {name}'s choice" for name in nearest)]
    table = Table(
        title="The best point of each measure",
        caption=" ".join(
            _sentences(accuracies, pretext, axes, nearest) + _when_settled(rows, axes)
        ),
        columns=tuple(columns),
        rows=tuple(lines),
    )
    return Group(title=TITLE_OF_GROUP, tables=(table,))


def _nearest(rows: Frame, axes: Sequence[str]) -> dict[str, Hashable]:
    """Returns the point nearest to each choice; none where points differ in other settings too."""
    settings = {}
    for point, folders in rows.groupby(list(axes), observed=True)["folder"]:
        file = Path(folders.iloc[0])
        if not (file / RUN_FILE).exists():
            return {}
        settings[point] = RunRecord.read(file).params
    swept = {name for axis in axes for name in (GAP, JITTER) if name.endswith(axis)}
    known = all(name in each for each in settings.values() for name in (GAP, JITTER, PATCH))
    if len(swept) < len(axes) or not known:
        return {}

    def distance(choice: Choice, point: Hashable) -> float:
        own = settings[point]
        return choice.distance(float(own[GAP]), own[JITTER], float(own[PATCH]))

    return {
        name: min(settings, key=lambda point, choice=choice: distance(choice, point))
        for name, choice in CHOICES.items()
    }


def _line(
    label: str,
    values: Mapping[Hashable, Sequence[float]],
    sign: int,
    axes: Sequence[str],
    nearest: Mapping[str, Hashable],
) -> Row:
    """Returns the line of a measure: its best point, the mean there, and what choices lose."""
    means = {point: float(np.mean(seeds)) for point, seeds in values.items()}
    best = max(means, key=lambda point: sign * means[point])
    seeds = values[best]
    spread = f"± {np.std(seeds, ddof=1):.1f} ({len(seeds)})" if len(seeds) > 1 else ""
    cells: list[Cell | None] = [
        Cell(text=_words(best, axes)),
        Cell(text=f"{means[best]:z.1f}", spread=spread),
    ]
    for point in nearest.values():
        if point not in means:
            cells.append(None)
            continue
        difference = means[point] - means[best]
        half = half_width_of_difference(values[point], values[best])
        has_interval = point != best and not math.isnan(half)
        interval = f"({difference - half:z.1f} to {difference + half:z.1f})" if has_interval else ""
        cells.append(Cell(text=f"{difference:+z.1f}", spread=interval))
    return Row(label=label, is_published=False, cells=tuple(cells))


def _words(point: Hashable, axes: Sequence[str]) -> str:
    values = point if isinstance(point, tuple) else (point,)
    return ", ".join(f"{axis}={value}" for axis, value in zip(axes, values, strict=True))


def _sentences(
    accuracies: Mapping[Hashable, Mapping[Hashable, float]],
    pretext: Mapping[Hashable, float],
    axes: Sequence[str],
    nearest: Mapping[str, Hashable],
) -> list[str]:
    """Returns what the table says as a whole, in sentences."""
    sentences = []
    for name, point in nearest.items():
        sentences.append(f"Nearest to the {name}'s choice is {_words(point, axes)}.")
    if nearest:
        sentences.append(
            "Differences are with the best point, with Welch's 95 % interval over seeds; as the "
            "best point was chosen by the same numbers, some difference is chance."
        )
    best = [max(means, key=means.__getitem__) for means in accuracies.values()]
    if best:
        most = max(best, key=best.count)
        sentences.append(
            f"{_words(most, axes)} is best in {best.count(most)} of "
            f"{quantity(len(best), 'accuracy', 'accuracies')}, from feature3 on."
        )
    agreement = _known(
        rank_correlation(one, other)
        for one, other in itertools.combinations(accuracies.values(), 2)
    )
    if agreement:
        sentences.append(
            "Their orders of the points agree with a rank correlation of "
            f"{np.median(agreement):.2f} (median; {min(agreement):.2f} to {max(agreement):.2f})."
        )
    with_pretext = _known(rank_correlation(pretext, means) for means in accuracies.values())
    if with_pretext:
        sentences.append(
            f"That of pretext accuracy agrees with them by {np.median(with_pretext):.2f} (median)."
        )
    return sentences


def _known(numbers: Iterable[float]) -> list[float]:
    return [number for number in numbers if not math.isnan(number)]


def _when_settled(rows: Frame, axes: Sequence[str]) -> list[str]:
    """Returns sentences on when the order of the points was the last one watched, by each curve.

    Results at the end are of other images than what was watched, and would order close points
    otherwise.
    """
    # Of each curve: at each step, the values of each point, one for each seed
    curves: dict[str, dict[int, dict[Hashable, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for (*point, folder), _ in rows.groupby([*axes, "folder"], observed=True):
        for entry in read_journal(Path(str(folder))):
            for name, value in entry.metrics.items():
                # Positions of the pretext task have curves of their own
                is_whole = name == WATCHED[0] or name.startswith(WATCHED[1])
                if is_whole and (name == WATCHED[0] or name.split("/")[2] in DEEP):
                    key = tuple(point) if len(axes) > 1 else point[0]
                    curves[name][entry.step][key].append(value)
    sentences = []
    for name, by_step in curves.items():
        n_points = max(len(points) for points in by_step.values())
        steps = sorted(step for step, points in by_step.items() if len(points) == n_points)
        if len(steps) < 2:
            continue
        means = {
            step: {point: float(np.mean(values)) for point, values in by_step[step].items()}
            for step in steps
        }
        end = means[steps[-1]]
        orders = {step: rank_correlation(of_points, end) for step, of_points in means.items()}
        at = settles(orders)
        told = "only at the end" if math.isnan(at) else f"from step {at:,.0f} of {steps[-1]:,} on"
        sentences.append(
            f"By {name.removeprefix('monitor/')}, the order of the points was the last watched "
            f"(rank correlation of {SETTLED} or more) {told}."
        )
    return sentences
