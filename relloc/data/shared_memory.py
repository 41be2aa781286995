"""Memory that the training process and its reading processes share, without a file in /dev/shm or TMPDIR.

Containers give /dev/shm 64 MB by default, and a batch of images that does not fit there is lost or
ends its process. What is made here belongs to the processes alone: only the machine's (or the
container's) memory limits it, and nothing of it is left behind, however they end.
"""

import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_NO_FILE = -1  # in place of a descriptor: memory of its own


def shared_with_forks(shape: Sequence[int]) -> Tensor:
    """Bytes (uint8) that this process shares with all that it forks from now on.

    Raises:
        OSError: the system has no room for them.
    """
    return _mapped(_NO_FILE, shape)


def can_be_handed() -> bool:
    """Whether this system has memory that a process can hand to another: Linux has, macOS has not."""
    return hasattr(os, "memfd_create")


def to_hand_over(shape: Sequence[int]) -> tuple[int, Tensor]:
    """A file descriptor of new memory for bytes of this shape, and those bytes; whoever gets it closes it.

    All of it is taken from the system at once, so that want of memory is an error here.

    Raises:
        OSError: the system has no room for them.
    """
    size = torch.Size(shape).numel()
    descriptor = os.memfd_create("relloc batch", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size)
        return descriptor, _mapped(descriptor, shape)
    except BaseException:
        os.close(descriptor)
        raise


def handed_over(descriptor: int, shape: Sequence[int]) -> Tensor:
    """The bytes of this shape behind a descriptor of `to_hand_over`, which is closed."""
    try:
        return _mapped(descriptor, shape)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, shape: Sequence[int]) -> Tensor:
    # By its name, since a mapping of Python's keeps a descriptor open for as long as it is used, and batches are many.
    # It is undone when the last tensor that uses it is gone.
    size = torch.Size(shape).numel()
    name = f"/proc/self/fd/{descriptor}"
    if not os.path.exists(name):
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8).view(*shape)
    return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(*shape)
