import pytest
import torch
from torch import nn

from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import STAGES, Backbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone

KINDS = {
    "small": lambda: SmallBackbone(widths=(8, 10, 12, 14, 16)),
    "resnet": lambda: ResNetBackbone(depth=18),
    "alexnet": AlexNetBackbone,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_reaches_every_parameter_as_processes_that_train_together_need(kind: str) -> None:
    torch.manual_seed(0)
    backbone: Backbone = KINDS[kind]()
    embedded = backbone.embed(torch.randn(4, 3, 64, 64))
    assert embedded.shape == (4, backbone.embedding_dim)
    (embedded * torch.randn(embedded.shape)).sum().backward()
    assert [name for name, value in backbone.named_parameters() if value.grad is None] == []
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.grad.abs().sum() > 0 for module in convolutions)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_backbone_tells_of_itself_is_what_it_returns(kind: str) -> None:
    torch.manual_seed(0)
    backbone: Backbone = KINDS[kind]().eval()
    stages = backbone(torch.randn(1, 3, 96, 96))
    assert tuple(stages) == STAGES
    assert tuple(maps.shape[1] for maps in stages.values()) == backbone.stage_channels
    assert len(backbone.pooled_sides) == len(STAGES)
    assert all(maps.min() >= 0 for maps in stages.values())  # after the activation
