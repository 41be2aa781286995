"""Counts what a network computes and keeps, by which its variants are compared."""

import copy
import dataclasses

import torch
from torch import Tensor, nn

from relloc.models.backbone import Backbone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs to embed one square patch.

    Attributes:
        multiplications: of its convolutions and linear layers. Those with the zeros around a map
            count too, as they are computed.
        values: outputs of these layers, which training keeps for the backward.
    """

    multiplications: int
    values: int


def cost_of_patch(backbone: Backbone, side_px: int) -> Cost:
    """Returns the cost of a patch of `side_px` x `side_px`."""
    # The meta device computes shapes without numbers.
    shapes_only = copy.deepcopy(backbone).to("meta").eval()
    multiplications: list[int] = []
    values: list[int] = []

    def count(layer: nn.Conv2d | nn.Linear, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Each output value is a sum over the weights of its channel.
        multiplications.append(output.numel() * layer.weight[0].numel())
        values.append(output.numel())

    for module in shapes_only.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        shapes_only.embed(torch.zeros(1, 3, side_px, side_px, device="meta"))
    return Cost(multiplications=sum(multiplications), values=sum(values))
