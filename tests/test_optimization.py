import math

import pytest
import torch
from torch import Tensor, nn

from relloc.optimization import (
    Gradients,
    StepReport,
    StepsDone,
    all_finite,
    milestone_factor,
    run_steps,
    set_rates,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)).to(
        memory_format=torch.channels_last
    )


def backward(model: nn.Module, images: Tensor) -> None:
    model(images).square().mean().backward()


def test_backwards_add_to_gradients_that_keep_their_place_and_have_the_layout_of_the_weights() -> (
    None
):
    owned, plain = network(), network()
    gradients = Gradients(owned.parameters())
    addresses = [value.grad.data_ptr() for value in owned.parameters()]
    for images in torch.randn(2, 4, 3, 4, 4):
        backward(owned, images)
        backward(plain, images)
    for value, other, address in zip(
        owned.parameters(), plain.parameters(), addresses, strict=True
    ):
        assert torch.equal(value.grad, other.grad)
        assert value.grad.data_ptr() == address
        assert value.grad.stride() == value.stride()
    gradients.average()  # one process: they are their own mean
    assert all(
        torch.equal(value.grad, other.grad)
        for value, other in zip(owned.parameters(), plain.parameters(), strict=True)
    )
    gradients.clear()
    assert all(value.grad.abs().max() == 0 for value in owned.parameters())


def test_what_is_not_trained_gets_no_gradient() -> None:
    model = network()
    model[0].requires_grad_(False)
    Gradients(model.parameters())
    assert [value.grad is None for value in model.parameters()] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_rates_are_multiples_of_the_first_ones_also_in_a_process_that_goes_on() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]], "lr": 2.0}]
    )
    assert set_rates(optimizer, 0.1) == 0.05
    other = torch.optim.SGD(
        [{"params": [weights[0]], "lr": 7.0}, {"params": [weights[1]], "lr": 7.0}]
    )
    other.load_state_dict(optimizer.state_dict())
    assert set_rates(other, 1.0) == 0.5
    assert [group["lr"] for group in other.param_groups] == [0.5, 2.0]


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1), (1.9, 1), (2, 0.1), (3, 0.1), (4.5, 0.01)])
def test_rates_fall_when_a_milestone_is_reached(epoch: float, factor: float) -> None:
    assert milestone_factor(epoch, [2, 4], 0.1) == pytest.approx(factor)


def test_steps_are_added_up_between_reports_and_what_was_not_reported_is_kept() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    reports: list[StepReport] = []
    seen: list[StepsDone] = []

    def steps_to(last: int, done: StepsDone) -> int:
        return run_steps(
            lambda number: torch.tensor([number, 1.0]),
            optimizer=optimizer,
            rate_factor=lambda number: 1 / (number + 1),
            done=done,
            steps=5,
            report_every=2,
            report=reports.append,
            after_step=lambda done: seen.append(done) or done.step == last,
        )

    assert steps_to(3, StepsDone(step=0, sums=torch.zeros(2))) == 3
    assert seen[-1].sums.tolist() == [2, 1]
    assert steps_to(9, seen[-1]) == 5
    assert [report.step for report in reports] == [2, 4, 5]
    assert [report.sums for report in reports] == [[0 + 1, 2], [2 + 3, 2], [4, 1]]
    assert [report.lr for report in reports] == [1 / 2, 1 / 4, 1 / 5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_also_in_a_statistic(value: float) -> None:
    model = network()
    assert all_finite(model)
    model[1].running_var[3] = value
    assert not all_finite(model)
