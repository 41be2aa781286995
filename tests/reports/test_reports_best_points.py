"""Tests the best points of a sweep, and what published choices of gap and jitter lose."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, ttest_ind

from relloc.reports.best_points import (
    CHOICES,
    Choice,
    best_points,
    half_width_of_difference,
    jitter_width,
    rank_correlation,
    settles,
)
from relloc.reports.parts import Group
from relloc.reports.sweep import read_sweep
from relloc.runs.settings import compose
from relloc.sweeps.points import Point
from relloc.tracking import RunRecord
from relloc.tracking.journal import Journal

# scipy warns of sides whose values are all the same
VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=5).filter(
    lambda values: np.std(values) > 0.01
)
# What the sweep below measures at each point, the mean of its two seeds
LINEAR = {(0, 0): 10, (0, 7): 11, (32, 0): 12, (32, 7): 16}
NEIGHBORS = {(0, 0): 20, (0, 7): 22, (32, 0): 25, (32, 7): 24}
PRETEXT = {(0, 0): 50, (0, 7): 40, (32, 0): 30, (32, 7): 20}
CONTINUITY = {(0, 0): 9, (0, 7): 5, (32, 0): 1, (32, 7): 2}


def test_the_published_choices_are_those_of_the_grids() -> None:
    for name, member in (("paper", "doersch2015"), ("card", "mmselfsup")):
        grid = compose("train", [f"grid={member}"]).config.grid
        jitter = grid.jitter_px if isinstance(grid.jitter_px, int) else list(grid.jitter_px)
        own = Choice(gap_px=grid.gap_px, moved_px=jitter_width(jitter), patch_px=grid.patch_px)
        assert own == CHOICES[name]
        assert own.distance(grid.gap_px, jitter, grid.patch_px) == 0


@given(one=VALUES, other=VALUES)
def test_intervals_of_differences_are_those_of_scipy(one: list[float], other: list[float]) -> None:
    half = half_width_of_difference(one, other)
    low, high = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert half == pytest.approx((high - low) / 2, rel=1e-6)


def test_single_values_and_equal_ones_have_no_interval() -> None:
    assert math.isnan(half_width_of_difference([1.0], [2.0, 3.0]))
    assert math.isnan(half_width_of_difference([1.0, 1.0], [2.0, 2.0]))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=9).filter(
        lambda pairs: all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
    )
)
def test_rank_correlations_are_those_of_ranks(pairs: list[tuple[int, int]]) -> None:
    one = {point: float(value) for point, (value, _) in enumerate(pairs)}
    other = {point: float(value) for point, (_, value) in enumerate(pairs)}
    ranks = np.corrcoef(rankdata([*one.values()]), rankdata([*other.values()]))
    assert rank_correlation(one, other) == pytest.approx(ranks[0, 1])
    # Points that one of them lacks do not count
    assert rank_correlation(one | {"more": 1.0}, other) == pytest.approx(ranks[0, 1])


def test_too_few_or_equal_values_have_no_rank_correlation() -> None:
    assert math.isnan(rank_correlation({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}))
    assert math.isnan(rank_correlation({1: 1.0, 2: 1.0, 3: 1.0}, {1: 1.0, 2: 2.0, 3: 3.0}))


def test_an_order_settles_where_it_stays() -> None:
    assert settles({10: 0.95, 20: 0.5, 30: 0.9, 40: 1.0}) == 30
    assert settles({10: 0.95, 20: 1.0}) == 10
    assert math.isnan(settles({10: 0.95, 20: math.nan, 30: 1.0}))  # at the end alone


@pytest.fixture
def points(tmp_path: Path, new_run, result) -> list[Point]:
    """Gap by jitter by seed; seeds differ by 0.2 from their mean to both sides."""
    made = []
    for (gap, jitter), seed in itertools.product(LINEAR, (0, 1)):
        name = f"gap {gap} jitter {jitter} seed {seed}"
        ours = {"checkpoint": f"{name}/backbone.safetensors", "dataset": "photos", "seed": seed}
        off = 0.4 * seed - 0.2
        at = (gap, jitter)
        folder = new_run(
            name,
            result("linear", "feature4", "top1", LINEAR[at] + off, **ours),
            result("linear", "feature1", "top1", 99.0 - LINEAR[at], **ours),
            result("knn", "feature5", "top1_k20", NEIGHBORS[at] + off, **ours),
            result("pretext", "", "top1", PRETEXT[at] + off, **ours, kind="pretext"),
            result(
                "shortcuts",
                "",
                "effect_continuity",
                CONTINUITY[at] + off,
                **ours,
                kind="study",
                higher_is_better=None,
                headline=True,
            ),
            result(
                "label_free",
                "feature4",
                "rankme",
                7.0,
                **ours,
                higher_is_better=None,
                headline=True,
            ),
            result("linear", "feature4", "top1", 99.0, dataset="photos", seed=seed),  # random
        )
        record = RunRecord(
            name=name,
            experiment="relloc",
            params={"grid.gap_px": gap, "grid.jitter_px": jitter, "grid.patch_px": 64},
        )
        record.write(folder)
        # Reversed after ten steps, and after twenty that of the end
        for step, value in ((10, -PRETEXT[at]), (20, PRETEXT[at] + 1), (30, PRETEXT[at])):
            Journal(folder).log({"monitor/pretext/top1": value + off}, step)
        words = (f"grid.gap_px={gap}", f"grid.jitter_px={jitter}", f"seed={seed}")
        made.append(Point(kind="train", name=name, overrides=words, identity=name, folder=folder))
    return made


def group_of(points: Sequence[Point]) -> Group | None:
    return best_points(read_sweep("s", points, ["done"] * len(points)))


def test_a_report_says_which_points_are_best_and_what_published_choices_lose(
    points: list[Point],
) -> None:
    group = group_of(points)
    assert group is not None
    (table,) = group.tables
    assert table.columns == ("best point", "mean there", "the paper's choice", "the card's choice")
    shown = {
        row.label.partition(" on ")[0]: [
            f"{cell.text} {cell.spread}".strip() if cell else None for cell in row.cells
        ]
        for row in table.rows
    }
    half = half_width_of_difference([-0.2, 0.2], [-0.2, 0.2])
    of_difference = f"(-{half - 1:.1f} to {half + 1:.1f})"
    assert half > 1  # two seeds tell little
    # The paper's choice is nearest to 32 and 7, and the card's, which has a wide jitter, too
    assert shown == {
        "linear/top1": ["gap_px=32, jitter_px=7", "16.0 ± 0.3 (2)", "+0.0", "+0.0"],
        "knn/top1_k20": [
            "gap_px=32, jitter_px=0",
            "25.0 ± 0.3 (2)",
            f"-1.0 ({-1 - half:.1f} to {-1 + half:.1f})",
            f"-1.0 ({-1 - half:.1f} to {-1 + half:.1f})",
        ],
        "pretext/top1": [
            "gap_px=0, jitter_px=0",
            "50.0 ± 0.3 (2)",
            f"-30.0 ({-30 - half:.1f} to {-30 + half:.1f})",
            f"-30.0 ({-30 - half:.1f} to {-30 + half:.1f})",
        ],
        # Of a shortcut less is better
        "shortcuts/effect_continuity": [
            "gap_px=32, jitter_px=0",
            "1.0 ± 0.3 (2)",
            f"+1.0 {of_difference}",
            f"+1.0 {of_difference}",
        ],
    }
    for sentence in (
        "Nearest to the paper's choice is gap_px=32, jitter_px=7.",
        "gap_px=32, jitter_px=7 is best in 1 of 2 accuracies",
        # The orders 1 2 3 4 and 1 2 4 3
        "agree with a rank correlation of 0.80",
        "That of pretext accuracy agrees with them by -0.90",
        "By pretext/top1, the order of the points was the last watched "
        "(rank correlation of 0.9 or more) from step 20 of 30 on.",
    ):
        assert sentence in table.caption


def test_points_that_differ_in_other_settings_have_no_published_choice(
    points: list[Point],
) -> None:
    colors = ["gray" if "seed=1" in point.overrides else "drop" for point in points]
    for point, color in zip(points, colors, strict=True):
        object.__setattr__(point, "overrides", (*point.overrides[:2], f"color={color}"))
    group = group_of(points)
    assert group is not None
    assert group.tables[0].columns == ("best point", "mean there")
    assert "choice" not in group.tables[0].caption


def test_two_points_have_no_best_one(points: list[Point]) -> None:
    assert group_of(points[:4]) is None
