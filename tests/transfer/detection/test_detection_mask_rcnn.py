"""Mask R-CNN: its weights, how its losses are put together, and that it learns."""

import copy
import dataclasses
import functools

import pytest
import torch
from detection_batches import pairs, part, random_objects
from torch import Tensor, nn

from relloc.errors import UsageError
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.transfer.detection.anchors import AnchorGrid
from relloc.transfer.detection.batch import DetectionBatch, Targets, pad_images
from relloc.transfer.detection.boxes import overlaps
from relloc.transfer.detection.mask_rcnn import MaskRCNNFPN, MaskRcnnSettings
from relloc.transfer.detection.masks import pasted
from relloc.transfer.detection.proposals import ProposalCounts
from relloc.transfer.detection.regions import RegionTraining
from relloc.transfer.detection.rpn import RpnTraining
from relloc.transfer.resize import Size
from relloc.transfer.sync_batch_norm import CpuSyncBatchNorm, synchronize

LITTLE = MaskRcnnSettings(
    channels=16,
    hidden=32,
    rpn=RpnTraining(anchors_per_image=32, use_crossing_anchors=True),
    training_proposals=ProposalCounts(before_nms=100, after_nms=40),
    test_proposals=ProposalCounts(before_nms=50, after_nms=20),
    regions=RegionTraining(regions_per_image=16),
)


@functools.cache
def resnet50() -> ResNetBackbone:
    torch.manual_seed(0)
    return ResNetBackbone(depth=50)


def small(settings: MaskRcnnSettings = LITTLE, seed: int = 0) -> MaskRCNNFPN:
    torch.manual_seed(1)
    backbone = SmallBackbone(widths=(8, 8, 16, 16, 24))
    return MaskRCNNFPN(backbone, 3, settings, seed=seed)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_on_resnet50_are_those_of_the_protocol() -> None:
    network = MaskRCNNFPN(resnet50(), 80, MaskRcnnSettings(), seed=0)
    assert network.strides == [4, 8, 16, 32, 64]
    assert count(network.pyramid) == 3_346_432
    assert count(network.rpn.conv) == 256 * 256 * 9 + 256 == 590_080
    assert count(network.rpn.score) == 256 * 3 + 3 == 771
    assert count(network.rpn.move) == 256 * 12 + 12 == 3_084
    assert count(network.box_head) == 15_618_449
    assert count(network.mask_head) == 2_644_304
    new = 3_346_432 + 590_080 + 771 + 3_084 + 15_618_449 + 2_644_304
    assert count(network) == count(resnet50()) + new
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_settings_are_those_of_the_protocol() -> None:
    settings = MaskRcnnSettings()
    assert settings.rpn.use_crossing_anchors
    assert (settings.rpn.anchors_per_image, settings.rpn.positive_share) == (256, 0.5)
    training, test = settings.training_proposals, settings.test_proposals
    assert (training.before_nms, training.after_nms, training.nms_overlap) == (2000, 1000, 0.7)
    assert (test.before_nms, test.after_nms, test.nms_overlap) == (1000, 1000, 0.7)
    rule = settings.regions.rule
    assert (rule.positive, rule.negative, rule.low_quality) == (0.5, 0.5, 0.5)
    assert (settings.regions.regions_per_image, settings.regions.positive_share) == (512, 0.25)
    detection = settings.detection
    assert (detection.above_score, detection.nms_overlap) == (0.05, 0.5)
    assert detection.most_per_image == 100


@pytest.mark.parametrize("setting", ["channels", "hidden"])
def test_numbers_of_zero_are_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting} is 0"):
        MaskRcnnSettings(**{setting: 0})


def test_the_trunk_has_the_weights_and_statistics_of_the_backbone() -> None:
    backbone = copy.deepcopy(resnet50())
    for number, value in enumerate(backbone.state_dict().values()):
        if value.is_floating_point():
            value += number / 1000
    network = MaskRCNNFPN(backbone, 80, MaskRcnnSettings(), seed=0)
    own = list(network.trunk.state_dict().values())
    expected = list(backbone.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(own, expected, strict=True))
    # They are copies.
    assert own[0].data_ptr() != expected[0].data_ptr()


