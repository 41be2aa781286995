import copy
import math

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from relloc.data.annotations import VOID
from relloc.errors import UsageError
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import Backbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.transfer.segmentation.batch import SegmentationBatch
from relloc.transfer.segmentation.fcn import FullyConvolutionalNetwork, mean_over_all_pixels

KINDS = {
    "small": lambda: SmallBackbone(widths=(8, 8, 8, 16, 24)),
    "resnet18": lambda: ResNetBackbone(depth=18),
    "alexnet": AlexNetBackbone,
}


def small_network(**changes: object) -> FullyConvolutionalNetwork:
    torch.manual_seed(0)
    settings = {"align_corners": False, "seed": 0, **changes}
    return FullyConvolutionalNetwork(KINDS["small"](), 4, **settings)  # type: ignore[arg-type]


def batch(n: int = 2, side: int = 64) -> SegmentationBatch:
    generator = torch.Generator().manual_seed(n)
    class_maps = torch.randint(0, 4, (n, side, side), generator=generator)
    class_maps[:, :5] = VOID
    class_maps[0, :, side // 2 :] = VOID  # padding
    images = torch.randn(n, 3, side, side, generator=generator)
    return SegmentationBatch(images=images, class_maps=class_maps, seeds=torch.arange(n))


def n_values(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_heads_of_resnet50_have_the_published_numbers_of_parameters() -> None:
    network = FullyConvolutionalNetwork(ResNetBackbone(depth=50), 21, align_corners=False, seed=0)
    weights = [module.weight for module in network.head.modules() if isinstance(module, nn.Conv2d)]
    assert [weight.numel() for weight in weights[:3]] == [9_437_184, 2_359_296, 11_796_480]
    assert n_values(network.head.classifier) == 10_773
    batch_norms = 2 * 3 * 512
    assert n_values(network.head) == 9_437_184 + 2_359_296 + 11_796_480 + batch_norms + 10_773
    auxiliary = network.auxiliary_head
    assert n_values(auxiliary.classifier) == 5_397
    assert n_values(auxiliary) == 2_359_296 + 2 * 256 + 5_397


def test_heads_begin_as_in_the_source() -> None:
    network = FullyConvolutionalNetwork(ResNetBackbone(depth=50), 21, align_corners=False, seed=3)
    for head in (network.head, network.auxiliary_head):
        for module in head.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert not module.bias.any()
            if isinstance(module, nn.Conv2d) and module is not head.classifier:
                assert module.bias is None
                fan_out = 9 * module.out_channels
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.01)
        assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not head.classifier.bias.any()  # type: ignore[union-attr]
        assert head.dropout.p == 0.1


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first = small_network(seed=5).head.state_dict()
    torch.manual_seed(99)
    again = FullyConvolutionalNetwork(KINDS["small"](), 4, align_corners=True, seed=5)
    other = small_network(seed=6).head.state_dict()
    for name, value in again.head.state_dict().items():
        assert torch.equal(first[name], value)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@torch.no_grad()
def test_the_trunk_is_torchvisions_with_strides_replaced_by_dilation() -> None:
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=50).eval()
    network = FullyConvolutionalNetwork(backbone, 21, align_corners=False, seed=0).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(backbone.state_dict(), strict=False)
    body = nn.Sequential(*list(theirs.children())[:-2])
    images = torch.randn(1, 3, 64, 72)
    found = network.backbone(images)["feature5"]
    assert found.shape == (1, 2048, 8, 9)
    torch.testing.assert_close(found, body(images))
    # The backbone that was given is left as it was.
    assert backbone(images)["feature5"].shape == (1, 2048, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_any_backbone_segments_and_all_its_weights_learn(kind: str) -> None:
    torch.manual_seed(0)
    backbone: Backbone = KINDS[kind]()
    network = FullyConvolutionalNetwork(backbone, 4, align_corners=False, seed=0)
    losses = network.losses(batch())
    assert set(losses) == {"decode", "auxiliary"}
    sum(losses.values(), torch.zeros(())).backward()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.grad.abs().sum() > 0 for module in convolutions)
    network.eval()
    classes = network.segment(torch.randn(2, 3, 64, 96), (33, 50))
    assert classes.shape == (2, 33, 50)
    assert classes.dtype == torch.uint8
    assert classes.max() < 4


