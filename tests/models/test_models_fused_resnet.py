"""Frozen ResNets with batch norm in their convolutions, against the networks themselves."""

import pytest
import torch
from torch import nn

from relloc.models.backbone import STAGES, Backbone
from relloc.models.fused_resnet import FusedResNet, fused_if_possible
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone


def trained(network: Backbone) -> Backbone:
    """Gives batch norms weights and statistics as after a training."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
    return network.eval()


NETWORKS = {
    "resnet18": {"depth": 18},
    "resnet50": {"depth": 50},
    "finer": {"depth": 18, "last_stride": 1, "stem": "no_pool"},
    "wider": {"depth": 18, "width": 1.5},
}


@pytest.mark.parametrize("name", [*NETWORKS, "dilated"])
@torch.no_grad()
def test_maps_are_those_of_the_network(name: str) -> None:
    torch.manual_seed(0)
    backbone = trained(ResNetBackbone(**NETWORKS.get(name, {"depth": 18})))
    if name == "dilated":
        backbone = backbone.dilated()
    assert isinstance(backbone, ResNetBackbone)
    images = torch.randn(2, 3, 64, 64)
    expected = backbone(images)
    found = FusedResNet(backbone, torch.float32)(images)
    assert list(found) == list(STAGES)
    for stage, maps in expected.items():
        # Rounding grows with the values of a map, which are near 100 in a ResNet-50, and depends on
        # the processor.
        torch.testing.assert_close(found[stage], maps, rtol=0, atol=1e-5 * float(maps.abs().max()))


@torch.no_grad()
def test_it_rounds_less_than_the_network_in_bfloat16() -> None:
    torch.manual_seed(0)
    backbone = trained(ResNetBackbone(depth=18))
    assert isinstance(backbone, ResNetBackbone)
    images = torch.randn(8, 3, 64, 64)
    exact = backbone(images)["feature5"]
    found = FusedResNet(backbone)(images)["feature5"]
    with torch.autocast("cpu", torch.bfloat16):
        usual = backbone(images)["feature5"]
    assert found.dtype == torch.bfloat16
    error = (found.float() - exact).norm()
    assert 0 < error < 1.1 * (usual.float() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*NETWORKS, "dilated"])
@torch.no_grad()
def test_a_gpu_rounds_less_than_the_network_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    backbone = trained(ResNetBackbone(**NETWORKS.get(name, {"depth": 18})))
    if name == "dilated":
        backbone = backbone.dilated()
    assert isinstance(backbone, ResNetBackbone)
    images = torch.randn(8, 3, 64, 64)
    exact = backbone.double()(images.double())["feature5"]
    backbone.float().cuda()
    found = FusedResNet(backbone)(images.cuda())["feature5"]
    with torch.autocast("cuda", torch.bfloat16):
        usual = backbone(images.cuda())["feature5"]
    errors = [(maps.cpu().double() - exact).norm() for maps in (found, usual)]
    assert 0 < errors[0] < 1.1 * errors[1]


def test_what_is_no_resnet_or_has_odd_channels_stays_as_it_is() -> None:
    for network in (SmallBackbone(widths=(8, 8, 8, 8, 8)), ResNetBackbone(depth=18, width=9 / 64)):
        assert fused_if_possible(network) is network
    assert isinstance(fused_if_possible(ResNetBackbone(depth=18)), FusedResNet)
