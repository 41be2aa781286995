"""Average precision beside its definition written out, and beside scikit-learn's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from relloc.evaluation.average_precision import ap_area, ap_steps


def area_by_definition(scores: list[float], positive: list[bool]) -> float:
    """For each recall that is reached, the best precision at this recall or a higher one."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        points.append((sum(taken) / sum(positive), sum(taken) / len(taken)))
    area, before = 0.0, 0.0
    for recall, _ in points:
        area += (recall - before) * max(precision for other, precision in points if other >= recall)
        before = recall
    return area


rankings = st.lists(
    st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=25
)


@given(rankings)
def test_both_equal_their_definitions_with_ties_and_with_images_left_out(ranking):
    scores, positive, counted = (
        torch.tensor(column).unsqueeze(1) for column in zip(*ranking, strict=True)
    )
    area, steps = (float(ap(scores.double(), positive, counted)) for ap in (ap_area, ap_steps))
    kept = [(float(s), p) for s, p, c in ranking if c]
    if not any(p for _, p in kept):
        assert np.isnan(area)
        assert np.isnan(steps)
        return
    kept_scores, kept_positive = [s for s, _ in kept], [p for _, p in kept]
    assert area == pytest.approx(area_by_definition(kept_scores, kept_positive), abs=1e-12)
    assert steps == pytest.approx(average_precision_score(kept_positive, kept_scores), abs=1e-12)
    assert area >= steps - 1e-12


def test_columns_are_rankings_of_their_own():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 5, generator=rng, dtype=torch.float64)
    positive = torch.rand(30, 5, generator=rng) < 0.3
    counted = torch.rand(30, 5, generator=rng) < 0.8
    together = ap_area(scores, positive, counted)
    alone = [ap_area(*(t[:, [m]] for t in (scores, positive, counted))) for m in range(5)]
    assert torch.equal(together, torch.cat(alone))
    shuffled = torch.randperm(30, generator=rng)
    torch.testing.assert_close(
        ap_area(scores[shuffled], positive[shuffled], counted[shuffled]), together
    )


def test_a_perfect_ranking_is_one_and_the_worst_is_the_share_of_positives_to_come():
    scores = torch.arange(4, 0, -1).double().unsqueeze(1)
    everything = torch.ones(4, 1, dtype=torch.bool)
    first, last = (
        torch.tensor(p).unsqueeze(1)
        for p in ([True, True, False, False], [False, False, False, True])
    )
    assert float(ap_area(scores, first, everything)) == 1
    assert float(ap_area(scores, last, everything)) == 0.25
