"""Permutation tests of gap and jitter find what is there, and nothing where nothing is."""

import itertools

import numpy as np
import pandas as pd
import permutation
import pytest
from scipy.stats import f as f_distribution

GAPS, JITTERS, SEEDS = (0, 4, 8), ("0", "2"), (0, 1, 2, 3)


def trainings(gap: float = 0.0, jitter: float = 0.0, both: float = 0.0, seed: int = 1):
    """A value for each of four seeds at six points, with effects in units of its scatter."""
    random = np.random.default_rng(seed)
    points = list(itertools.product(GAPS, JITTERS, SEEDS))
    values = []
    for gap_px, jitter_px, _ in points:
        effect = gap * (gap_px == 4) + jitter * (jitter_px == "2")
        effect += both * (gap_px == 4) * (jitter_px == "2")
        values.append(50 + effect + random.normal())
    index = pd.MultiIndex.from_tuples(points, names=["gap", "jitter", "weights_seed"])
    return pd.Series(values, index=index)


def p_values(values) -> dict[str, float]:
    return {
        "gap": permutation.p_of_effect(values, "gap"),
        "jitter": permutation.p_of_effect(values, "jitter"),
        "both": permutation.p_of_interaction(values),
    }


@pytest.mark.parametrize(
    ("effects", "found"),
    [
        ({"gap": 5.0}, {"gap"}),
        ({"jitter": 4.0}, {"jitter"}),
        ({"gap": 5.0, "jitter": 4.0}, {"gap", "jitter"}),
        # The interaction raises one of six points, and so the means of its gap and its jitter
        ({"both": 6.0}, {"gap", "jitter", "both"}),
    ],
)
def test_each_effect_is_found_by_its_own_p(effects: dict[str, float], found: set[str]) -> None:
    told = p_values(trainings(**effects))
    assert {name for name, p in told.items() if p < 0.01} == found
    assert all(p > 0.05 for name, p in told.items() if name not in found)


def test_without_an_interaction_its_p_is_small_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permutation, "DEALS", 99)
    told = [
        permutation.p_of_interaction(trainings(gap=5.0, jitter=4.0, seed=seed))
        for seed in range(300)
    ]
    # 0.05 and 0.5, within three standard deviations of 300 draws
    assert np.mean(np.array(told) <= 0.05) == pytest.approx(0.05, abs=0.038)
    assert np.mean(np.array(told) <= 0.5) == pytest.approx(0.5, abs=0.087)


def test_it_agrees_with_the_f_test_where_that_holds() -> None:
    values = trainings(gap=1.0, both=1.5, seed=3)
    table = values.unstack("weights_seed")
    means = table.mean(axis=1).unstack("jitter").to_numpy()
    sums = means.mean(axis=1, keepdims=True) + means.mean(axis=0) - means.mean()
    between = len(SEEDS) * ((means - sums) ** 2).sum() / 2
    within = table.var(axis=1).mean()
    expected = f_distribution.sf(between / within, 2, len(values) - 6)
    assert permutation.p_of_interaction(values) == pytest.approx(expected, abs=0.02)


def test_what_can_not_be_told_is_nan() -> None:
    values = trainings()
    one_gap = values.loc[[4]]
    one_seed = values.loc[:, :, [0]]
    points = values.index.droplevel("weights_seed")
    corner = values[points.isin([(0, "0"), (4, "0"), (4, "2")])]
    for few in (one_gap, one_seed, corner, values.groupby(["gap", "jitter"]).transform("mean")):
        assert np.isnan(permutation.p_of_interaction(few))
    assert np.isnan(permutation.p_of_effect(one_gap, "gap"))
    assert np.isnan(permutation.p_of_effect(one_seed, "jitter"))
