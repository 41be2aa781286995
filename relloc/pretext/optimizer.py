"""The optimizer of a pretext model: a trunk and a head that decay differently."""

import torch

from relloc import checks
from relloc.pretext.objective import RelativeLocation


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
    """SGD whose rate is `lr` at `lr_images_per_step` and grows linearly with `images_per_step`.

    Both decays act on all parameters, biases and batch norm included (protocols.md 2.1 and T14).
    mmselfsup codes no scaling rule (T7): at its 512 images a step the rate is its own.

    Raises:
        ValueError: a number that is negative or infinite; torch looks at no decay that a group brings.
    """
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "head_weight_decay": head_weight_decay}
    for name, value in numbers.items():
        checks.number(f"optimizer.{name}", value, at_least=0)
    checks.number("optimizer.lr_images_per_step", lr_images_per_step, above=0)
    scaled = lr * images_per_step / lr_images_per_step
    groups = [
        {"params": list(model.backbone.parameters()), "weight_decay": weight_decay},
        {"params": list(model.head.parameters()), "weight_decay": head_weight_decay},
    ]
    return torch.optim.SGD(groups, lr=scaled, momentum=momentum, fused=True)  # one kernel for all weights
