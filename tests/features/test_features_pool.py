import math

import pytest
import torch
from torch import Tensor, nn

from relloc.features.pool import layer_channels, layer_dims, pool_stage, pooled_layers
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import STAGES, Backbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.results import LAYERS

# protocols.md 3.1: side of the map at 224 px, kernel, stride, padding, side after pooling
PUBLISHED = [
    (112, 10, 10, 4, 12),
    (56, 16, 8, 0, 6),
    (28, 13, 5, 0, 4),
    (14, 8, 3, 0, 3),
    (7, 6, 1, 0, 2),
]


def windowed(maps: Tensor, kernel: int, stride: int, padding: int, side: int) -> Tensor:
    """Sums over windows of the map with zeros around it, divided by the whole window."""
    b, channels, height, width = maps.shape
    around = maps.new_zeros(b, channels, height + 2 * padding, width + 2 * padding)
    around[..., padding : padding + height, padding : padding + width] = maps
    found = maps.new_empty(b, channels, side, side)
    for row in range(side):
        for column in range(side):
            window = around[..., row * stride :, column * stride :][..., :kernel, :kernel]
            assert window.shape[-2:] == (kernel, kernel)
            found[..., row, column] = window.sum(dim=(2, 3)) / kernel**2
    return found.flatten(1)


def adaptive(maps: Tensor, side: int) -> Tensor:
    """Means over windows from floor(i n / side) to ceil((i + 1) n / side)."""
    bounds = [
        [(i * n // side, math.ceil((i + 1) * n / side)) for i in range(side)]
        for n in (maps.shape[-2], maps.shape[-1])
    ]
    rows = [
        torch.stack(
            [maps[..., top:bottom, left:right].mean(dim=(2, 3)) for left, right in bounds[1]],
            dim=-1,
        )
        for top, bottom in bounds[0]
    ]
    return torch.stack(rows, dim=-2).flatten(1)


def random_maps(height: int, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("map_side", "kernel", "stride", "padding", "side"), PUBLISHED)
def test_windows_are_the_published_ones(
    monkeypatch: pytest.MonkeyPatch,
    map_side: int,
    kernel: int,
    stride: int,
    padding: int,
    side: int,
    compiled: bool,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    maps = random_maps(map_side)
    expected = windowed(maps, kernel, stride, padding, side)
    torch.testing.assert_close(pool_stage(maps, side), expected, rtol=1e-4, atol=1e-6)
    if map_side % side:  # else both modes are the same windows
        assert not torch.allclose(expected, adaptive(maps, side), rtol=1e-2)


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(56, 56, 12), (28, 28, 6), (4, 4, 2), (112, 56, 12), (14, 28, 3), (1, 1, 2)],
)
def test_other_maps_get_adaptive_windows(height: int, width: int, side: int) -> None:
    maps = random_maps(height, width)
    pooled = pool_stage(maps, side)
    assert pooled.shape == (2, 3 * side * side)
    torch.testing.assert_close(pooled, adaptive(maps, side), rtol=1e-4, atol=1e-6)


def test_resnet50_gives_the_published_dimensions() -> None:
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=50).eval()
    published = {
        "feature1": 9216,
        "feature2": 9216,
        "feature3": 8192,
        "feature4": 9216,
        "feature5": 8192,
    }
    assert layer_dims(backbone) == published | {"avgpool": 2048}
    with torch.no_grad():
        pooled = pooled_layers(backbone, torch.randn(1, 3, 224, 224), LAYERS)
    assert {layer: rows.shape[1] for layer, rows in pooled.items()} == published | {"avgpool": 2048}


@pytest.mark.parametrize("px", [224, 64])
@torch.no_grad()
def test_every_backbone_gives_the_dimensions_that_it_tells(px: int) -> None:
    for backbone in (
        SmallBackbone(widths=(8, 10, 12, 14, 16)),
        ResNetBackbone(depth=18),
        AlexNetBackbone(),
    ):
        pooled = pooled_layers(backbone.eval(), torch.randn(1, 3, px, px), LAYERS)
        assert {layer: rows.shape[1] for layer, rows in pooled.items()} == layer_dims(backbone)
        channels = layer_channels(backbone)
        assert channels["avgpool"] == channels["feature5"] == backbone.stage_channels[-1]


class GivenMaps(Backbone):
    """Returns the same maps whatever it is shown."""

    pooled_sides = (12, 6, 4, 3, 2)

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.maps = maps
        self.stage_channels = tuple(stage.shape[1] for stage in maps.values())

    def layers_of_stages(self) -> list[list[nn.Module]]:
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.maps

    def embed(self, patches: Tensor) -> Tensor:
        raise NotImplementedError


IMAGES = torch.zeros(2, 3, 8, 8)


def test_layers_are_the_pooled_stages_and_avgpool_is_the_mean_of_feature5() -> None:
    maps = {
        stage: random_maps(side) for stage, side in zip(STAGES, (112, 56, 28, 14, 7), strict=True)
    }
    asked = ("avgpool", "feature4", "feature1")
    pooled = pooled_layers(GivenMaps(maps), IMAGES, asked)
    assert tuple(pooled) == asked
    torch.testing.assert_close(pooled["avgpool"], maps["feature5"].flatten(2).mean(dim=2))
    torch.testing.assert_close(pooled["feature4"], windowed(maps["feature4"], 8, 3, 0, 3))
    torch.testing.assert_close(pooled["feature1"], windowed(maps["feature1"], 10, 10, 4, 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_pooled_in_float32_and_do_not_overflow(dtype: torch.dtype) -> None:
    large = 60_000  # 36 of them, a window of feature5, are far beyond float16
    maps = {stage: (random_maps(7).abs() + large).to(dtype) for stage in STAGES}
    with torch.autocast("cpu", torch.bfloat16):  # as while features are computed
        pooled = pooled_layers(GivenMaps(maps), IMAGES, ("feature5", "avgpool"))
    assert pooled["feature5"].dtype == pooled["avgpool"].dtype == torch.float32
    assert torch.isfinite(pooled["feature5"]).all()
    torch.testing.assert_close(pooled["feature5"], windowed(maps["feature5"].float(), 6, 1, 0, 2))
    torch.testing.assert_close(pooled["avgpool"], maps["feature5"].float().mean(dim=(2, 3)))
