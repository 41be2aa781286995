import time
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from relloc.data.loader import ImageBatch, Unreadable
from relloc.errors import DataError
from relloc.pretext.feed import Feed

CPU = torch.device("cpu")


def batch_of(pixels: Tensor, unreadable: dict[str, str] | None = None) -> ImageBatch:
    return ImageBatch(pixels=pixels, indices=torch.arange(len(pixels)), unreadable=unreadable or {})


def numbered(n: int, size: int = 2) -> list[ImageBatch]:
    """Batches whose images are all of the batch's number."""
    return [batch_of(torch.full((size, 3, 4, 4), number, dtype=torch.uint8)) for number in range(n)]


def feed_of(
    batches: Iterable[ImageBatch],
    *,
    batches_per_forward: int,
    device: torch.device = CPU,
    most_share: float = 0,
) -> Feed:
    unreadable = Unreadable(n_images=100, most_share=most_share)
    return Feed(
        batches,
        unreadable,
        images_per_batch=2,
        batches_per_forward=batches_per_forward,
        device=device,
    )


def numbers(forward: Tensor) -> list[int]:
    return forward[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("joined", [1, 2, 3, 6])
def test_forwards_are_batches_joined_in_their_order(joined: int) -> None:
    forwards = list(feed_of(numbered(6), batches_per_forward=joined))
    assert [len(forward) for forward in forwards] == [2 * joined] * (6 // joined)
    assert torch.equal(torch.cat(forwards), torch.cat([batch.pixels for batch in numbered(6)]))
    assert {forward.dtype for forward in forwards} == {torch.uint8}


def test_a_batch_that_is_a_forward_is_not_copied() -> None:
    batches = numbered(3)
    assert all(
        forward.data_ptr() == batch.pixels.data_ptr()
        for forward, batch in zip(feed_of(batches, batches_per_forward=1), batches, strict=True)
    )


def test_channels_last_stays_as_decoders_leave_it() -> None:
    batches = [
        batch_of(batch.pixels.contiguous(memory_format=torch.channels_last))
        for batch in numbered(2)
    ]
    (forward,) = feed_of(batches, batches_per_forward=2)
    assert forward.is_contiguous(memory_format=torch.channels_last)


def test_what_is_left_at_the_end_makes_a_short_forward() -> None:
    forwards = list(feed_of(numbered(5), batches_per_forward=2))
    assert [numbers(forward) for forward in forwards] == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]]


def test_nothing_to_load_gives_no_forward() -> None:
    assert list(feed_of([], batches_per_forward=2)) == []


def test_no_more_is_taken_than_the_forwards_need() -> None:
    taken = []

    def batches() -> Iterator[ImageBatch]:
        for number, batch in enumerate(numbered(9)):
            taken.append(number)
            yield batch

    forwards = iter(feed_of(batches(), batches_per_forward=2))
    next(forwards)
    assert taken == [0, 1]
    next(forwards)
    assert taken == [0, 1, 2, 3]


def test_only_waiting_for_the_loader_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)

    def batches() -> Iterator[ImageBatch]:
        nonlocal clock
        for batch in numbered(4):
            clock += 3  # nothing is ready for 3 s
            yield batch

    feed = feed_of(batches(), batches_per_forward=2)
    waited = []
    for _ in feed:
        waited.append(feed.waited_s)
        clock += 100  # a step
    assert waited == [6, 12]
    assert feed.waited_s == 12


def test_an_error_of_the_loader_reaches_the_one_who_asks() -> None:
    def batches() -> Iterator[ImageBatch]:
        yield from numbered(1)
        raise OSError("the disk is gone")

    forwards = iter(feed_of(batches(), batches_per_forward=1))
    assert numbers(next(forwards)) == [0, 0]
    with pytest.raises(OSError, match="the disk is gone"):
        next(forwards)


def test_a_batch_that_is_not_full_ends_the_run_with_what_can_not_be_read() -> None:
    batches = [
        *numbered(1),
        batch_of(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {"a.jpg": "is empty"}),
    ]
    forwards = iter(feed_of(batches, batches_per_forward=1, most_share=0.5))
    next(forwards)
    with pytest.raises(DataError, match=r"\b1 images? in a row .* a\.jpg: is empty"):
        next(forwards)


def test_too_many_unreadable_images_end_the_run() -> None:
    batches = [batch_of(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"a.jpg": "is empty"})]
    with pytest.raises(DataError, match=r"\b1 of 100 images\b"):
        next(iter(feed_of(batches, batches_per_forward=1)))


@pytest.mark.gpu
@pytest.mark.parametrize("joined", [1, 3])
def test_a_gpu_gets_the_same_in_the_same_order_whatever_it_is_busy_with(joined: int) -> None:
    device = torch.device("cuda")
    batches = [
        torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8).pin_memory() for _ in range(12)
    ]
    busy = torch.randn(2000, 2000, device=device)
    got = []
    for forward in feed_of(map(batch_of, batches), batches_per_forward=joined, device=device):
        busy = busy @ busy / 50
        got.append(forward.clone())
    assert torch.equal(torch.cat(got).cpu(), torch.cat(batches))
