import pytest
import torch

from relloc.transfer.detection.groups import mean_over_groups

SUMS = torch.tensor([1.0, 2.0, 3.0, 10.0, 7.0])
COUNTS = torch.tensor([2, 2, 4, 1, 2])


def test_each_group_is_divided_by_its_own_samples() -> None:
    assert mean_over_groups(SUMS[:4], COUNTS[:4], 2).item() == pytest.approx((3 / 4 + 13 / 5) / 2)
    assert mean_over_groups(SUMS[:4], COUNTS[:4], 4).item() == pytest.approx(16 / 9)
    assert mean_over_groups(SUMS[:2], COUNTS[:2], 1).item() == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert mean_over_groups(SUMS[:1], COUNTS[:1], 2).item() == pytest.approx(1 / 2)


def test_a_last_group_counts_by_its_images() -> None:
    expected = 2 / 5 * 3 / 4 + 2 / 5 * 13 / 5 + 1 / 5 * 7 / 2
    assert mean_over_groups(SUMS, COUNTS, 2).item() == pytest.approx(expected)


def test_no_samples_and_no_images_give_zero() -> None:
    nothing = torch.zeros(2)
    assert mean_over_groups(nothing, nothing, 2).item() == 0
    assert mean_over_groups(nothing[:0], nothing[:0], 2).item() == 0


def test_gradients_are_the_weights_of_the_images() -> None:
    sums = SUMS.clone().requires_grad_()
    mean_over_groups(sums, COUNTS, 2).backward()
    assert sums.grad is not None
    expected = [2 / 5 / 4, 2 / 5 / 4, 2 / 5 / 5, 2 / 5 / 5, 1 / 5 / 2]
    assert sums.grad.tolist() == pytest.approx(expected)
