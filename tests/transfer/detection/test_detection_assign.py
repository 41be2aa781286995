"""Assignment beside mmdetection's loop, on random tables full of ties and on each trap."""

import numpy as np
import plain_detection as plain
import torch
from hypothesis import given
from hypothesis import strategies as st

from relloc.transfer.detection.assign import (
    BACKGROUND,
    IGNORED,
    NO_MATCH,
    ROI_RULE,
    RPN_RULE,
    AssignmentRule,
    assign,
)

# Values on both sides of each limit, and few enough for many ties.
VALUES = [0.0, 0.1, 0.2999, 0.3, 0.31, 0.4999, 0.5, 0.6999, 0.7, 0.9]


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    n_boxes, n_anchors = draw(st.integers(0, 4)), draw(st.integers(0, 7))
    count = n_boxes * n_anchors
    values = draw(st.lists(st.sampled_from(VALUES), min_size=count, max_size=count))
    return np.array(values, dtype=np.float32).reshape(n_boxes, n_anchors)


def by_loop(table: np.ndarray, rule: AssignmentRule) -> list[int]:
    # The limits in the precision of the overlaps.
    limits = [rule.positive, rule.negative, rule.low_quality]
    rounded = [None if limit is None else np.float32(limit) for limit in limits]
    return plain.assign(table, *rounded)


@given(tables(), st.sampled_from([RPN_RULE, ROI_RULE]))
def test_assignment_is_that_of_the_loop(table: np.ndarray, rule: AssignmentRule) -> None:
    assert assign(torch.tensor(table), rule).tolist() == by_loop(table, rule)


@given(tables(), tables())
def test_images_that_are_filled_up_are_assigned_as_alone(
    one: np.ndarray, other: np.ndarray
) -> None:
    shape = tuple(max(sides) for sides in zip(one.shape, other.shape, strict=True))
    for rule in (RPN_RULE, ROI_RULE):
        stacked = torch.full((2, *shape), NO_MATCH)
        for image, table in enumerate((one, other)):
            stacked[image, : table.shape[0], : table.shape[1]] = torch.tensor(table)
        assigned = assign(stacked, rule)
        for image, table in enumerate((one, other)):
            expected = by_loop(table, rule)
            assert assigned[image, : table.shape[1]].tolist() == expected
            assert (assigned[image, table.shape[1] :] == BACKGROUND).all()


def assigned(*rows: list[float]) -> list[int]:
    return assign(torch.tensor(rows), RPN_RULE).tolist()


def test_limits_belong_to_the_upper_side() -> None:
    # The first box has its best anchor at .8, so nothing is of low quality.
    assert assigned([0.8, 0.7, 0.69, 0.3, 0.29]) == [0, 0, IGNORED, IGNORED, BACKGROUND]


def test_the_best_anchor_of_a_box_needs_an_overlap_of_three_tenths() -> None:
    assert assigned([0.3, 0.1]) == [0, BACKGROUND]
    assert assigned([0.29, 0.1]) == [BACKGROUND, BACKGROUND]


def test_all_anchors_that_tie_for_a_box_are_assigned() -> None:
    assert assigned([0.4, 0.2, 0.4, 0.39]) == [0, BACKGROUND, 0, IGNORED]


def test_the_best_anchor_of_a_box_is_taken_from_a_box_that_it_overlaps_more() -> None:
    # torchvision would leave anchor 0 with its own best box, 0.
    assert assigned([0.9, 0.75], [0.5, 0.2]) == [1, 0]


def test_a_later_box_takes_from_an_earlier_one() -> None:
    assert assigned([0.6, 0.0], [0.6, 0.0]) == [1, BACKGROUND]


def test_without_boxes_everything_is_background() -> None:
    assert assign(torch.zeros(0, 3), RPN_RULE).tolist() == [BACKGROUND] * 3
    assert assign(torch.zeros(2, 0, 3), ROI_RULE).shape == (2, 3)
    assert assign(torch.zeros(2, 0), RPN_RULE).shape == (0,)


def test_regions_have_no_low_quality_matches_and_none_is_ignored() -> None:
    table = torch.tensor([[0.49, 0.5, 0.0]])
    assert assign(table, ROI_RULE).tolist() == [BACKGROUND, 0, BACKGROUND]
