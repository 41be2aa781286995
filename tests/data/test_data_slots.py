import collections
import errno
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from relloc.data import slots
from relloc.data.loader import ImageBatch, Sample, load
from relloc.data.slots import load_in_slots

SIDE, IMAGES, HELD = 6, 4, 3


class Numbered(Dataset[Sample]):
    """Images filled with their number; every tenth can't be read."""

    def __getitem__(self, index: int) -> Sample:
        if index % 10 == 9:
            return Sample(index=index, pixels=None, unreadable={str(index): "is broken"})
        rows = np.arange(SIDE * SIDE * 3).reshape(SIDE, SIDE, 3) + index
        return Sample(index=index, pixels=rows.astype(np.uint8))


def keys(n: int = 40) -> list[list[int]]:
    """Batches of four, with one of two at the end."""
    return [
        list(range(4 * number, 4 * number + (4 if number < n - 1 else 2))) for number in range(n)
    ]


def in_slots(
    workers: int, batches_held: int = HELD, print_message: Callable[[str], None] = print
) -> Iterator[ImageBatch]:
    return load_in_slots(
        Numbered(),
        keys(),
        workers=workers,
        pin=False,
        images=IMAGES,
        side_px=SIDE,
        batches_held=batches_held,
        print_message=print_message,
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_the_plain_loader_in_its_order(workers: int) -> None:
    count = 0
    for found, expected in zip(
        in_slots(workers), load(Numbered(), keys(), workers=0, pin=False), strict=True
    ):
        assert torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.indices, expected.indices)
        assert found.unreadable == expected.unreadable
        count += 1
    assert count == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_the_last_batches_stay_as_they_were_while_workers_run_ahead(workers: int) -> None:
    last: collections.deque[tuple[ImageBatch, torch.Tensor]] = collections.deque(maxlen=HELD)
    for batch in in_slots(workers):
        last.append((batch, batch.pixels.clone()))
        assert all(torch.equal(batches_held.pixels, copied) for batches_held, copied in last)


def test_memory_is_used_again() -> None:
    addresses = [batch.pixels.data_ptr() for batch in in_slots(1, batches_held=1)]
    assert len(set(addresses)) == 1 * 2 + 1 + 1  # two batches ahead, one held, one just taken


def test_pixels_lie_channels_last() -> None:
    assert all(
        batch.pixels.is_contiguous(memory_format=torch.channels_last) for batch in in_slots(1)
    )


def test_where_no_memory_can_be_shared_the_plain_loader_serves_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_shape: object) -> torch.Tensor:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(slots, "shared_with_forks", full)
    said: list[str] = []
    assert_plain(list(in_slots(1, print_message=said.append)))
    assert "Cannot allocate memory" in said[0]
    assert "workers=" in said[0]


@pytest.mark.slow
def test_where_processes_are_not_forked_the_plain_loader_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert_plain(list(in_slots(2)))


def assert_plain(found: list[ImageBatch]) -> None:
    """Batches as `load` gives them, each in memory of its own."""
    expected = list(load(Numbered(), keys(), workers=0, pin=False))
    assert [batch.indices.tolist() for batch in found] == [
        batch.indices.tolist() for batch in expected
    ]
    assert all(
        torch.equal(one.pixels, other.pixels) for one, other in zip(found, expected, strict=True)
    )
    assert len({batch.pixels.data_ptr() for batch in found}) == len(found)
