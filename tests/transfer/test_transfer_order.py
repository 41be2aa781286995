import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from relloc.transfer.order import endless, grouped, steps, steps_by_epochs, steps_in_epoch


def taken(*, gpus: int, images_per_gpu: int, n: int, n_steps: int) -> list[list[list[int]]]:
    """The first steps over `n` images, of which every third is a portrait."""
    dealt = steps(
        range(n),
        lambda index: index % 3 == 0,
        gpus=gpus,
        images_per_gpu=images_per_gpu,
        seed=5,
    )
    return list(itertools.islice(dealt, n_steps))


@given(n=st.integers(1, 20), seed=st.integers(0, 5))
def test_each_image_is_seen_once_before_any_is_seen_again(n: int, seed: int) -> None:
    stream = endless(range(100, 100 + n), seed)
    epochs = [list(itertools.islice(stream, n)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(100, 100 + n)) for epoch in epochs)


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    stream = endless(range(50), 0)
    first, second = (list(itertools.islice(stream, 50)) for _ in range(2))
    other_seed = list(itertools.islice(endless(range(50), 1), 50))
    assert first != second
    assert first != other_seed


def test_a_group_comes_as_soon_as_it_is_full() -> None:
    groups = grouped(iter([1, 2, 3, 5, 4, 7]), lambda index: index % 2, 2)
    assert list(groups) == [[1, 3], [2, 4], [5, 7]]


def test_images_of_a_gpu_are_of_one_kind() -> None:
    for groups in taken(gpus=4, images_per_gpu=2, n=31, n_steps=50):
        assert len(groups) == 4
        for group in groups:
            assert len(group) == 2
            assert len({index % 3 == 0 for index in group}) == 1


def test_groups_are_those_of_a_sampler_on_each_gpu_written_out() -> None:
    """mmdetection's InfiniteGroupBatchSampler, with a buffer for each kind, on three GPUs."""
    stream = list(itertools.islice(endless(range(31), 5), 31 * 20))
    expected = []
    for gpu in range(3):
        buffers: dict[bool, list[int]] = {True: [], False: []}
        of_gpu = []
        for position, index in enumerate(stream):
            if position % 3 != gpu:
                continue
            buffer = buffers[index % 3 == 0]
            buffer.append(index)
            if len(buffer) == 2:
                of_gpu.append(list(buffer))
                buffer.clear()
        expected.append(of_gpu)
    found = taken(gpus=3, images_per_gpu=2, n=31, n_steps=60)
    for number, groups in enumerate(found):
        assert groups == [of_gpu[number] for of_gpu in expected]


def test_all_gpus_together_see_images_about_equally_often() -> None:
    counts: Counter[int] = Counter()
    for groups in taken(gpus=4, images_per_gpu=2, n=40, n_steps=50):
        counts.update(itertools.chain.from_iterable(groups))
    # 400 images of 40, and at most a group of each kind and GPU waits
    assert set(counts.values()) <= {9, 10, 11}


def is_portrait(index: int) -> bool:
    return index % 3 == 0


@given(n=st.integers(1, 60), gpus=st.integers(1, 4), images_per_gpu=st.integers(1, 3))
def test_an_epoch_has_each_image_and_fills_up_each_kind(
    n: int, gpus: int, images_per_gpu: int
) -> None:
    """mmdetection's DistributedGroupSampler: kinds are filled up to whole steps by repeats."""
    dealt = steps_by_epochs(range(n), is_portrait, gpus=gpus, images_per_gpu=images_per_gpu, seed=5)
    a_step = gpus * images_per_gpu
    n_steps = steps_in_epoch(range(n), is_portrait, a_step)
    orders = []
    for _ in range(2):
        epoch = list(itertools.islice(dealt, n_steps))
        assert {len(groups) for groups in epoch} == {gpus}
        groups = list(itertools.chain.from_iterable(epoch))
        for group in groups:
            assert len(group) == images_per_gpu
            assert len({is_portrait(index) for index in group}) == 1
        counts = Counter(itertools.chain.from_iterable(groups))
        assert set(counts) == set(range(n))
        for kind in (True, False):
            of_kind = [counts[index] for index in range(n) if is_portrait(index) is kind]
            if of_kind:
                assert sum(of_kind) % a_step == 0
                assert sum(of_kind) - len(of_kind) < a_step
                # Repeats are spread over the kind.
                assert max(of_kind) - min(of_kind) <= 1
        orders.append(groups)
    if n > 20:
        assert orders[0] != orders[1]


def test_both_kinds_come_throughout_an_epoch_by_epochs() -> None:
    dealt = steps_by_epochs(range(96), is_portrait, gpus=2, images_per_gpu=2, seed=0)
    kinds = [[is_portrait(group[0]) for group in groups] for groups in itertools.islice(dealt, 24)]
    first, second = kinds[:12], kinds[12:]
    for part in (first, second):
        assert {kind for of_step in part for kind in of_step} == {True, False}
