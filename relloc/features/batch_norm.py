"""Batch-norm statistics for the images at hand.

Statistics gathered on small patches do not fit full images. The published protocol uses them as
trained; estimating them again, without labels, on the evaluation's training images is the other
named way (`batch_norm=recalibrated`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc.models.one_value import refuse_one_value

ONE_IMAGE = (
    "batch_norm=recalibrated can't take a batch of one image, of which a batch norm of this network sees one value a "
    "channel, and so no variance: give a larger view.batch, images that can be read, or batch_norm=as_trained"
)


@torch.no_grad()
def recalibrate(backbone: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace all running statistics by the average over `batches` (b 3 h w); images used.

    Each batch counts alike, so they should be of one size. Weights stay. A backbone without batch
    norm is left as it is, and 0 is returned.

    Raises:
        UsageError: a batch of one image, of which a batch norm would see one value a channel.
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to ask for a cumulative average
    backbone.train()
    used = 0
    with refuse_one_value(backbone, ONE_IMAGE):
        for images in batches:
            backbone(images)
            used += len(images)
    backbone.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return used


@torch.no_grad()
def check_one_image(backbone: nn.Module, side_px: int) -> None:
    """Raises `UsageError` where `recalibrate` can't take batches of one image of that side; changes statistics."""
    with refuse_one_value(backbone.train(), ONE_IMAGE):
        backbone(torch.zeros(1, 3, side_px, side_px))
