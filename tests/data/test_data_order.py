import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.data.order import StepPlan, StepSampler, key
from relloc.errors import DataError

Forward = list[tuple[int, int]]


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    forward, world, accumulation = (draw(st.integers(1, most)) for most in (5, 3, 3))
    step = forward * world * accumulation
    return StepPlan(
        n_images=draw(st.integers(step, 4 * step + 3)),
        images_per_step=step,
        images_per_forward=forward,
        world=world,
    )


def sampled(plan: StepPlan, steps: int, seed: int = 0, first_step: int = 0, rank: int = 0) -> list[Forward]:
    sampler = StepSampler(plan, seed=seed, first_step=first_step, steps=steps, rank=rank)
    forwards = list(sampler)
    assert len(forwards) == len(sampler) == (steps - first_step) * plan.accumulation
    assert all(len(forward) == plan.images_per_forward for forward in forwards)
    return forwards


def by_step(plan: StepPlan, steps: int, seed: int = 0) -> list[Forward]:
    """What all ranks take in each step, in the order of one process: forward by forward, rank by rank."""
    ranks = [sampled(plan, steps, seed, rank=rank) for rank in range(plan.world)]
    in_order = itertools.chain.from_iterable(zip(*ranks, strict=True))
    per_step = plan.accumulation * plan.world
    return [list(itertools.chain.from_iterable(itertools.islice(in_order, per_step))) for _ in range(steps)]


@given(plans(), st.integers(0, 2**32))
def test_every_epoch_takes_images_once_each_in_an_order_of_its_own(plan: StepPlan, seed: int) -> None:
    epochs = 3
    steps = by_step(plan, epochs * plan.steps_per_epoch, seed)
    assert plan.n_images - plan.images_per_step < plan.steps_per_epoch * plan.images_per_step <= plan.n_images
    for epoch in range(epochs):
        of_epoch = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        indices = [index for step in of_epoch for index, _ in step]
        assert len(set(indices)) == len(indices) == plan.steps_per_epoch * plan.images_per_step
        assert set(indices) <= set(range(plan.n_images))


def test_orders_are_shuffled_and_other_in_each_epoch_and_for_each_seed() -> None:
    plan = StepPlan(n_images=1000, images_per_step=10, images_per_forward=10)
    epochs = [[index for index, _ in itertools.chain(*sampled(plan, 200, seed))] for seed in (0, 1)]
    orders = [np.array(part) for epoch in epochs for part in (epoch[:1000], epoch[1000:])] + [np.arange(1000)]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


@given(plans(), st.data())
def test_resuming_at_a_step_gives_the_tail_of_the_same_sequence(plan: StepPlan, data: st.DataObject) -> None:
    steps = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    first = data.draw(st.integers(0, steps))
    for rank in range(plan.world):
        whole = sampled(plan, steps, rank=rank)
        assert sampled(plan, steps, first_step=first, rank=rank) == whole[first * plan.accumulation :]


@given(plans())
def test_ranks_and_accumulation_partition_a_step_like_one_process_does(plan: StepPlan) -> None:
    steps = 2 * plan.steps_per_epoch
    alone = StepPlan(
        n_images=plan.n_images, images_per_step=plan.images_per_step, images_per_forward=plan.images_per_forward
    )
    assert alone.accumulation == plan.accumulation * plan.world
    found = by_step(plan, steps)
    assert found == by_step(alone, steps)
    assert all(len({index for index, _ in step}) == plan.images_per_step for step in found)


def test_one_process_that_accumulates_two_forwards_is_two_processes() -> None:
    sizes = {"n_images": 50, "images_per_step": 8, "images_per_forward": 4}
    alone = sampled(StepPlan(**sizes), 12)
    first, second = (sampled(StepPlan(**sizes, world=2), 12, rank=rank) for rank in (0, 1))
    assert alone[0::2] == first
    assert alone[1::2] == second


def test_an_image_gets_another_seed_in_every_epoch_and_other_images_other_seeds() -> None:
    plan = StepPlan(n_images=40, images_per_step=8, images_per_forward=4)
    samples = list(itertools.chain(*sampled(plan, 15)))
    assert len(samples) == 120
    assert len({seed for _, seed in samples}) == 120
    assert all(0 <= seed < 2**63 for _, seed in samples)


def test_a_key_is_decided_by_its_numbers_and_their_order_and_has_63_mixed_bits() -> None:
    assert key(1, 2, 3) == key(1, 2, 3)
    assert len({key(1, 2), key(2, 1), key(1, 2, 1), key(1, 3)}) == 4
    keys = np.array([key(0, 0, number) for number in range(500)], dtype=np.uint64)
    ones = np.array([((keys >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert ones[63] == 0
    assert np.abs(ones[:63] - 0.5).max() < 0.1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((100, 30, 20, 1), "data.images_per_step is 30, not a multiple of 20 images_per_forward x 1 processes = 20"),
        ((100, 64, 32, 4), "data.images_per_step is 64, not a multiple of 32 images_per_forward x 4 processes = 128"),
        ((10, 64, 32, 1), r"10 training images are fewer .* data.images_per_step \(now 64\) .* to 10 or less"),
        ((100, 0, 8, 1), "data.images_per_step is 0, .*each must be 1 or more"),
        ((100, 8, 0, 1), "data.images_per_forward 0, .*each must be 1 or more"),
        ((100, -8, 8, 1), "data.images_per_step is -8, .*each must be 1 or more"),
        ((100, 8, 8, 0), "on 0 processes: each must be 1 or more"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(numbers: tuple[int, int, int, int], message: str) -> None:
    names = ("n_images", "images_per_step", "images_per_forward", "world")
    with pytest.raises(DataError, match=message):
        StepPlan(**dict(zip(names, numbers, strict=True)))


def test_an_epoch_drops_its_incomplete_last_step() -> None:
    plan = StepPlan(n_images=25, images_per_step=8, images_per_forward=2, world=2)
    assert (plan.steps_per_epoch, plan.accumulation) == (3, 2)
