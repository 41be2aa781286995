import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

from relloc.models.backbone import STAGES
from relloc.models.resnet import ResNetBackbone

CHANNELS = {18: (64, 64, 128, 256, 512), 50: (64, 256, 512, 1024, 2048)}


def unlike_initialization(network: nn.Module) -> nn.Module:
    """Every batch norm gets its own scale, shift and statistics, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (
                module.weight.data,
                module.bias.data,
                module.running_mean,
                module.running_var,
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network


def torchvision_stages(network: torchvision.models.ResNet, images: Tensor) -> list[Tensor]:
    stem = network.relu(network.bn1(network.conv1(images)))
    stage1 = network.layer1(network.maxpool(stem))
    stage2 = network.layer2(stage1)
    stage3 = network.layer3(stage2)
    return [stem, stage1, stage2, stage3, network.layer4(stage3)]


@pytest.mark.parametrize("depth", [18, 50])
def test_the_stages_have_the_published_channels_and_sides_at_224_px(depth: int) -> None:
    backbone = ResNetBackbone(depth=depth).eval()
    with torch.no_grad():
        stages = backbone(torch.randn(1, 3, 224, 224))
    assert tuple(stages) == STAGES == ("feature1", "feature2", "feature3", "feature4", "feature5")
    sides = (112, 56, 28, 14, 7)
    assert [maps.shape for maps in stages.values()] == [
        (1, channels, side, side) for channels, side in zip(CHANNELS[depth], sides, strict=True)
    ]
    assert backbone.stage_channels == CHANNELS[depth]
    assert backbone.embedding_dim == CHANNELS[depth][-1]


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_the_stages_are_those_of_torchvisions_network_with_the_same_weights(depth: int) -> None:
    torch.manual_seed(0)
    theirs = unlike_initialization(
        getattr(torchvision.models, f"resnet{depth}")(weights=None)
    ).eval()
    ours = ResNetBackbone(depth=depth).eval()
    ours.load_state_dict(
        {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    )
    images = torch.randn(2, 3, 64, 64)
    stages = ours(images)
    for maps, expected in zip(stages.values(), torchvision_stages(theirs, images), strict=True):
        assert torch.equal(maps, expected)
    assert torch.equal(theirs.fc(ours.embed(images)), theirs(images))


def test_resnet50_has_the_318_tensors_of_torchvisions_without_its_classifier() -> None:
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    wanted = {name: value for name, value in theirs.items() if not name.startswith("fc.")}
    ours = ResNetBackbone(depth=50)
    found = ours.state_dict()
    assert len(found) == 318
    assert sum(name.endswith("num_batches_tracked") for name in found) == 53
    assert {name: value.shape for name, value in found.items()} == {
        name: v.shape for name, v in wanted.items()
    }
    ours.load_state_dict(wanted, strict=True)
    assert torch.equal(ours.layer4[2].conv3.weight, wanted["layer4.2.conv3.weight"])


def test_initialization_is_kaiming_fan_out_with_every_batch_norm_weight_one() -> None:
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=50)
    for name in ("conv1", "layer1.0.conv2", "layer3.2.conv3", "layer4.0.downsample.0"):
        weight = backbone.get_submodule(name).weight
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 53
    assert all(torch.all(norm.weight == 1) and torch.all(norm.bias == 0) for norm in norms)


def test_another_depth_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"model\.backbone\.depth is 34: .*\b18, 50\b"):
        ResNetBackbone(depth=34)
