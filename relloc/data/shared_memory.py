"""Memory shared by the training process and its workers, without files in /dev/shm or TMPDIR.

Containers have 64 MB of /dev/shm by default, and a batch of images that does not fit there is lost
or kills its process. The memory allocated here has no file name: only the memory of the machine or
container limits it, and the system frees it however the processes end.
"""

import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# In place of a file descriptor, mmap takes this for anonymous memory.
_NO_FILE = -1


def shared_with_forks(shape: Sequence[int]) -> Tensor:
    """Returns a new uint8 tensor that this process shares with all processes it forks later.

    Raises:
        OSError: the system has not enough memory.
    """
    return _mapped(_NO_FILE, shape)


def can_be_handed() -> bool:
    """Returns whether a process can hand memory to another here: true on Linux, not on macOS."""
    return hasattr(os, "memfd_create")


def to_hand_over(shape: Sequence[int]) -> tuple[int, Tensor]:
    """Returns a file descriptor of new memory, and that memory as a uint8 tensor.

    Another process gets the descriptor, and maps the memory with `handed_over`. Whoever gets it
    has to close it.

    Raises:
        OSError: the system has not enough memory.
    """
    size = torch.Size(shape).numel()
    descriptor = os.memfd_create("relloc batch", os.MFD_CLOEXEC)
    try:
        # All memory is allocated now. Otherwise a lack of it would kill the process at a later
        # write, where it is an error here.
        os.posix_fallocate(descriptor, 0, size)
        return descriptor, _mapped(descriptor, shape)
    except BaseException:
        os.close(descriptor)
        raise


def handed_over(descriptor: int, shape: Sequence[int]) -> Tensor:
    """Returns the memory behind a descriptor of `to_hand_over` as a tensor, and closes it."""
    try:
        return _mapped(descriptor, shape)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, shape: Sequence[int]) -> Tensor:
    """Returns the memory of a file descriptor as a uint8 tensor of this shape."""
    size = torch.Size(shape).numel()
    name = f"/proc/self/fd/{descriptor}"
    # Anonymous memory has no such name.
    if not os.path.exists(name):
        memory = mmap.mmap(descriptor, size)
        return torch.frombuffer(memory, dtype=torch.uint8).view(*shape)
    # PyTorch maps the file by its name. Python's mmap would keep a descriptor open for each of
    # many batches. The mapping ends when the last tensor that uses it is gone.
    return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(*shape)
