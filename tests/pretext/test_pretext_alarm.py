import math

import pytest
import torch
from torch import nn

from relloc.errors import UsageError
from relloc.pretext.alarm import Alarm, Diverged, check_finite
from relloc.pretext.loop import Progress
from relloc.pretext.questions import CENTER_PAIRS

CHANCE_LOSS = CENTER_PAIRS.chance_loss


def at(step: int, loss: float) -> Progress:
    return Progress(step=step, epoch=step / 10, loss=loss, top1=12.5, lr=0.1)


def new_alarm(*, first_step: int = 0) -> tuple[Alarm, list[str]]:
    warnings: list[str] = []
    alarm = Alarm(
        chance_loss=CHANCE_LOSS,
        collapse_steps=100,
        first_step=first_step,
        warn=warnings.append,
    )
    return alarm, warnings


def test_chance_is_the_loss_of_a_network_that_answers_all_alike() -> None:
    logits, labels = torch.zeros(8, 8), torch.arange(8)
    assert (
        pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6) == CHANCE_LOSS
    )
    assert round(CHANCE_LOSS, 3) == 2.079


def test_a_loss_that_stays_at_chance_is_said_once_with_what_to_try() -> None:
    alarm, warnings = new_alarm()
    for step in range(10, 100, 10):
        alarm.check(at(step, CHANCE_LOSS + 0.009 * (-1) ** step))
    assert warnings == []
    for step in range(100, 500, 10):
        alarm.check(at(step, CHANCE_LOSS))
    assert len(warnings) == 1
    for words in (
        "2.079",
        "100 steps",
        "at chance",
        "optimizer.lr",
        "schedule.warmup_epochs",
        "grid.gap_px",
    ):
        assert words in warnings[0]


@pytest.mark.parametrize("loss", [1.5, CHANCE_LOSS - 0.011, CHANCE_LOSS + 0.011, 7.0])
def test_leaving_chance_starts_the_count_anew(loss: float) -> None:
    alarm, warnings = new_alarm()
    alarm.check(at(50, CHANCE_LOSS))
    alarm.check(at(90, loss))
    alarm.check(at(189, CHANCE_LOSS))
    assert warnings == []
    alarm.check(at(190, CHANCE_LOSS))
    assert len(warnings) == 1


def test_a_resumed_run_counts_from_where_it_went_on() -> None:
    alarm, warnings = new_alarm(first_step=1000)
    alarm.check(at(1099, CHANCE_LOSS))
    assert warnings == []
    alarm.check(at(1100, CHANCE_LOSS))
    assert len(warnings) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_training(loss: float) -> None:
    alarm, warnings = new_alarm()
    with pytest.raises(Diverged, match=rf"loss is {loss}\b.*\bstep 7\b.*\b0\.1\b") as raised:
        alarm.check(at(7, loss))
    assert isinstance(raised.value, UsageError)  # shown without a traceback
    assert warnings == []


def test_finite_weights_pass_however_large_or_small() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight.data.fill_(1e15)
    model[1].weight.data.fill_(1e-40)
    check_finite(model, step=3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, -1])
def test_one_weight_that_is_not_finite_is_enough(value: float, index: int) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    list(model.parameters())[index].data.view(-1)[-1] = value
    with pytest.raises(Diverged, match="not finite after step 3"):
        check_finite(model, step=3)


def test_running_statistics_have_to_be_finite_too() -> None:
    model = nn.BatchNorm2d(2)
    check_finite(model, step=3)
    model.running_var[1] = math.inf  # activations overflow before weights do
    with pytest.raises(Diverged, match="not finite after step 3"):
        check_finite(model, step=3)