def test_anchors_of_the_last_level_are_64_pixels_apart_also_on_odd_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = MaskRCNNFPN(resnet50(), 80, MaskRcnnSettings(), seed=0).eval()
    made = []
    at = AnchorGrid.at

    def remember(*arguments: object) -> object:
        made.append(at(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(AnchorGrid, "at", remember)
    # 13 rows of stride 32 make 7 of the last level, and torchvision's stride of them would be 59.
    with torch.no_grad():
        network.detect(torch.zeros(1, 3, 416, 96), [(416, 96)])
    (anchors,) = made
    assert list(anchors.of_levels) == [
        3 * rows * columns for rows, columns in ((104, 24), (52, 12), (26, 6), (13, 3), (7, 2))
    ]
    last = anchors.boxes[-3 * 7 * 2 :]
    centers = (last[:, :2] + last[:, 2:]) / 2
    assert torch.allclose(centers[:, 1].round().unique(), 64.0 * torch.arange(7))
    assert torch.allclose(centers[:, 0].round().unique(), 64.0 * torch.arange(2))
    first = 0
    for stride, number in zip((4, 8, 16, 32, 64), anchors.of_levels, strict=True):
        sides = anchors.boxes[first, 2:] - anchors.boxes[first, :2]
        assert sides.prod().sqrt().item() == pytest.approx(8 * stride)
        first += number


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        (SmallBackbone(widths=(8, 8, 8, 8, 8)), [8, 16, 32, 64, 128]),
        (ResNetBackbone(depth=18), [4, 8, 16, 32, 64]),
    ],
)
def test_strides_are_measured(backbone: nn.Module, strides: list[int]) -> None:
    assert MaskRCNNFPN(backbone, 2, LITTLE, seed=0).strides == strides  # type: ignore[arg-type]


def test_added_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = small(seed=3).state_dict()
    torch.manual_seed(6)
    other = small(seed=3).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    third = small(seed=4).state_dict()
    for name in ("rpn.conv.weight", "box_head.hidden.weight", "mask_head.score.weight"):
        assert not torch.equal(one[name], third[name])
    pyramids = [name for name in one if name.startswith("pyramid") and one[name].dim() == 4]
    assert all(not torch.equal(one[name], third[name]) for name in pyramids)


