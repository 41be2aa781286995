import pytest
import torch

from relloc.transfer.detection.groups import mean_over_groups

SUMS = torch.tensor([1.0, 2.0, 3.0, 10.0, 7.0])
COUNTS = torch.tensor([2, 2, 4, 1, 2])


def test_each_group_is_divided_by_its_own_samples() -> None:
    cases = (
        ([0, 0, 1, 1], (3 / 4 + 13 / 5) / 2),
        ([3, 3, 3, 3], 16 / 9),
        ([0, 1], (1 / 2 + 2 / 2) / 2),
        ([0], 1 / 2),
    )
    for groups, expected in cases:
        n = len(groups)
        assert mean_over_groups(SUMS[:n], COUNTS[:n], groups).item() == pytest.approx(expected)


def test_a_group_counts_by_its_images() -> None:
    expected = 2 / 5 * 3 / 4 + 2 / 5 * 13 / 5 + 1 / 5 * 7 / 2
    assert mean_over_groups(SUMS, COUNTS, [0, 0, 1, 1, 2]).item() == pytest.approx(expected)


def test_images_stay_in_their_groups_where_others_are_missing() -> None:
    # The second image is missing: the others are not divided anew.
    found = mean_over_groups(SUMS[[0, 2, 3]], COUNTS[[0, 2, 3]], [0, 1, 1])
    assert found.item() == pytest.approx(1 / 3 * 1 / 2 + 2 / 3 * 13 / 5)


def test_no_samples_and_no_images_give_zero() -> None:
    nothing = torch.zeros(2)
    assert mean_over_groups(nothing, nothing, [0, 0]).item() == 0
    assert mean_over_groups(nothing[:0], nothing[:0], []).item() == 0


def test_gradients_are_the_weights_of_the_images() -> None:
    sums = SUMS.clone().requires_grad_()
    mean_over_groups(sums, COUNTS, [0, 0, 1, 1, 2]).backward()
    assert sums.grad is not None
    expected = [2 / 5 / 4, 2 / 5 / 4, 2 / 5 / 5, 2 / 5 / 5, 1 / 5 / 2]
    assert sums.grad.tolist() == pytest.approx(expected)
