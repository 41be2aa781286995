"""A batch norm that trains needs more than one value a channel: of one there is no variance."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc.errors import UsageError


@contextlib.contextmanager
def one_value_refused(network: nn.Module, told: str) -> Iterator[None]:
    """While the block runs, a batch norm of `network` that trains on one value a channel raises `UsageError(told)`."""

    def refuse(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        if norm.training and given[0].numel() == given[0].shape[1]:
            raise UsageError(told)

    hooks = [module.register_forward_pre_hook(refuse) for module in network.modules() if isinstance(module, _BatchNorm)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
