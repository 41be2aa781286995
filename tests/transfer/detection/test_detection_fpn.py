"""The feature pyramid, and the levels of regions, beside plain loops."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from relloc.transfer.detection.align import align
from relloc.transfer.detection.fpn import FeaturePyramid, align_levels, by_level

STRIDES = [4, 8, 16, 32]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pyramid(stage_channels: tuple[int, ...] = (8, 12, 16), channels: int = 6) -> FeaturePyramid:
    return FeaturePyramid(stage_channels, channels, torch.Generator().manual_seed(0))


def convolved(block: nn.Module, x: Tensor) -> Tensor:
    """A convolution and its norm, each written out, in evaluation."""
    convolution, norm = block
    assert convolution.bias is None
    padding = convolution.kernel_size[0] // 2
    y = torch.nn.functional.conv2d(x, convolution.weight, padding=padding)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    return y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def test_maps_are_those_of_plain_loops_also_with_odd_sides() -> None:
    network = pyramid().double().eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    sides = [(13, 18), (7, 9), (4, 5)]
    maps = []
    for channels, side in zip((8, 12, 16), sides, strict=True):
        maps.append(torch.randn(2, channels, *side, generator=generator, dtype=torch.float64))
    found = network(maps)

    inner, outer = network.levels.inner_blocks, network.levels.layer_blocks
    merged = [convolved(block, stage) for block, stage in zip(inner, maps, strict=True)]
    for level in (1, 0):
        rows, columns = sides[level]
        coarse_rows, coarse_columns = sides[level + 1]
        for row, column in itertools.product(range(rows), range(columns)):
            nearest = (row * coarse_rows // rows, column * coarse_columns // columns)
            merged[level][:, :, row, column] += merged[level + 1][:, :, nearest[0], nearest[1]]
    expected = [convolved(block, level) for block, level in zip(outer, merged, strict=True)]
    expected.append(expected[-1][:, :, ::2, ::2])
    assert len(found) == 4
    for own, wanted in zip(found, expected, strict=True):
        assert own.shape == wanted.shape
        assert torch.allclose(own, wanted)
    # No ReLU: both signs are there.
    assert all((own < 0).any() and (own > 0).any() for own in found)


def test_the_last_level_has_half_the_rows_rounded_up() -> None:
    maps = [torch.randn(1, 8, 52, 52), torch.randn(1, 12, 26, 26), torch.randn(1, 16, 13, 13)]
    *_, last = pyramid()(maps)
    assert last.shape == (1, 6, 7, 7)


def test_parameters_and_initial_weights_are_those_of_the_protocol() -> None:
    network = pyramid((256, 512, 1024, 2048), 256)
    lateral = (256 + 512 + 1024 + 2048) * 256
    output = 4 * 256 * 256 * 9
    norms = 8 * 2 * 256
    assert count(network) == lateral + output + norms == 3_346_432
    for block in [*network.levels.inner_blocks, *network.levels.layer_blocks]:
        weight = block[0].weight
        fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
        limit = (6 / (fan_in + fan_out)) ** 0.5
        assert weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
        assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (0, 10, 0),
        (10, 10, 0),
        (111.9, 111.9, 0),
        (112, 112, 1),
        (56, 224, 1),
        (223.9, 223.9, 1),
        (224, 224, 2),
        (447.9, 447.9, 2),
        (448, 448, 3),
        (1333, 800, 3),
        (5000, 5000, 3),
    ],
)
def test_levels_at_their_boundaries(width: float, height: float, level: int) -> None:
    box = torch.tensor([[3.0, 5.0, 3 + width, 5 + height]])
    regions = by_level(box, torch.tensor([0]), STRIDES)
    assert regions.counts == [int(number == level) for number in range(4)]


def test_regions_have_the_features_of_their_level() -> None:
    generator = torch.Generator().manual_seed(2)
    maps = []
    for stride in STRIDES:
        side = 512 // stride
        maps.append(torch.randn(2, 3, side, side, generator=generator))
    sizes = torch.tensor([300.0, 20, 120, 500, 60, 230])
    levels = [2, 0, 1, 3, 0, 2]
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sizes, sizes], dim=1) + 5
    images = torch.tensor([0, 1, 1, 0, 0, 1])
    regions = by_level(boxes, images, STRIDES)
    assert regions.counts == [2, 1, 2, 1]
    found = regions.restored(align_levels(maps, regions, STRIDES, side=7))
    for number, level in enumerate(levels):
        own = slice(number, number + 1)
        wanted = align(maps[level], boxes[own], images[own], side=7, stride=STRIDES[level])
        assert torch.equal(found[own], wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_have_the_layout_of_the_maps_and_empty_levels_a_gradient(
    layout: torch.memory_format,
) -> None:
    maps = []
    for stride in STRIDES:
        level_map = torch.randn(1, 8, 128 // stride, 128 // stride)
        maps.append(level_map.contiguous(memory_format=layout).requires_grad_())
    for boxes in (torch.tensor([[5.0, 5, 30, 40], [0, 0, 20, 20]]), torch.zeros(0, 4)):
        images = torch.zeros(len(boxes), dtype=torch.int64)
        features = align_levels(maps, by_level(boxes, images, STRIDES), STRIDES, side=7)
        assert features.shape == (len(boxes), 8, 7, 7)
        assert features.is_contiguous(memory_format=layout)
        features.sum().backward()
        for number, level_map in enumerate(maps):
            assert level_map.grad is not None
            assert bool(level_map.grad.any()) == (number == 0 and len(boxes) > 0)
            level_map.grad = None
