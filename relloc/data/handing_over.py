"""Hands what a worker process has read to the training process, without copying it.

A worker writes to memory of `memory_to_hand_over`, and returns `answer_with` it; the training
process gets the same memory by `received`.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from relloc.data.readers import Answer
from relloc.data.shared_memory import can_be_handed, handed_over, to_hand_over
from relloc.errors import Interrupted

Shape = tuple[int, ...]
own_memory = functools.partial(torch.empty, dtype=torch.uint8)


def memory_to_hand_over(descriptors: list[int], shape: Shape) -> Tensor:
    """Returns memory for a worker process to write to, and adds its descriptor to `descriptors`.

    Where the system has no memory that can be handed over, it is memory of the process, without a
    descriptor.

    Raises:
        Interrupted: there is no room.
    """
    # An empty batch needs no memory, and none of size 0 can be mapped.
    if not can_be_handed() or not all(shape):
        return own_memory(shape)
    try:
        descriptor, rows = to_hand_over(shape)
    except OSError as error:
        megabytes = math.prod(shape) / 1e6
        raise Interrupted(
            f"there is no room for a batch of {megabytes:.0f} MB in a process that reads "
            f"images ({error.strerror}): give fewer, such as workers=2, or more memory, and "
            "start the same command again"
        ) from error
    # The training process maps the same memory by this descriptor.
    descriptors.append(descriptor)
    return rows


def answer_with(message: Any, rows: Tensor, descriptors: list[int]) -> Answer:
    """Returns the answer of a worker process: a message, and what it wrote to its memory `rows`.

    `descriptors` is what `memory_to_hand_over` made of it.
    """
    # The shape is needed to map the memory again. Without a descriptor the content travels in the
    # message, as a numpy array, since torch would send a tensor through /dev/shm.
    content = tuple(rows.shape) if descriptors else rows.numpy()
    return Answer(
        content=(message, content),
        descriptors=tuple(descriptors),
    )


def received(answer: Answer) -> tuple[Any, Tensor]:
    """Returns, in the training process, the message and the memory of `answer_with`."""
    message, content = answer.content
    if not answer.descriptors:
        return message, torch.from_numpy(content)
    [descriptor] = answer.descriptors
    return message, handed_over(descriptor, content)
