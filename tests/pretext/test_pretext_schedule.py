import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.pretext.schedule import Constant, Cosine, Schedule, Step

CARD = Step(epochs=70, warmup_epochs=5, warmup_from=0.1, milestone_epochs=[30, 50], gamma=0.1)
CARD_STEPS_PER_EPOCH = 2502
BASE = 0.2


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.02),
        (2.5, 0.11),
        (5, 0.2),
        (30 - 1 / 2502, 0.2),
        (30, 0.02),
        (50 - 1 / 2502, 0.02),
        (50, 0.002),
        (69.999, 0.002),
    ],
)
def test_the_step_schedule_of_the_card_has_the_published_rates(epoch: float, rate: float) -> None:
    assert BASE * CARD.factor(epoch) == pytest.approx(rate, rel=1e-9)


def test_warmup_rises_by_the_same_amount_each_step() -> None:
    steps = range(5 * CARD_STEPS_PER_EPOCH)
    factors = [CARD.factor(step / CARD_STEPS_PER_EPOCH) for step in steps]
    rises = {round(after - before, 12) for before, after in pairwise(factors)}
    assert rises == {round(0.9 / (5 * CARD_STEPS_PER_EPOCH), 12)}


def test_cosine_is_half_a_cosine_from_the_end_of_warmup_to_zero_at_the_end() -> None:
    schedule = Cosine(epochs=20, warmup_epochs=4, warmup_from=0.25)
    expected = {
        0: 0.25,
        2: 0.625,
        4: 1.0,
        8: 0.5 + math.sqrt(2) / 4,
        12: 0.5,
        16: 0.5 - math.sqrt(2) / 4,
        20: 0.0,
    }
    for epoch, factor in expected.items():
        assert schedule.factor(epoch) == pytest.approx(factor, abs=1e-12)


@given(
    epochs=st.floats(0.5, 100),
    warmup_share=st.floats(0, 1),
    warmup_from=st.floats(0, 1),
    share_done=st.floats(0, 1, exclude_max=True),
)
def test_no_factor_leaves_0_to_1_and_warmup_never_falls(
    epochs: float, warmup_share: float, warmup_from: float, share_done: float
) -> None:
    spans = {"epochs": epochs, "warmup_epochs": warmup_share * epochs, "warmup_from": warmup_from}
    epoch = share_done * epochs
    for schedule in (
        Cosine(**spans),
        Step(**spans, milestone_epochs=[epochs / 2], gamma=0.1),
        Constant(epochs=epochs),
    ):
        assert isinstance(schedule, Schedule)
        assert 0 <= schedule.factor(epoch) <= 1
    earlier = min(epoch, spans["warmup_epochs"]) / 2
    assert Cosine(**spans).factor(earlier) <= Cosine(**spans).factor(2 * earlier) + 1e-12


def test_constant_stays() -> None:
    schedule = Constant(epochs=3)
    assert [schedule.factor(epoch) for epoch in (0, 1.5, 2.99)] == [1.0, 1.0, 1.0]


SPANS = {"epochs": 10, "warmup_epochs": 1, "warmup_from": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "schedule.epochs is 0.* above 0"),
        ({"epochs": -1}, "schedule.epochs is -1"),
        ({"warmup_epochs": 11}, r"schedule\.warmup_epochs is 11\b.*\b10 epochs"),
        ({"warmup_epochs": -1}, "schedule.warmup_epochs is -1"),
        ({"warmup_from": 1.5}, r"schedule.warmup_from is 1.5.* from 0 to 1"),
    ],
)
def test_spans_that_do_not_fit_are_errors_with_their_numbers(
    changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Cosine(**{**SPANS, **changes})
    with pytest.raises(ValueError, match=message):
        Step(**{**SPANS, **changes}, milestone_epochs=[], gamma=0.1)


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ([5, 10], r"\b10 .*\b10 epochs"),
        ([5, 12.5], "12.5 is never reached"),
        ([6, 3], r"schedule.milestone_epochs is \[6, 3\]"),
        ([3, 3], r"schedule.milestone_epochs is \[3, 3\]"),
    ],
)
def test_milestones_that_never_act_are_errors(milestones: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Step(**SPANS, milestone_epochs=milestones, gamma=0.1)
