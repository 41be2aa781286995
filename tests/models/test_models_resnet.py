import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from relloc.errors import UsageError
from relloc.features.pool import layer_dims
from relloc.models.backbone import STAGES
from relloc.models.cost import cost_of_patch
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


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(
    ("settings", "sides"),
    [
        ({"last_stride": 1}, (32, 16, 8, 4, 4)),
        ({"stem": "no_pool"}, (32, 32, 16, 8, 4)),
        ({"stem": "stride_1"}, (64, 32, 16, 8, 4)),
        ({"stem": "stride_1", "last_stride": 1}, (64, 32, 16, 8, 8)),
    ],
)
@torch.no_grad()
def test_strides_of_its_own_change_maps_and_no_weight(
    depth: int, settings: dict[str, Any], sides: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    standard = ResNetBackbone(depth=depth, width=0.125).eval()
    torch.manual_seed(0)
    own = ResNetBackbone(depth=depth, width=0.125, **settings).eval()
    patches = torch.randn(2, 3, 64, 64)
    assert tuple(maps.shape[-1] for maps in own(patches).values()) == sides
    assert own.pooled_sides == standard.pooled_sides
    # The weights are the same, and with the standard strides so is the network.
    assert {name: value.tolist() for name, value in own.state_dict().items()} == {
        name: value.tolist() for name, value in standard.state_dict().items()
    }
    back = own.with_standard_strides()
    assert (back.own_strides, standard.own_strides) == ("", "")
    assert torch.equal(back.embed(patches), standard.embed(patches))
    assert not torch.equal(own.embed(patches), standard.embed(patches))
    assert own.own_strides == " ".join(
        f"{name}={settings[name]}" for name in ("last_stride", "stem") if name in settings
    )


@torch.no_grad()
def test_a_last_stage_of_stride_1_is_the_standard_one_between_whose_pixels_are_others() -> None:
    torch.manual_seed(0)
    standard = torchvision.models.resnet18(weights=None).eval()
    own = ResNetBackbone(depth=18, last_stride=1).eval()
    own.load_state_dict(standard.state_dict(), strict=False)
    maps = own(torch.randn(1, 3, 96, 96))
    # torchvision's first block by hand, with both strides set to 1
    first, second = standard.layer4
    first.conv1.stride = first.downsample[0].stride = (1, 1)
    assert torch.equal(maps["feature5"], second(first(maps["feature4"])))


def test_wider_layers_have_as_many_times_the_channels_and_bounded_features() -> None:
    with torch.device("meta"):
        wide = ResNetBackbone(depth=50, width=2)
        shapes = {name: value.shape for name, value in wide.state_dict().items()}
        standard = ResNetBackbone(depth=50).state_dict()
    assert wide.stage_channels == (128, 512, 1024, 2048, 4096)
    assert wide.embedding_dim == 4096
    assert wide.size == "width=2"
    assert max(layer_dims(wide).values()) <= 9_216
    # Each dimension of channels doubles, and none of kernels or colors.
    assert shapes.keys() == standard.keys()
    for name, shape in shapes.items():
        doubled = [2 * side for side in standard[name].shape[:2]] + list(standard[name].shape[2:])
        if name == "conv1.weight":
            doubled[1] = 3
        assert list(shape) == doubled


def test_wider_layers_are_initialized_as_the_standard_ones() -> None:
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=18, width=0.5)
    weight = backbone.layer3[1].conv2.weight
    fan_out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.all(norm.weight == 1) for norm in norms)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        # pretraining on patches of 64 px, calculated from shapes by hand
        ({"last_stride": 1}, 1.52),
        ({"stem": "no_pool"}, 3.91),
        ({"stem": "stride_1"}, 4.0),
        ({"stem": "stride_1", "last_stride": 1}, 6.07),
    ],
)
def test_what_finer_maps_cost(settings: dict[str, Any], factor: float) -> None:
    with torch.device("meta"):
        standard = cost_of_patch(ResNetBackbone(depth=50), 64)
        own = cost_of_patch(ResNetBackbone(depth=50, **settings), 64)
    assert own.multiplications / standard.multiplications == pytest.approx(factor, abs=0.01)


def test_a_resnet50_has_4_billion_multiplications_as_published() -> None:
    # torchvision's page of models has 4.09 GFLOPs, with the classifier's 2 million.
    with torch.device("meta"):
        cost = cost_of_patch(ResNetBackbone(depth=50), 224)
    assert cost.multiplications == pytest.approx(4.09e9, rel=2e-3)
    # and 11.1 million activations (Radosavovic et al. 2020, table of ResNet-50)
    assert cost.values == pytest.approx(11.1e6, rel=5e-3)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"last_stride": 3}, r"model\.backbone\.last_stride is 3"),
        ({"last_stride": True}, r"model\.backbone\.last_stride is True"),
        ({"stem": "small"}, r"model\.backbone\.stem is small"),
        ({"width": 0.01}, r"model\.backbone\.width is 0\.01"),
        ({"width": 0.03125}, r"model\.backbone\.width is 0\.03125"),
        ({"width": -1}, r"model\.backbone\.width is -1"),
    ],
)
def test_settings_that_no_network_has_are_refused(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(UsageError, match=setting):
        ResNetBackbone(depth=18, **settings)
