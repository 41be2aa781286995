"""The optimizer of a pretext model: SGD with a weight decay each for backbone and head."""

import torch

from relloc import checks
from relloc.pretext.relative_location import RelativeLocation


def sgd(
    model: RelativeLocation,
    *,
    lr: float,
    lr_images_per_step: int,
    images_per_step: int,
    momentum: float,
    weight_decay: float,
    head_weight_decay: float,
) -> torch.optim.SGD:
    """Returns SGD with a learning rate that grows linearly with the number of images in a step.

    The rate is `lr` where `images_per_step` equals `lr_images_per_step`. Both weight decays act on
    all parameters, also on biases and batch norm (protocols.md 2.1 and T14). mmselfsup has no such
    scaling rule (T7); at its 512 images a step the rate is the same.

    Example:
        With lr=0.2 at lr_images_per_step=512, a step of 64 images has the rate 0.025.

    Raises:
        ValueError: a number is negative or infinite.
    """
    # Checked here, since torch does not check the weight decay of a parameter group.
    checks.number("optimizer.lr", lr, at_least=0)
    checks.number("optimizer.momentum", momentum, at_least=0)
    checks.number("optimizer.weight_decay", weight_decay, at_least=0)
    checks.number("optimizer.head_weight_decay", head_weight_decay, at_least=0)
    checks.number("optimizer.lr_images_per_step", lr_images_per_step, above=0)
    # The linear scaling rule (Goyal et al. 2017).
    scaled_lr = lr * images_per_step / lr_images_per_step
    groups = [
        {
            "params": list(model.backbone.parameters()),
            "weight_decay": weight_decay,
        },
        {
            "params": list(model.head.parameters()),
            "weight_decay": head_weight_decay,
        },
    ]
    # fused: one kernel updates all weights, where one a parameter would wait for its launch.
    return torch.optim.SGD(groups, lr=scaled_lr, momentum=momentum, fused=True)
