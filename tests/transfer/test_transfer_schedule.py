from typing import Any

import pytest
import torch

from relloc.transfer.schedule import Milestones, Poly


def test_milestones_with_linear_warm_up_are_those_of_the_detectors() -> None:
    detector = Milestones(milestones=[18_000, 22_000], gamma=0.1, warmup=100, warmup_from=0.001)
    for step in range(100):
        assert detector.factor(step) == pytest.approx(1 - (1 - step / 100) * 0.999)
    assert detector.factor(0) == 0.001
    assert [detector.factor(step) for step in (100, 17_999, 18_000, 21_999)] == [1, 1, 0.1, 0.1]
    assert detector.factor(22_000) == detector.factor(23_999) == pytest.approx(0.01)


@pytest.mark.parametrize("milestones", [[], [1], [2, 5], [3, 9]])
def test_milestones_are_those_of_torch(milestones: list[int]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    schedule = Milestones(milestones=milestones, gamma=0.2)
    for epoch in range(8):
        assert schedule.factor(epoch) == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


def test_a_milestone_within_the_warm_up_acts_on_it() -> None:
    assert Milestones(milestones=[5], gamma=0.5, warmup=10, warmup_from=0).factor(
        6
    ) == pytest.approx(0.5 * 0.6)


def test_the_poly_schedule_is_that_of_the_segmenters() -> None:
    segmenter = Poly(length=20_000, power=0.9, floor=1e-4 / 0.01)
    for step in (0, 1, 999, 10_000, 19_999):
        expected = (0.01 - 1e-4) * (1 - step / 20_000) ** 0.9 + 1e-4
        assert 0.01 * segmenter.factor(step) == pytest.approx(expected, rel=1e-12)
    assert segmenter.factor(0) == 1
    assert segmenter.factor(20_000) == segmenter.factor(30_000) == pytest.approx(0.01)
    assert Poly(length=4, power=1).factor(3) == 0.25


def test_a_constant_rate_stays() -> None:
    assert {Milestones(milestones=[], gamma=1).factor(position) for position in (0, 7.5, 1e6)} == {
        1.0
    }


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (Milestones, {"milestones": [2, 1], "gamma": 0.1}, "rise"),
        (Milestones, {"milestones": [1, 1], "gamma": 0.1}, "rise"),
        (Milestones, {"milestones": [], "gamma": 0}, "gamma is 0"),
        (Milestones, {"milestones": [], "gamma": 1, "warmup": -1}, "warmup is -1"),
        (Milestones, {"milestones": [], "gamma": 1, "warmup_from": 2}, "warmup_from is 2"),
        (Poly, {"length": 0, "power": 1}, "length is 0"),
        (Poly, {"length": 1, "power": float("inf")}, "power is inf"),
        (Poly, {"length": 1, "power": 1, "floor": -0.1}, "floor is -0.1"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(
    schedule: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**settings)
