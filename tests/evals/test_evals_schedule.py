import pytest
import torch

from relloc.evals.schedule import factor, in_words


@pytest.mark.parametrize("milestones", [[], [1], [2, 5], [3, 9]])
def test_rates_are_those_of_torch(milestones: list[int]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    for epoch in range(8):
        assert factor(epoch, milestones, 0.2) == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


def test_words_name_the_milestones_that_are_reached() -> None:
    assert in_words(90, [30, 60, 90], 0.1) == "90 epochs, x0.1 at 30, 60"
    assert in_words(1, [30, 60], 0.1) == "1 epochs"
