import pytest
import torch

from relloc.models.backbone import STAGES
from relloc.models.small import SmallBackbone


@pytest.mark.parametrize(
    ("px", "sides"), [(224, (56, 28, 14, 7, 4)), (64, (16, 8, 4, 2, 1)), (32, (8, 4, 2, 1, 1))]
)
def test_the_stem_quarters_an_image_and_each_block_halves_the_map(
    px: int, sides: tuple[int, ...]
) -> None:
    backbone = SmallBackbone(widths=(8, 10, 12, 14, 16)).eval()
    stages = backbone(torch.randn(2, 3, px, px))
    assert tuple(stages) == STAGES
    assert [maps.shape for maps in stages.values()] == [
        (2, channels, side, side) for channels, side in zip((8, 10, 12, 14, 16), sides, strict=True)
    ]
    assert backbone.stage_channels == (8, 10, 12, 14, 16)


@torch.no_grad()
def test_the_embedding_is_the_last_stage_averaged_over_places() -> None:
    backbone = SmallBackbone(widths=[8, 10, 12, 14, 16]).eval()
    patches = torch.randn(3, 3, 128, 128)
    maps = backbone(patches)["feature5"]
    by_hand = torch.stack(
        [torch.stack([channel.sum() / channel.numel() for channel in image]) for image in maps]
    )
    embedded = backbone.embed(patches)
    assert embedded.shape == (3, backbone.embedding_dim)
    torch.testing.assert_close(embedded, by_hand)


@torch.no_grad()
def test_every_stage_is_taken_after_its_activation() -> None:
    for maps in SmallBackbone(widths=(8, 10, 12, 14, 16))(torch.randn(2, 3, 64, 64)).values():
        assert maps.min() == 0 < maps.max()


@pytest.mark.parametrize("widths", [(), (4, 6, 8, 10), (4, 6, 8, 10, 12, 14)])
def test_another_number_of_widths_is_an_error_that_counts_them(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"model\.backbone\.widths .*\b{len(widths)} .*\b5\b"):
        SmallBackbone(widths=widths)


def test_widths_that_torch_does_not_train_safely_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths contains 7.*8"):
        SmallBackbone(widths=(8, 8, 7, 16, 16))
