"""Faster R-CNN C4: its weights, how its losses are put together, and that it learns."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from detection_batches import batch_of, part, random_objects, targets
from torch import Tensor, nn

from relloc.models.alexnet import AlexNetBackbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.transfer.detection.batch import DetectionBatch, pad_images
from relloc.transfer.detection.boxes import overlaps
from relloc.transfer.detection.faster_rcnn_c4 import C4Settings, FasterRCNNC4
from relloc.transfer.detection.proposals import ProposalCounts
from relloc.transfer.detection.regions import RegionTraining
from relloc.transfer.detection.rpn import RpnTraining
from relloc.transfer.detection.strides import stride_of
from relloc.transfer.sync_batch_norm import CpuSyncBatchNorm, synchronize

LITTLE = C4Settings(
    rpn=RpnTraining(anchors_per_image=32, use_crossing_anchors=True),
    training_proposals=ProposalCounts(before_nms=200, after_nms=40),
    test_proposals=ProposalCounts(before_nms=100, after_nms=20),
    regions=RegionTraining(regions_per_image=16),
)


@functools.cache
def resnet50() -> ResNetBackbone:
    torch.manual_seed(0)
    return ResNetBackbone(depth=50)


def small(settings: C4Settings = LITTLE, seed: int = 0) -> FasterRCNNC4:
    torch.manual_seed(1)
    backbone = SmallBackbone(widths=(8, 8, 16, 16, 24))
    return FasterRCNNC4(backbone, 3, settings, seed=seed)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_last_stage_of_stride_1_sees_regions_of_all_their_cells() -> None:
    torch.manual_seed(1)
    backbone = ResNetBackbone(depth=18, width=0.125, last_stride=1)
    network = FasterRCNNC4(backbone, 3, LITTLE, seed=0).eval()
    assert network.stride == 16
    assert network.stage5(torch.randn(1, 32, 14, 14)).shape == (1, 64, 14, 14)
    [found] = network.detect(torch.randn(1, 3, 96, 128), [(96, 128)])
    assert found.boxes.isfinite().all()


def test_parameters_on_resnet50_are_those_of_the_protocol() -> None:
    network = FasterRCNNC4(resnet50(), 20, C4Settings(), seed=0)
    assert network.stride == 16
    assert count(network.rpn.conv) == 9_438_208
    assert count(network.rpn.score) == 15_375
    assert count(network.rpn.move) == 61_500
    assert count(network.stage5) == 14_964_736
    assert count(network.norm) == 4_096
    assert count(network.predictor.score) == 43_029
    assert count(network.predictor.move) == 163_920
    new = 9_438_208 + 15_375 + 61_500 + 4_096 + 43_029 + 163_920
    assert count(network) == count(resnet50()) + new
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_trunk_and_stage_5_have_the_weights_and_statistics_of_the_backbone() -> None:
    backbone = copy.deepcopy(resnet50())
    for number, value in enumerate(backbone.state_dict().values()):
        if value.is_floating_point():
            value += number / 1000
    network = FasterRCNNC4(backbone, 20, C4Settings(), seed=0)
    own = network.stage5.state_dict()
    expected = backbone.layer4.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    trunk = list(network.trunk.state_dict().values())
    above = list(backbone.state_dict().values())[: len(trunk)]
    assert all(torch.equal(one, other) for one, other in zip(trunk, above, strict=True))
    # They are copies.
    assert own["0.conv1.weight"].data_ptr() != expected["0.conv1.weight"].data_ptr()


def test_the_added_norm_starts_as_identity_and_has_no_relu_behind_it() -> None:
    network = small()
    assert (network.norm.weight == 1).all()
    assert not network.norm.bias.any()
    seen: list[Tensor] = []
    network.predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.losses(two_images())
    # Means over cells of normalized values are on both sides of zero, those after a ReLU are not.
    assert (seen[0] < 0).any()
    assert seen[0].mean().abs() < 1e-3


@pytest.mark.parametrize(
    ("backbone", "stride"),
    [
        (SmallBackbone(widths=(8, 8, 8, 8, 8)), 32),
        (ResNetBackbone(depth=18), 16),
        (AlexNetBackbone(), 16),
    ],
)
def test_strides_are_measured(backbone: nn.Module, stride: int) -> None:
    stages = list(backbone.stages().values())
    before = [value.clone() for value in backbone.buffers()]
    assert stride_of(nn.Sequential(*stages[:4])) == stride
    after = list(backbone.buffers())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert backbone.training


def test_added_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = small(seed=3)
    torch.manual_seed(6)
    other = small(seed=3)
    assert torch.equal(one.rpn.conv.weight, other.rpn.conv.weight)
    assert torch.equal(one.predictor.move.weight, other.predictor.move.weight)
    assert not torch.equal(one.rpn.conv.weight, small(seed=4).rpn.conv.weight)


def two_images() -> DetectionBatch:
    generator = torch.Generator().manual_seed(0)
    sizes = [(128, 100), (96, 160)]
    objects = [random_objects(3, size, 3, generator) for size in sizes]
    return batch_of(sizes, objects, [21, 22])


def four_images() -> DetectionBatch:
    generator = torch.Generator().manual_seed(7)
    sizes = [(128, 100), (96, 160), (64, 64), (100, 150)]
    objects = [random_objects(n, size, 3, generator) for n, size in enumerate(sizes)]
    return batch_of(sizes, objects, [31, 32, 33, 34])


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
    assert set(whole) == {"rpn_score", "rpn_box", "class", "box"}
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
    # Groups of four have other denominators.
    other = network.losses(dataclasses.replace(batch, groups=[0, 0, 0, 0]))
    assert other["rpn_box"].item() != pytest.approx(whole["rpn_box"].item(), rel=1e-5)


def test_losses_of_images_without_objects_and_of_no_images_have_finite_gradients() -> None:
    network = small().eval()
    for batch in (
        batch_of([(64, 96)], [targets([])]),
        batch_of([(64, 96)], [targets([[5, 5, 5.3, 5.2], [9, 9, 9, 20]])]),
        batch_of([], []),
    ):
        losses = network.losses(batch)
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
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)


def test_images_are_detected_alone_as_in_a_batch() -> None:
    network = small().eval()
    network.settings = C4Settings(test_proposals=LITTLE.test_proposals)
    batch = four_images()
    together = network.detect(batch.images, batch.sizes)
    for image, found in enumerate(together):
        (alone,) = network.detect(batch.images[image : image + 1], batch.sizes[image : image + 1])
        assert torch.allclose(alone.boxes, found.boxes, atol=1e-2)
        height, width = batch.sizes[image]
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= width
        assert found.boxes[:, 3].max() <= height
        assert 0 < len(found.boxes) <= 100
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def waits(compute: Callable[[], object]) -> list[str]:
    """Returns the line of each wait of the host for the GPU in a computation."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = []
    for each in caught:
        if "synchronizing CUDA operation" in str(each.message):
            lines.append(f"{each.filename}:{each.lineno}")
    return lines


