"""The network that is fine-tuned computes what the pretrained one does, as far as they agree."""

import copy

import pytest
import torch
from torch import nn

from relloc.errors import UsageError
from relloc.features.batch_norm import recalibrate
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.transfer.alexnet import FineTunedAlexNet, calibration_forward, folded


def pretrained() -> AlexNetBackbone:
    """A backbone whose batch norm has seen something."""
    torch.manual_seed(0)
    backbone = AlexNetBackbone()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
    return backbone.eval()


@torch.no_grad()
def test_trunk_and_conv6_compute_what_the_backbone_does() -> None:
    backbone = pretrained()
    before = copy.deepcopy(backbone.state_dict())
    network = FineTunedAlexNet(backbone, 20, seed=0).eval()
    images = torch.randn(2, 3, 227, 227)
    pool5 = backbone.pool(backbone(images)["feature5"])
    assert pool5.shape == (2, 256, 7, 7)
    torch.testing.assert_close(network.trunk(images), pool5, rtol=1e-4, atol=1e-4)
    # Of a patch conv6 has one position, which is fc6.
    patches = torch.randn(2, 3, 96, 96)
    conv6 = network.head[:2](network.trunk(patches))
    torch.testing.assert_close(conv6[:, :, 0, 0], backbone.embed(patches), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@torch.no_grad()
def test_recalibrated_outputs_of_conv6_have_mean_0_and_deviation_1() -> None:
    backbone = pretrained()
    images = torch.randn(4, 3, 227, 227)
    recalibrate(backbone, [images], calibration_forward(backbone))
    network = FineTunedAlexNet(backbone, 20, seed=0).eval()
    outputs = network.head[0](network.trunk(images)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs.mean(dim=1), torch.zeros(4096), rtol=0, atol=0.05)
    torch.testing.assert_close(outputs.std(dim=1), torch.ones(4096), rtol=0, atol=0.05)
    with pytest.raises(UsageError, match="crop_px"):
        calibration_forward(backbone)(torch.randn(1, 3, 64, 64))


def test_other_networks_are_recalibrated_by_their_embedding() -> None:
    backbone = SmallBackbone(widths=(8, 8, 8, 8, 8))
    assert calibration_forward(backbone) == backbone.embed


def test_layers_behind_pool5_have_the_sizes_of_the_paper() -> None:
    network = FineTunedAlexNet(pretrained(), 21, seed=0)
    shapes = [tuple(p.shape) for name, p in network.head.named_parameters() if "weight" in name]
    assert shapes == [(4096, 256, 3, 3), (1024, 4096, 1, 1), (4096, 4096), (21, 4096)]
    conv6b, fc7, fc8 = network.new_layers()
    for layer in (conv6b, fc7, fc8):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
        assert torch.equal(layer.bias.detach(), torch.full_like(layer.bias, 0.1))
    # Adaptive pooling is that of 3 x 3 with stride 2.
    maps = torch.randn(3, 4, 5, 5)
    pool6 = next(module for module in network.head if isinstance(module, nn.AdaptiveMaxPool2d))
    assert torch.equal(pool6(maps), nn.MaxPool2d(3, stride=2)(maps))


def test_images_that_are_too_small_are_refused() -> None:
    network = FineTunedAlexNet(pretrained(), 2, seed=0).eval()
    with pytest.raises(UsageError, match="64 x 70"):
        network(torch.zeros(1, 3, 70, 64))


def test_new_weights_depend_on_the_seed_alone() -> None:
    backbone = pretrained()
    one, same, other = (FineTunedAlexNet(backbone, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.new_layers()[1].weight, same.new_layers()[1].weight)
    assert not torch.equal(one.new_layers()[1].weight, other.new_layers()[1].weight)
    drawn = one.new_layers()[-1].weight.detach().clone()
    one.draw_last_layer()
    assert not torch.equal(one.new_layers()[-1].weight, drawn)


@torch.no_grad()
def test_a_batch_norm_with_scale_and_shift_is_folded_too() -> None:
    layers = nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), nn.Linear(4, 2)
    )
    for tensor in (layers[0][1].weight, layers[0][1].bias, layers[0][1].running_mean):
        tensor.normal_()
    layers.eval()
    x = torch.randn(5, 3)
    expected = layers(x)
    without = folded(copy.deepcopy(layers))
    assert [type(module) for module in without] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(without(x), expected)
    with pytest.raises(ValueError, match="can't be folded"):
        folded(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)))