def plain_loss(logits: Tensor, class_maps: Tensor, align_corners: bool) -> Tensor:
    """The loss pixel by pixel: minus the logarithm of the right class's share, 0 for void."""
    size = class_maps.shape[-2:]
    logits = interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
    shares = logits.softmax(dim=1)
    total = 0.0
    for image in range(len(class_maps)):
        for row in range(size[0]):
            for column in range(size[1]):
                label = int(class_maps[image, row, column])
                if label != VOID:
                    total -= math.log(shares[image, label, row, column])
    return torch.tensor(total / class_maps.numel())


@pytest.mark.parametrize("align_corners", [False, True])
@torch.no_grad()
def test_the_loss_is_that_of_a_plain_loop_over_all_pixels(align_corners: bool) -> None:
    network = small_network(align_corners=align_corners).eval()  # no dropout
    data = batch(side=32)
    maps = network.backbone(data.images)
    main = plain_loss(network.head(maps["feature5"]), data.class_maps, align_corners)
    auxiliary = network.auxiliary_head(maps["feature4"])
    found = network.losses(data)
    torch.testing.assert_close(found["decode"], main, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found["auxiliary"],
        0.4 * plain_loss(auxiliary, data.class_maps, align_corners),
        rtol=1e-5,
        atol=1e-6,
    )


def test_void_pixels_are_in_the_denominator_unlike_in_torchs_own_mean() -> None:
    logits = torch.zeros(1, 4, 2, 2)
    class_maps = torch.tensor([[[0, VOID], [VOID, VOID]]])
    found = mean_over_all_pixels(logits, class_maps)
    assert found == pytest.approx(math.log(4) / 4)
    assert cross_entropy(logits, class_maps, ignore_index=VOID) == pytest.approx(math.log(4))
    # Where all is void, torch's mean is NaN, and this one 0.
    assert mean_over_all_pixels(logits, torch.full_like(class_maps, VOID)) == 0


@torch.no_grad()
def test_the_head_sees_its_input_beside_two_convolutions() -> None:
    head = small_network().eval().head
    maps = torch.randn(1, 24, 8, 8)
    first, second, third = [module for module in head.modules() if isinstance(module, nn.Conv2d)][
        :3
    ]
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm2d)]
    x = norms[0](first(maps)).relu()
    x = norms[1](second(x)).relu()
    x = norms[2](third(torch.cat([maps, x], dim=1))).relu()
    torch.testing.assert_close(head(maps), head.classifier(x))


def test_dropout_drops_whole_channels_of_the_map() -> None:
    network = small_network(dropout=0.5)
    seen = []
    network.head.dropout.register_forward_hook(lambda _module, _given, found: seen.append(found))
    network.losses(batch(8))
    (maps,) = seen
    dropped = (maps == 0).flatten(2).all(dim=2)
    assert 0.2 < dropped.float().mean() < 0.9


@torch.no_grad()
def test_classes_are_the_largest_logits_resized_first_to_the_image_and_then_further() -> None:
    network = small_network(align_corners=True).eval()
    images = torch.randn(1, 3, 48, 64)
    logits = network.head(network.backbone(images)["feature5"])
    for size in ((48, 64), (31, 75)):
        logits = interpolate(logits, size=size, mode="bilinear", align_corners=True)
    assert torch.equal(network.segment(images, (31, 75))[0].long(), logits[0].argmax(dim=0))


def test_a_batch_without_images_has_gradients_of_zero() -> None:
    network = small_network().eval()  # batch norm has nothing to normalize by
    nothing = SegmentationBatch(
        images=torch.zeros(0, 3, 64, 64),
        class_maps=torch.zeros(0, 64, 64, dtype=torch.int64),
        seeds=torch.zeros(0, dtype=torch.int64),
    )
    sum(network.losses(nothing).values(), torch.zeros(())).backward()
    assert all(value.grad is None or not value.grad.any() for value in network.parameters())


def test_in_bfloat16_the_loss_is_float32_and_close() -> None:
    network = small_network().eval()
    data = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = copy.deepcopy(network).losses(data)
    expected = network.losses(data)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.02)


@pytest.mark.parametrize("n_classes", [0, 256])
def test_class_maps_have_to_fit_into_8_bits(n_classes: int) -> None:
    with pytest.raises(UsageError, match=f"classes is {n_classes}"):
        FullyConvolutionalNetwork(KINDS["small"](), n_classes, align_corners=False, seed=0)
