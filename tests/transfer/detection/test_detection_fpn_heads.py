"""The heads of Mask R-CNN: what they compute, and what they start with."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from relloc.transfer.detection.fpn_heads import BoxHead, MaskHead


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_box_head_has_the_parameters_of_the_protocol() -> None:
    head = BoxHead(256, 1024, 80, generator())
    assert count(head.convolutions) == 4 * (256 * 256 * 9 + 2 * 256) == 2_361_344
    assert count(head.hidden) == 12_544 * 1_024 + 1_024 == 12_846_080
    assert count(head.predictor.score) == 1_024 * 81 + 81 == 83_025
    assert count(head.predictor.move) == 1_024 * 320 + 320 == 328_000
    assert count(head) == 2_361_344 + 12_846_080 + 83_025 + 328_000
    limit = (6 / (12_544 + 1_024)) ** 0.5
    assert head.hidden.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)
    assert head.hidden.weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert not head.hidden.bias.any()


def test_the_mask_head_has_the_parameters_of_the_protocol() -> None:
    head = MaskHead(256, 80, generator())
    assert count(head.convolutions) == 2_361_344
    assert count(head.enlarge) == 256 * 256 * 4 + 256 == 262_400
    assert count(head.score) == 256 * 80 + 80 == 20_560
    assert count(head) == 2_361_344 + 262_400 + 20_560
    # Kaiming normal with fan out, as torch counts it for each kind of convolution.
    for layer, fan_out in ((head.enlarge, 256 * 4), (head.score, 80)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert layer.bias is not None
        assert not layer.bias.any()
    for block in head.convolutions:
        expected = (2 / (256 * 9)) ** 0.5
        assert block[0].weight.std().item() == pytest.approx(expected, rel=0.02)


def test_the_box_head_sees_channel_after_channel() -> None:
    head = BoxHead(8, 16, 3, generator()).eval()
    features = torch.randn(5, 8, 7, 7)
    logits, offsets = head(features)
    assert logits.shape == (5, 4)
    assert offsets.shape == (5, 3, 4)
    hidden = features
    for block in head.convolutions:
        hidden = block[1](conv2d(hidden, block[0].weight, padding=1)).relu()
    flat = torch.stack([each.reshape(-1) for each in hidden])
    wanted = head.predictor(head.hidden(flat).relu())
    assert torch.allclose(logits, wanted[0], atol=1e-6)
    assert torch.allclose(offsets, wanted[1], atol=1e-6)
    in_other_layout = features.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(head(in_other_layout)[0], logits, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_are_the_channel_of_the_class(layout: torch.memory_format) -> None:
    head = MaskHead(8, 5, generator()).double()
    nn.init.normal_(torch.as_tensor(head.score.bias))
    features = torch.randn(4, 8, 14, 14, dtype=torch.float64).contiguous(memory_format=layout)
    classes = torch.tensor([2, 0, 4, 2])
    found = head(features, classes)
    all_channels = head.score(head.enlarge(head.convolutions(features)).relu())
    wanted = torch.stack([all_channels[number, class_] for number, class_ in enumerate(classes)])
    assert found.shape == (4, 28, 28)
    assert torch.allclose(found, wanted.float(), atol=1e-6)

    # Gradients too, of weights that two regions share and of those that none has.
    weights = torch.randn(4, 28, 28)
    gradient, wanted_gradient = (
        torch.autograd.grad((masks * weights).sum(), list(head.parameters()), retain_graph=True)
        for masks in (found, wanted)
    )
    for own, other in zip(gradient, wanted_gradient, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_no_regions_have_finite_gradients(training: bool) -> None:
    box_head = BoxHead(8, 16, 3, generator()).train(training)
    logits, offsets = box_head(torch.zeros(0, 8, 7, 7))
    (logits.sum() + offsets.sum()).backward()
    mask_head = MaskHead(8, 3, generator()).train(training)
    mask_head(torch.zeros(0, 8, 14, 14), torch.zeros(0, dtype=torch.int64)).sum().backward()
    for head in (box_head, mask_head):
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
        assert all(torch.isfinite(value).all() for value in head.buffers())
