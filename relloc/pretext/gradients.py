"""The gradients of a model in one piece of memory: one kernel clears them, one collective averages them."""

from collections.abc import Iterable

import torch
from torch import nn

from relloc import ranks

_ALIGNED = 64  # values: where vectorized kernels may begin


class Gradients:
    """Gives each parameter a `grad` that is its part of one tensor, for backwards to add to.

    Their place stays, so that a recorded CUDA graph can write there. Processes average in one call after
    the last backward: nothing of it runs beside the backward, as it does with DistributedDataParallel, whose
    hooks and kernels the process that feeds a GPU has no time for.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        learned = [value for value in parameters if value.requires_grad]
        lengths = [-(-value.numel() // _ALIGNED) * _ALIGNED for value in learned]
        self._all = torch.zeros(sum(lengths), dtype=learned[0].dtype, device=learned[0].device)
        for value, part in zip(learned, self._all.split(lengths), strict=True):
            value.grad = part.as_strided(value.shape, value.stride())  # in the memory format of the weights

    def clear(self) -> None:
        self._all.zero_()

    def average(self) -> None:
        """Replace them by their mean over all processes."""
        if ranks.world_size() > 1:
            ranks.total(self._all.div_(ranks.world_size()))
