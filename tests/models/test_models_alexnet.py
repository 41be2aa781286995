import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from relloc.models.alexnet import AlexNetBackbone


@pytest.fixture(scope="module")
def backbone() -> AlexNetBackbone:
    torch.manual_seed(0)
    return AlexNetBackbone().eval()


def caffe_response(maps: Tensor, n: int = 5, alpha: float = 1e-4, beta: float = 0.75) -> Tensor:
    """Caffe's normalization across channels: x / (1 + alpha / n * sum of n squares) ** beta."""
    responses = torch.empty_like(maps)
    for channel in range(maps.shape[1]):
        near = maps[:, max(0, channel - n // 2) : channel + n // 2 + 1]
        responses[:, channel] = (
            maps[:, channel] / (1 + alpha / n * near.square().sum(dim=1)) ** beta
        )
    return responses


def caffe_pool(maps: Tensor) -> Tensor:
    """3x3 windows two apart, the last ones hanging over the border."""
    indices = range(math.ceil((maps.shape[-1] - 3) / 2) + 1)
    rows = [
        [maps[..., 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].amax(dim=(2, 3)) for c in indices]
        for r in indices
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


@pytest.mark.parametrize(
    ("px", "sides", "pool5"),
    [(96, (24, 12, 6, 6, 6), 3), (227, (57, 28, 14, 14, 14), 7)],
    ids=["patch", "box"],
)
@torch.no_grad()
def test_maps_are_those_of_the_authors_code_and_pool5_is_as_the_paper_says(
    backbone: AlexNetBackbone, px: int, sides: tuple[int, ...], pool5: int
) -> None:
    stages = backbone(torch.randn(1, 3, px, px))
    channels = (96, 256, 384, 384, 256)
    assert [maps.shape for maps in stages.values()] == [
        (1, wide, side, side) for wide, side in zip(channels, sides, strict=True)
    ]
    assert backbone.stage_channels == channels
    assert backbone.pool(stages["feature5"]).shape == (1, 256, pool5, pool5)


@torch.no_grad()
def test_conv2_sees_conv1_pooled_and_then_normalized_as_caffe_does(
    backbone: AlexNetBackbone,
) -> None:
    stages = backbone(40 * torch.randn(2, 3, 96, 96))
    seen = caffe_response(caffe_pool(stages["feature1"]))
    torch.testing.assert_close(stages["feature2"], relu(backbone.conv2[0](seen)))
    assert not torch.allclose(
        stages["feature2"], relu(backbone.conv2[0](caffe_pool(stages["feature1"])))
    )


@torch.no_grad()
def test_fc6_gives_4096_numbers_from_pool5_of_a_96_px_patch(backbone: AlexNetBackbone) -> None:
    patches = torch.randn(2, 3, 96, 96)
    pool5 = caffe_pool(backbone(patches)["feature5"])
    embedded = backbone.embed(patches)
    assert embedded.shape == (2, 4096)
    torch.testing.assert_close(embedded, backbone.fc6(pool5.flatten(1)))


@torch.no_grad()
def test_a_smaller_pool5_is_spread_to_what_fc6_takes(backbone: AlexNetBackbone) -> None:
    assert caffe_pool(backbone(torch.randn(1, 3, 64, 64))["feature5"]).shape[-1] == 2
    assert backbone.embed(torch.randn(2, 3, 64, 64)).shape == (2, 4096)


def test_batch_norm_without_scale_and_shift_stands_on_conv3_conv4_conv5_and_fc6_alone(
    backbone: AlexNetBackbone,
) -> None:
    norms = {
        name: m
        for name, m in backbone.named_modules()
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    }
    assert [name.split(".")[0] for name in norms] == ["conv3", "conv4", "conv5", "fc6"]
    assert all(norm.weight is None and norm.bias is None for norm in norms.values())
    sizes = {
        name: tuple(value.shape)
        for name, value in backbone.named_parameters()
        if name.endswith("weight")
    }
    assert list(sizes.values()) == [
        (96, 3, 11, 11),
        (256, 96, 5, 5),
        (384, 256, 3, 3),
        (384, 384, 3, 3),
        (256, 384, 3, 3),
        (4096, 2304),
    ]


@torch.no_grad()
def test_batch_norm_comes_before_the_activation() -> None:
    torch.manual_seed(0)
    backbone = AlexNetBackbone().train()
    stages = backbone(torch.randn(8, 3, 64, 64))
    for name in ("feature3", "feature4", "feature5"):
        share_above_zero = (stages[name] > 0).float().mean().item()
        assert stages[name].min() == 0
        assert share_above_zero == pytest.approx(0.5, abs=0.05)  # centered, then cut at zero


def test_weights_are_xavier_and_biases_zero(backbone: AlexNetBackbone) -> None:
    for layer in (backbone.conv1[0], backbone.conv3[0], backbone.fc6[0]):
        outputs, inputs = layer.weight.shape[:2]
        window = math.prod(layer.weight.shape[2:])
        bound = math.sqrt(6 / ((inputs + outputs) * window))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert torch.all(layer.bias == 0)
