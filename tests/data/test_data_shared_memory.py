"""Memory that processes share without a file: seen by forks, handed over, gone when unused."""

import errno
import os

import psutil
import pytest
import torch

from relloc.data import shared_memory
from relloc.data.shared_memory import can_be_handed, handed_over, shared_with_forks, to_hand_over

pytestmark = pytest.mark.skipif(
    not can_be_handed(), reason="this system has no memory without a name"
)


def descriptors() -> int:
    """How many this process has open."""
    return psutil.Process().num_fds()


def test_what_a_fork_writes_is_seen_here() -> None:
    pixels = shared_with_forks((2, 3))
    assert (pixels.shape, pixels.dtype, int(pixels.sum())) == ((2, 3), torch.uint8, 0)
    if (child := os.fork()) == 0:
        pixels[1, 2] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pixels.tolist() == [[0, 0, 0], [0, 0, 7]]


def test_both_ends_of_what_is_handed_over_are_the_same_bytes() -> None:
    descriptor, given = to_hand_over((3, 4))
    given.copy_(torch.arange(12).view(3, 4))
    taken = handed_over(descriptor, (3, 4))
    assert torch.equal(taken, given)
    given[0, 0] = 99
    assert int(taken[0, 0]) == 99


def test_whoever_gets_the_memory_closes_its_descriptor() -> None:
    before = descriptors()
    descriptor, given = to_hand_over((5,))
    assert descriptors() == before + 1
    taken = handed_over(descriptor, (5,))
    assert descriptors() == before  # although both tensors are in use
    assert torch.equal(taken, given)


@pytest.mark.parametrize("named", [True, False])
def test_where_descriptors_have_no_names_memory_is_mapped_by_its_number(
    monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    descriptor, given = to_hand_over((6,))
    given.fill_(3)
    if not named:
        monkeypatch.setattr(shared_memory.os.path, "exists", lambda _: False)
    assert handed_over(descriptor, (6,)).tolist() == [3] * 6


def test_want_of_memory_is_an_error_at_once_and_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    before = descriptors()
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        to_hand_over((5,))
    assert descriptors() == before


def test_memory_is_given_back_when_its_last_tensor_is_gone() -> None:
    size = 1 << 24
    before = psutil.Process().memory_info().shared
    descriptor, given = to_hand_over((size,))
    given.fill_(1)
    taken = handed_over(descriptor, (size,))
    del given
    assert taken.sum() == size
    assert (
        psutil.Process().memory_info().shared - before > size // 2
    )  # so what is looked at can be seen
    del taken
    assert psutil.Process().memory_info().shared - before < size // 2
