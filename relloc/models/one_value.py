"""Guards against training a batch norm on one value per channel, which has no variance.

PyTorch refuses that as well, but its message names no setting that a user could change.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc.errors import UsageError


@contextlib.contextmanager
def refuse_one_value(network: nn.Module, message: str) -> Iterator[None]:
    """Makes every batch norm inside `network` refuse one value per channel during the block.

    Batch norms in evaluation mode are not affected.

    Raises:
        UsageError: a batch norm in training mode was given one value per channel. The text is
            `message`, since the caller knows which setting leads to it.
    """

    def check_input(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        channels = x.shape[1]
        if norm.training and x.numel() == channels:
            raise UsageError(message)

    hooks = []
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            hook = module.register_forward_pre_hook(check_input)
            hooks.append(hook)
    try:
        yield
    finally:
        # Without this the hooks would slow down, and could stop, every later forward.
        for hook in hooks:
            hook.remove()
