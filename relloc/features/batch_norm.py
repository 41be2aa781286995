"""Recalibrates batch norm: estimates its running statistics again, on other images.

Statistics gathered on small patches do not fit full images. The published protocol uses them as
they were trained (`batch_norm=as_trained`). Estimating them again, without labels, on the training
images of the evaluation is the alternative (`batch_norm=recalibrated`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc.models.backbone import Backbone
from relloc.models.one_value import refuse_one_value

ONE_IMAGE = (
    "batch_norm=recalibrated and save_recalibrated=true can't use a batch of one image: a batch "
    "norm of this network sees only one value per channel of it, and so no variance. Give a larger "
    "view.batch, images that can be read, or batch_norm=as_trained"
)


def has_batch_norm(network: nn.Module) -> bool:
    """Returns whether there is a batch norm to recalibrate."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


@torch.no_grad()
def recalibrate(
    backbone: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Replaces the running statistics of all batch norms by averages over `batches`.

    Each batch (b 3 h w) has the same weight, so all should have the same size. Weights are not
    changed, and the backbone is left in evaluation mode. A backbone without batch norm is left as
    it is, and no batch is asked for. `forward` passes all batch norms; None for the embedding. It
    may take other batches than tensors, whose length is their number of images.

    Returns:
        The number of images used.

    Raises:
        UsageError: a batch of one image, of which a batch norm would see one value per channel.
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # PyTorch's way to ask for the plain average of all batches. With a momentum, the last
        # batches would count most.
        norm.momentum = None
    # Running statistics move in training mode only.
    backbone.train()
    forward = forward or _whole_forward(backbone)
    n_images = 0
    with refuse_one_value(backbone, ONE_IMAGE):
        for images in batches:
            forward(images)
            n_images += len(images)
    backbone.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return n_images


@torch.no_grad()
def check_one_image(backbone: nn.Module, side_px: int) -> None:
    """Checks that `recalibrate` can use batches of one image of `side_px` x `side_px`.

    Changes the running statistics of the backbone, which is left in training mode.

    Raises:
        UsageError: a batch norm would see one value per channel.
    """
    black_image = torch.zeros(1, 3, side_px, side_px)
    forward = _whole_forward(backbone)
    with refuse_one_value(backbone.train(), ONE_IMAGE):
        forward(black_image)


def _whole_forward(backbone: nn.Module) -> Callable[[Tensor], Any]:
    """Returns a forward that passes all batch norms of a backbone."""
    # To embed is to pass all stages, and batch norm behind them too, as that of fc6.
    return backbone.embed if isinstance(backbone, Backbone) else backbone
