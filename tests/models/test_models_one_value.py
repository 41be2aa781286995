"""Of one value a batch norm has no variance."""

import pytest
import torch
from torch import nn

from relloc.errors import UsageError
from relloc.features.batch_norm import check_one_image, recalibrate
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.one_value import refuse_one_value
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.pretext.relative_location import RelativeLocation, check_batch_norms


def small(*, with_batch_norm: bool = True) -> SmallBackbone:
    backbone = SmallBackbone(widths=(8, 8, 8, 8, 8))
    if not with_batch_norm:
        for module in list(backbone.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
    return backbone


def model(backbone: SmallBackbone, batch_norm: str, images: int) -> RelativeLocation:
    head = PairHead(
        embedding_dim=8,
        hidden_dim=4,
        batch_norm_momentum=0.1,
        dropout=0.5,
        neck_std=0.01,
        head_std=0.01,
    )
    return RelativeLocation(backbone, head, batch_norm=batch_norm, images_per_batch_norm=images)  # type: ignore[arg-type]


def test_one_image_and_a_map_of_one_pixel_are_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"recipe.images_per_batch_norm=1:.*pretext_batch_norm=joint"
    ):
        check_batch_norms(model(small(), "separate", 1), patch_px=32)


@pytest.mark.parametrize(
    ("batch_norm", "images", "patch_px", "with_batch_norm"),
    [
        ("joint", 1, 32, True),  # nine patches count together
        ("separate", 2, 32, True),
        ("separate", 1, 96, True),  # maps of 2 x 2 px
        ("separate", 1, 32, False),
    ],
)
def test_what_has_a_variance_may_train(
    batch_norm: str, images: int, patch_px: int, with_batch_norm: bool
) -> None:
    check_batch_norms(model(small(with_batch_norm=with_batch_norm), batch_norm, images), patch_px)
    trained = model(small(with_batch_norm=with_batch_norm), batch_norm, images).train()
    trained(torch.rand(images, 9, 3, patch_px, patch_px)).sum().backward()


def test_recalibration_with_one_image_is_refused_where_maps_have_one_pixel() -> None:
    with pytest.raises(UsageError, match="batch_norm=recalibrated.*view.batch"):
        recalibrate(small(), [torch.rand(1, 3, 32, 32)])
    with pytest.raises(UsageError, match="view.batch"):
        check_one_image(small(), 32)
    check_one_image(small(), 96)
    # fc6 has one value per channel of an image, whatever its size.
    with pytest.raises(UsageError, match="view.batch"):
        check_one_image(AlexNetBackbone(), 227)
    assert recalibrate(small(), [torch.rand(1, 3, 96, 96)]) == 1
    assert recalibrate(small(with_batch_norm=False), [torch.rand(1, 3, 32, 32)]) == 0


def test_after_the_block_networks_are_as_before() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3))
    with (
        refuse_one_value(network, "raise the batch"),
        pytest.raises(UsageError, match="raise the batch"),
    ):
        network(torch.rand(1, 3))
    assert not network[0]._forward_pre_hooks
    with refuse_one_value(network.eval(), "raise the batch"):
        network(torch.rand(1, 3))
