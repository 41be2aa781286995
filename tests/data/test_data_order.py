import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.data.order import StepPlan, StepSampler
from relloc.errors import DataError

Ghost = list[tuple[int, int]]


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    ghost, ghosts, world, accumulation = (draw(st.integers(1, most)) for most in (4, 3, 3, 3))
    step = ghost * ghosts * world * accumulation
    return StepPlan(
        n_images=draw(st.integers(step, 4 * step + 3)),
        images_per_step=step,
        images_per_batch_norm=ghost,
        images_per_forward=ghost * ghosts,
        world=world,
    )


def sampled(
    plan: StepPlan, steps: int, seed: int = 0, first_step: int = 0, rank: int = 0
) -> list[Ghost]:
    sampler = StepSampler(plan, seed=seed, first_step=first_step, steps=steps, rank=rank)
    ghosts = list(sampler)
    assert (
        len(ghosts)
        == len(sampler)
        == (steps - first_step) * plan.accumulation * plan.ghosts_per_forward
    )
    assert all(len(ghost) == plan.images_per_batch_norm for ghost in ghosts)
    return ghosts


def by_step(plan: StepPlan, steps: int, seed: int = 0) -> list[Ghost]:
    """What all ranks take in each step, rank after rank."""
    ranks = [iter(sampled(plan, steps, seed, rank=rank)) for rank in range(plan.world)]
    of_rank = plan.accumulation * plan.ghosts_per_forward
    return [
        list(
            itertools.chain.from_iterable(
                ghost for rank in ranks for ghost in itertools.islice(rank, of_rank)
            )
        )
        for _ in range(steps)
    ]


@given(plans(), st.integers(0, 2**32))
def test_every_epoch_takes_images_once_each_in_an_order_of_its_own(
    plan: StepPlan, seed: int
) -> None:
    epochs = 3
    steps = by_step(plan, epochs * plan.steps_per_epoch, seed)
    assert (
        plan.n_images - plan.images_per_step
        < plan.steps_per_epoch * plan.images_per_step
        <= plan.n_images
    )
    for epoch in range(epochs):
        of_epoch = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        indices = [index for step in of_epoch for index, _ in step]
        assert len(set(indices)) == len(indices) == plan.steps_per_epoch * plan.images_per_step
        assert set(indices) <= set(range(plan.n_images))


def test_orders_are_shuffled_and_other_in_each_epoch_and_for_each_seed() -> None:
    plan = StepPlan(n_images=1000, images_per_step=10, images_per_batch_norm=10)
    epochs = [[index for index, _ in itertools.chain(*sampled(plan, 200, seed))] for seed in (0, 1)]
    orders = [np.array(part) for epoch in epochs for part in (epoch[:1000], epoch[1000:])] + [
        np.arange(1000)
    ]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


@given(plans(), st.data())
def test_resuming_at_a_step_gives_the_tail_of_the_same_sequence(
    plan: StepPlan, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    first = data.draw(st.integers(0, steps))
    for rank in range(plan.world):
        whole = sampled(plan, steps, rank=rank)
        assert (
            sampled(plan, steps, first_step=first, rank=rank)
            == whole[first * plan.accumulation * plan.ghosts_per_forward :]
        )


@given(plans())
def test_any_number_of_processes_and_forwards_takes_the_same_ghost_batches_in_a_step(
    plan: StepPlan,
) -> None:
    steps = 2 * plan.steps_per_epoch
    alone = StepPlan(
        n_images=plan.n_images,
        images_per_step=plan.images_per_step,
        images_per_batch_norm=plan.images_per_batch_norm,
    )
    assert (alone.accumulation, alone.forward_images) == (1, plan.images_per_step)
    found = by_step(plan, steps)
    assert found == by_step(alone, steps)
    assert all(len({index for index, _ in step}) == plan.images_per_step for step in found)


def test_an_image_gets_another_key_in_every_epoch() -> None:
    plan = StepPlan(n_images=40, images_per_step=8, images_per_batch_norm=4)
    keys = list(itertools.chain(*sampled(plan, 15, seed=3)))
    assert len(set(keys)) == len(keys) == 120
    assert {epoch for _, epoch in keys} == {0, 1, 2}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            (100, 30, 20, 20, 1),
            "recipe.images_per_step is 30.* 20: .* 1 processes",
        ),
        (
            (100, 64, 32, 32, 4),
            "recipe.images_per_step is 64.* 128: .* 4 processes",
        ),
        (
            (100, 64, 8, 12, 1),
            "images_per_forward is 12.* 8: .*images_per_batch_norm=8 ",
        ),
        (
            (10, 64, 32, 32, 1),
            "^10 training images .* 64 .*: add recipe.images_per",
        ),
        ((100, 0, 8, 8, 1), "recipe.images_per_step is 0, .* 1 or more"),
        ((100, 8, 0, 8, 1), "recipe.images_per_batch_norm 0, .* 1 or more"),
        ((100, -8, 8, 8, 1), "recipe.images_per_step is -8, .* 1 or more"),
        ((100, 8, 8, 8, 0), " 0 processes: .* 1 or more"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(
    numbers: tuple[int, ...], message: str
) -> None:
    names = ("n_images", "images_per_step", "images_per_batch_norm", "images_per_forward", "world")
    with pytest.raises(DataError, match=message):
        StepPlan(**dict(zip(names, numbers, strict=True)))


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 3), st.integers(1, 3))
def test_what_is_told_for_few_images_makes_a_plan(
    n_images: int, ghost: int, ghosts: int, world: int
) -> None:
    given_numbers = {
        "images_per_step": 512 * ghost * ghosts * world,
        "images_per_batch_norm": ghost,
    }
    with pytest.raises(DataError, match=r": add recipe\.images_per_step|: .*\d process") as error:
        StepPlan(n_images=n_images, images_per_forward=ghost * ghosts, world=world, **given_numbers)
    advice = dict(word.split("=") for word in str(error.value).partition(": add ")[2].split())
    numbers = given_numbers | {
        key.removeprefix("recipe."): int(value) for key, value in advice.items() if value != "auto"
    }
    if advice:
        forward = (
            None
            if "images_per_forward" in advice
            else min(ghost * ghosts, numbers["images_per_batch_norm"])
        )
        StepPlan(n_images=n_images, images_per_forward=forward, world=world, **numbers)


def test_an_epoch_drops_its_incomplete_last_step() -> None:
    plan = StepPlan(
        n_images=25, images_per_step=8, images_per_batch_norm=2, images_per_forward=2, world=2
    )
    assert (plan.steps_per_epoch, plan.accumulation) == (3, 2)