@pytest.mark.gpu
def test_losses_wait_for_the_device_only_to_suppress_and_to_count() -> None:
    device = torch.device("cuda")
    network = small().to(device).eval()
    batch = four_images()
    on_gpu = []
    for each in batch.targets:
        moved = dataclasses.replace(
            each, boxes=each.boxes.to(device), classes=each.classes.to(device)
        )
        on_gpu.append(moved)
    batch = dataclasses.replace(batch, images=batch.images.to(device), targets=on_gpu)

    def compute() -> None:
        losses = network.losses(batch)
        torch.stack(list(losses.values())).sum().backward()

    # The first time, memory and kernels are prepared.
    compute()
    # torch says nothing of a wait inside of torchvision's nms; it does of one to count.
    assert len(waits(lambda: torch.nonzero(torch.ones(2, device=device)))) == 1
    found = waits(compute)
    print(found)  # shown where the test fails
    # All images at once: how many proposals are usable, and how many regions are chosen.
    assert len(found) <= 2


def test_batch_norms_can_be_synchronized() -> None:
    network = small()
    plain = network.losses(two_images())
    synchronize(network, torch.device("cpu"))
    kinds = {type(module) for module in network.modules()}
    assert nn.BatchNorm2d not in kinds
    assert CpuSyncBatchNorm in kinds
    for name, loss in network.losses(two_images()).items():
        assert loss.item() == pytest.approx(plain[name].item(), rel=1e-3)


@pytest.mark.slow
def test_it_learns_to_find_bright_rectangles() -> None:
    sizes = [(128, 160), (160, 128)]
    objects = [
        targets([[20, 30, 80, 90], [100, 60, 150, 120]], [0, 1]),
        targets([[40, 60, 110, 140]], [1]),
    ]
    images = []
    generator = torch.Generator().manual_seed(0)
    for size, each in zip(sizes, objects, strict=True):
        image = 0.1 * torch.randn(3, *size, generator=generator)
        for (x1, y1, x2, y2), class_ in zip(each.boxes.int().tolist(), each.classes, strict=True):
            image[class_, y1:y2, x1:x2] += 3
        images.append(image)
    padded = pad_images(images)

    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(16, 16, 32, 32, 32))
    network = FasterRCNNC4(backbone, 2, LITTLE, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    # At a tenth of the rate it settles, so that rounding hardly moves where it ends.
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[150])
    sums, score_losses = [], []
    for step in range(200):
        batch = DetectionBatch(
            images=padded,
            sizes=sizes,
            targets=objects,
            groups=[0, 0],
            seeds=[2 * step, 2 * step + 1],
        )
        losses = network.losses(batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        sums.append(total.item())
        score_losses.append(losses["rpn_score"].item())
    assert score_losses[0] > 0.6
    assert sum(score_losses[-10:]) / 10 < 0.05
    assert sum(sums[-10:]) / 10 < 0.4 * sums[0]

    network.eval()
    for each, found in zip(objects, network.detect(padded, sizes), strict=True):
        # Each object is found by a detection that is rather sure of its class; before training
        # none is. Which detections are the surest of all depends on rounding.
        ious = overlaps(each.boxes, found.boxes)
        is_its_class = found.classes == each.classes[:, None]
        best = (ious * (is_its_class & (found.scores > 0.5))).amax(dim=1)
        assert best.min() > 0.5