def with_masks(targets: Targets, size: Size) -> Targets:
    """Objects whose masks are their boxes."""
    masks = torch.zeros(len(targets.boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, targets.boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return Targets(boxes=targets.boxes, classes=targets.classes, masks=masks)


def images_with(numbers: list[int], sizes: list[Size]) -> DetectionBatch:
    generator = torch.Generator().manual_seed(7)
    objects, images = [], []
    for number, size in zip(numbers, sizes, strict=True):
        objects.append(with_masks(random_objects(number, size, 3, generator), size))
        images.append(torch.randn(3, *size, generator=generator))
    return DetectionBatch(
        images=pad_images(images),
        sizes=sizes,
        targets=objects,
        groups=pairs(len(sizes)),
        seeds=[31 + number for number in range(len(sizes))],
    )


def four_images() -> DetectionBatch:
    return images_with([0, 1, 2, 3], [(128, 100), (96, 160), (64, 64), (100, 150)])


def two_images() -> DetectionBatch:
    return images_with([3, 2], [(128, 100), (96, 160)])


def gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    network.zero_grad()
    return found


def test_four_images_have_the_mean_loss_and_gradient_of_two_pairs() -> None:
    network = small().double().eval()
    batch = four_images()
    batch = dataclasses.replace(batch, images=batch.images.double())
    whole = network.losses(batch)
    assert set(whole) == {"rpn_score", "rpn_box", "class", "box", "mask"}
    sum(whole.values()).backward()
    whole_gradients = gradients(network)
    pairs = [network.losses(part(batch, images)) for images in (slice(0, 2), slice(2, 4))]
    for name, loss in whole.items():
        mean = (pairs[0][name] + pairs[1][name]) / 2
        assert loss.item() == pytest.approx(mean.item(), rel=1e-5)
        assert loss > 0
    sum(sum(pair.values()) / 2 for pair in pairs).backward()
    for name, gradient in gradients(network).items():
        assert torch.allclose(gradient, whole_gradients[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("training", [True, False])
def test_losses_of_images_without_objects_and_of_no_images_have_finite_gradients(
    training: bool,
) -> None:
    network = small().train(training)
    for batch in (images_with([0], [(64, 96)]), images_with([], [])):
        losses = network.losses(batch)
        assert losses["mask"] == 0
        sum(losses.values()).backward()
        for name, gradient in gradients(network).items():
            assert torch.isfinite(gradient).all(), name
    assert all(loss == 0 for loss in losses.values())


def test_losses_under_autocast_are_in_float32_and_near_those_without() -> None:
    network = small().eval()
    batch = two_images()
    exact = network.losses(batch)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = network.losses(batch)
    for name, loss in coarse.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1)


def test_the_layout_of_memory_changes_no_loss() -> None:
    network = small().eval()
    batch = two_images()
    expected = network.losses(batch)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, loss in network.losses(batch).items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4)


def test_targets_without_masks_are_refused() -> None:
    batch = two_images()
    targets = [Targets(boxes=each.boxes, classes=each.classes) for each in batch.targets]
    without = dataclasses.replace(batch, targets=targets)
    with pytest.raises(ValueError, match="masks"):
        small().losses(without)


def test_batch_norms_can_be_synchronized() -> None:
    network = small()
    plain = network.losses(two_images())
    synchronize(network, torch.device("cpu"))
    kinds = {type(module) for module in network.modules()}
    assert nn.BatchNorm2d not in kinds
    assert CpuSyncBatchNorm in kinds
    for name, loss in network.losses(two_images()).items():
        assert loss.item() == pytest.approx(plain[name].item(), rel=1e-3)


def test_alexnet_can_be_its_trunk() -> None:
    network = MaskRCNNFPN(AlexNetBackbone(), 3, LITTLE, seed=0)
    losses = network.losses(images_with([2], [(128, 160)]))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_detections_of_an_image_do_not_depend_on_the_other() -> None:
    network = small().eval()
    # Untrained, all boxes have low scores.
    network.settings = MaskRcnnSettings(
        test_proposals=LITTLE.test_proposals, channels=16, hidden=32
    )
    nn.init.constant_(network.box_head.predictor.score.bias[3:], -2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 128, 128, generator=generator)
    sizes = [(128, 128), (128, 128)]
    both = network.detect(images, sizes)
    for number in range(2):
        own = slice(number, number + 1)
        (alone,) = network.detect(images[own], sizes[own])
        assert 0 < len(alone.boxes) <= 100
        assert torch.allclose(alone.boxes, both[number].boxes, atol=1e-3)
        assert alone.mask_cells is not None
        assert both[number].mask_cells is not None
        assert torch.allclose(alone.mask_cells, both[number].mask_cells, atol=1e-4)
        assert alone.mask_cells.shape == (len(alone.boxes), 28, 28)
        assert alone.mask_cells.min() >= 0
        assert alone.mask_cells.max() <= 1


def test_images_in_which_nothing_is_found_have_no_masks() -> None:
    network = small().eval()
    nn.init.constant_(network.box_head.predictor.score.bias[3:], 50)
    for found in network.detect(torch.zeros(2, 3, 64, 64), [(64, 64), (50, 60)]):
        assert found.boxes.shape == (0, 4)
        assert pasted(found, (64, 64)).masks is not None


@pytest.mark.slow
def test_it_learns_to_find_rectangles_and_angles_with_their_masks() -> None:
    """Objects of the second class lack the upper right quarter of their box."""
    sizes = [(128, 160), (160, 128)]
    boxes = [[[20, 30, 80, 90], [96, 50, 156, 120]], [[30, 60, 110, 140]]]
    classes = [[0, 1], [1]]
    images, objects = [], []
    generator = torch.Generator().manual_seed(0)
    for size, own_boxes, own_classes in zip(sizes, boxes, classes, strict=True):
        image = 0.1 * torch.randn(3, *size, generator=generator)
        masks = torch.zeros(len(own_boxes), *size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2), class_ in zip(masks, own_boxes, own_classes, strict=True):
            mask[y1:y2, x1:x2] = 1
            if class_ == 1:
                mask[y1 : (y1 + y2) // 2, (x1 + x2) // 2 : x2] = 0
            image[class_][mask.bool()] += 3
        images.append(image)
        objects.append(
            Targets(
                boxes=torch.tensor(own_boxes).float(),
                classes=torch.tensor(own_classes),
                masks=masks,
            )
        )
    padded = pad_images(images)

    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(16, 16, 32, 32, 32))
    network = MaskRCNNFPN(backbone, 2, LITTLE, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    # At a tenth of the rate it settles, so that rounding hardly moves where it ends.
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[150])
    mask_losses = []
    for step in range(200):
        batch = DetectionBatch(
            images=padded,
            sizes=sizes,
            targets=objects,
            groups=[0, 0],
            seeds=[2 * step, 2 * step + 1],
        )
        losses = network.losses(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        mask_losses.append(losses["mask"].item())
    assert mask_losses[0] > 0.5
    assert sum(mask_losses[-10:]) / 10 < 0.2

    network.eval()
    for each, found, size in zip(objects, network.detect(padded, sizes), sizes, strict=True):
        # Each object is found by a detection that is rather sure of its class. Which detections
        # are the surest of all depends on rounding.
        ious = overlaps(each.boxes, found.boxes)
        is_its_class = found.classes == each.classes[:, None]
        best = (ious * (is_its_class & (found.scores > 0.5))).max(dim=1)
        assert best.values.min() > 0.5
        found_masks, true_masks = pasted(found, size).masks, each.masks
        assert found_masks is not None
        assert true_masks is not None
        chosen, wanted = found_masks[best.indices], true_masks.bool()
        intersections = (chosen & wanted).sum(dim=(1, 2))
        unions = (chosen | wanted).sum(dim=(1, 2))
        assert (intersections / unions).min() > 0.5
