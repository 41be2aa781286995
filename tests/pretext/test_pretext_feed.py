import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from relloc.pretext.feed import Feed

CPU = torch.device("cpu")


def numbered(n: int, size: int = 2) -> list[Tensor]:
    """Batches whose images are all of the batch's number."""
    return [torch.full((size, 3, 4, 4), number, dtype=torch.uint8) for number in range(n)]


def numbers(forward: Tensor) -> list[int]:
    return forward[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("joined", [1, 2, 3, 6])
def test_forwards_are_batches_joined_in_their_order(joined: int) -> None:
    forwards = list(Feed(numbered(6), batches_per_forward=joined, device=CPU))
    assert [len(forward) for forward in forwards] == [2 * joined] * (6 // joined)
    assert torch.equal(torch.cat(forwards), torch.cat(numbered(6)))
    assert {forward.dtype for forward in forwards} == {torch.uint8}


def test_a_batch_that_is_a_forward_is_not_copied() -> None:
    batches = numbered(3)
    assert all(
        forward.data_ptr() == batch.data_ptr()
        for forward, batch in zip(Feed(batches, batches_per_forward=1, device=CPU), batches, strict=True)
    )


def test_channels_last_stays_as_decoders_leave_it() -> None:
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in numbered(2)]
    (forward,) = Feed(batches, batches_per_forward=2, device=CPU)
    assert forward.is_contiguous(memory_format=torch.channels_last)


def test_what_is_left_at_the_end_makes_a_short_forward() -> None:
    forwards = list(Feed(numbered(5), batches_per_forward=2, device=CPU))
    assert [numbers(forward) for forward in forwards] == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]]


def test_nothing_to_load_gives_no_forward() -> None:
    assert list(Feed([], batches_per_forward=2, device=CPU)) == []


def test_no_more_is_taken_than_the_forwards_need() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for number, batch in enumerate(numbered(9)):
            taken.append(number)
            yield batch

    forwards = iter(Feed(batches(), batches_per_forward=2, device=CPU))
    next(forwards)
    assert taken == [0, 1]
    next(forwards)
    assert taken == [0, 1, 2, 3]


def test_only_waiting_for_the_loader_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)

    def batches() -> Iterator[Tensor]:
        nonlocal clock
        for batch in numbered(4):
            clock += 3  # nothing is ready for 3 s
            yield batch

    feed = Feed(batches(), batches_per_forward=2, device=CPU)
    waited = []
    for _ in feed:
        waited.append(feed.waited_s)
        clock += 100  # a step
    assert waited == [6, 12]
    assert feed.waited_s == 12


def test_an_error_of_the_loader_reaches_the_one_who_asks() -> None:
    def batches() -> Iterator[Tensor]:
        yield from numbered(1)
        raise OSError("the disk is gone")

    forwards = iter(Feed(batches(), batches_per_forward=1, device=CPU))
    assert numbers(next(forwards)) == [0, 0]
    with pytest.raises(OSError, match="the disk is gone"):
        next(forwards)


@pytest.mark.gpu
@pytest.mark.parametrize("joined", [1, 3])
def test_a_gpu_gets_the_same_in_the_same_order_whatever_it_is_busy_with(joined: int) -> None:
    device = torch.device("cuda")
    batches = [torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8).pin_memory() for _ in range(12)]
    busy = torch.randn(2000, 2000, device=device)
    got = []
    for forward in Feed(iter(batches), batches_per_forward=joined, device=device):
        busy = busy @ busy / 50
        got.append(forward.clone())
    assert torch.equal(torch.cat(got).cpu(), torch.cat(batches))
