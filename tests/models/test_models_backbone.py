import pytest
import torch
import torchvision
from torch import nn

from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import STAGES, Backbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone

KINDS = {
    "small": lambda: SmallBackbone(widths=(8, 10, 12, 14, 16)),
    "resnet": lambda: ResNetBackbone(depth=18),
    "alexnet": AlexNetBackbone,
    "finer": lambda: ResNetBackbone(depth=18, width=0.125, last_stride=1, stem="stride_1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_reaches_every_parameter_as_processes_that_train_together_need(
    kind: str,
) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_stages_chained_are_the_forward_and_share_the_weights(kind: str) -> None:
    torch.manual_seed(0)
    backbone: Backbone = KINDS[kind]().eval()
    names = list(backbone.state_dict())
    x = images = torch.randn(2, 3, 96, 96)
    stages = backbone.stages()
    assert tuple(stages) == STAGES
    for name, maps in backbone(images).items():
        x = stages[name](x)
        assert torch.equal(x, maps)
    of_stages = {id(value) for stage in stages.values() for value in stage.parameters()}
    assert of_stages == {
        id(value) for name, value in backbone.named_parameters() if not name.startswith("fc6")
    }
    assert list(backbone.state_dict()) == names  # asking for them adds no module


@torch.no_grad()
def test_a_detectors_trunk_and_head_are_the_backbone_cut_in_two() -> None:
    backbone = ResNetBackbone(depth=50).eval()
    stages = list(backbone.stages().values())
    trunk, head = nn.Sequential(*stages[:4]), stages[4]
    images = torch.randn(1, 3, 64, 80)
    assert trunk(images).shape == (1, 1024, 4, 5)
    assert torch.equal(head(trunk(images)), backbone(images)["feature5"])
    assert sum(value.numel() for value in head.parameters()) == 14_964_736


@torch.no_grad()
def test_a_dilated_resnet50_is_torchvisions_with_the_same_weights() -> None:
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=50).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(1, 3, 72, 64)
    stage2 = theirs.layer2(
        theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))
    )
    dilated = backbone.dilated()
    maps = dilated(images)
    assert maps["feature5"].shape == (1, 2048, 9, 8)
    assert torch.equal(maps["feature4"], theirs.layer3(stage2))
    assert torch.equal(maps["feature5"], theirs.layer4(theirs.layer3(stage2)))
    assert list(dilated.state_dict()) == list(backbone.state_dict())
    assert backbone(images)["feature5"].shape == (1, 2048, 3, 2)  # the backbone itself stays


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_lies_between_is_all_that_dilation_adds(kind: str) -> None:
    torch.manual_seed(0)
    # With as many digits rounding stays far below the tolerance, on large values too.
    backbone: Backbone = KINDS[kind]().eval().double()
    images = torch.randn(1, 3, 192, 128, dtype=torch.float64)
    before, after = backbone(images), backbone.dilated()(images)
    side = after["feature3"].shape[-2:]
    assert after["feature4"].shape[-2:] == after["feature5"].shape[-2:] == side
    for name in STAGES:
        step = round(side[0] / before[name].shape[-2]) if name in STAGES[3:] else 1
        torch.testing.assert_close(after[name][..., ::step, ::step], before[name])
