"""Counts the multiplications of a network, by which its variants are compared."""

import copy

import torch
from torch import Tensor, nn

from relloc.models.backbone import Backbone


def multiplications(backbone: Backbone, side_px: int) -> int:
    """Returns the multiplications of convolutions and linear layers to embed one square patch.

    Those with the zeros around a map count too, as they are computed.
    """
    # The meta device computes shapes without numbers.
    shapes_only = copy.deepcopy(backbone).to("meta").eval()
    counts: list[int] = []

    def count(layer: nn.Conv2d | nn.Linear, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Each output value is a sum over the weights of its channel.
        counts.append(output.numel() * layer.weight[0].numel())

    for module in shapes_only.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        shapes_only.embed(torch.zeros(1, 3, side_px, side_px, device="meta"))
    return sum(counts)
