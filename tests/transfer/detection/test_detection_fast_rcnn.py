"""Fast R-CNN: pooling, losses and detections beside plain loops, and its layers."""

import copy
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.transfer.alexnet import FineTunedAlexNet
from relloc.transfer.detection.align import pool_regions
from relloc.transfer.detection.fast_rcnn import (
    FastRcnn,
    alexnet_fast_rcnn,
    staged_fast_rcnn,
)
from relloc.transfer.detection.given_proposals import RegionBatch
from relloc.transfer.detection.regions import Regions
from relloc.transfer.dropout import apply_layers

N_CLASSES = 3


def caffe_pool(features: np.ndarray, box: Sequence[float], side: int, stride: int) -> np.ndarray:
    """The pooling of caffe's roi_pooling_layer.cpp in plain loops."""
    _, height, width = features.shape
    # Halves are rounded away from zero in C.
    left, top, right, bottom = (math.floor(value / stride + 0.5) for value in box)
    rows, columns = max(bottom - top + 1, 1), max(right - left + 1, 1)
    pooled = np.zeros((len(features), side, side))
    for row, column in np.ndindex(side, side):
        start_y = min(max(math.floor(row * rows / side) + top, 0), height)
        end_y = min(max(math.ceil((row + 1) * rows / side) + top, 0), height)
        start_x = min(max(math.floor(column * columns / side) + left, 0), width)
        end_x = min(max(math.ceil((column + 1) * columns / side) + left, 0), width)
        if end_y > start_y and end_x > start_x:
            cell = features[:, start_y:end_y, start_x:end_x]
            pooled[:, row, column] = cell.max(axis=(1, 2))
    return pooled


def test_regions_are_pooled_as_by_caffe() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 7, 9, generator=generator)
    # Large and small ones, a pixel, halves that are rounded, one at the edges and one beyond.
    boxes = [
        (3, 5, 120, 90),
        (8, 8, 24, 24),
        (40, 40, 40, 40),
        (0, 0, 143, 111),
        (100, 90, 170, 130),
    ]
    images = torch.tensor([0, 1, 1, 0, 1])
    found = pool_regions(features, torch.tensor(boxes).float(), images, side=6, stride=16)
    for number, box in enumerate(boxes):
        own = features[images[number]].double().numpy()
        expected = caffe_pool(own, box, 6, 16)
        assert np.abs(found[number].double().numpy() - expected).max() < 1e-6


def test_pooled_regions_have_type_and_layout_of_the_map() -> None:
    features = torch.randn(2, 4, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    boxes, images = torch.tensor([[4.0, 4, 60, 50]]), torch.tensor([1])
    found = pool_regions(features, boxes, images, side=3, stride=16)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain = pool_regions(features.float().contiguous(), boxes, images, side=3, stride=16)
    assert torch.equal(found.float(), plain)


class Fixed(nn.Module):
    """In place of the predictor: gives what it is told, whatever it sees."""

    def __init__(self, logits: Tensor, offsets: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.offsets = offsets

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        n = len(features)
        return self.logits[:n], self.offsets[:n]


def statistics() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(N_CLASSES, 4, generator=generator) / 10
    stds = torch.rand(N_CLASSES, 4, generator=generator) + 0.1
    return {"means": means, "stds": stds}


def small_network(**changes: Tensor) -> FastRcnn:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 16, 16)).eval()
    settings = {**statistics(), **changes}
    return staged_fast_rcnn(backbone, **settings, seed=0).eval()


def with_answers(logits: Tensor, offsets: Tensor, **changes: Tensor) -> FastRcnn:
    network = small_network(**changes)
    network.predictor = Fixed(logits, offsets)
    return network


def plain_offsets(reference: Sequence[float], box: Sequence[float]) -> list[float]:
    shifts, ratios = [], []
    for axis in (0, 1):
        side = reference[axis + 2] - reference[axis]
        own_side = box[axis + 2] - box[axis]
        shifts.append((box[axis] + own_side / 2 - reference[axis] - side / 2) / side)
        ratios.append(math.log(own_side / side))
    return [*shifts, *ratios]


def batch_with(regions: Regions, groups: list[int]) -> RegionBatch:
    return RegionBatch(
        images=torch.zeros(len(groups), 3, 64, 64),
        regions=regions,
        groups=groups,
        seeds=torch.arange(len(regions.boxes)),
    )


def test_losses_are_those_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    # Two images of five and two regions, of one group, and two of three and none, of another.
    images = [0] * 5 + [1] * 2 + [2] * 3
    classes = [0, 2, 3, 3, 1, 3, 0, 2, 3, 3]
    n = len(images)
    corners = torch.rand(n, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 10 + 20 * torch.rand(n, 2, generator=generator)], dim=1)
    objects = boxes + 3 * torch.randn(n, 4, generator=generator)
    # Far from its object, so that the loss is linear there.
    objects[0] += torch.tensor([40.0, 0, 40, 0])
    logits = torch.randn(n, N_CLASSES + 1, generator=generator)
    offsets = torch.randn(n, N_CLASSES, 4, generator=generator)
    regions = Regions(
        boxes=boxes,
        images=torch.tensor(images),
        objects=torch.zeros(n, dtype=torch.int64),
        classes=torch.tensor(classes),
        object_boxes=objects,
        positive=torch.tensor(classes) < N_CLASSES,
    )
    batch = batch_with(regions, [0, 0, 1, 1])
    found = with_answers(logits, offsets).losses(batch)

    means, stds = (statistics()[name].tolist() for name in ("means", "stds"))
    expected = {"class": 0.0, "box": 0.0}
    for group in ((0, 1), (2, 3)):
        numbers = [number for number in range(n) if images[number] in group]
        for number in numbers:
            row = logits[number].double()
            share = torch.exp(row)[classes[number]] / torch.exp(row).sum()
            expected["class"] -= math.log(share) / len(numbers) / 2
            class_ = classes[number]
            if class_ == N_CLASSES:
                continue
            wanted = plain_offsets(boxes[number].tolist(), objects[number].tolist())
            for axis in range(4):
                normalized = (wanted[axis] - means[class_][axis]) / stds[class_][axis]
                error = abs(float(offsets[number, class_, axis]) - normalized)
                loss = error**2 / 2 if error < 1 else error - 0.5
                expected["box"] += loss / len(numbers) / 2
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        expected, rel=1e-4
    )


def test_no_regions_and_no_images_have_a_loss_of_zero_with_gradients() -> None:
    for network in (small_network().train(), alexnet().train()):
        for n_images in (0, 2):
            none = Regions(
                boxes=torch.zeros(0, 4),
                images=torch.zeros(0, dtype=torch.int64),
                objects=torch.zeros(0, dtype=torch.int64),
                classes=torch.zeros(0, dtype=torch.int64),
                object_boxes=torch.zeros(0, 4),
                positive=torch.zeros(0, dtype=torch.bool),
            )
            network.zero_grad()
            losses = network.losses(batch_with(none, [0] * n_images))
            total = losses["class"] + losses["box"]
            total.backward()
            assert float(total.detach()) == 0
            for parameter in network.parameters():
                assert parameter.grad is None or not parameter.grad.any()


def drawn_batch() -> RegionBatch:
    """Two images of noise with twelve regions, of which each second one shows an object."""
    generator = torch.Generator().manual_seed(5)
    n = 12
    corners = torch.rand(n, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 20 + 60 * torch.rand(n, 2, generator=generator)], dim=1)
    is_object = torch.arange(n) % 2 == 0
    classes = torch.where(is_object, torch.arange(n) % N_CLASSES, N_CLASSES)
    regions = Regions(
        boxes=boxes,
        images=torch.arange(n) // 6,
        objects=torch.zeros(n, dtype=torch.int64),
        classes=classes,
        object_boxes=boxes + 3 * torch.randn(n, 4, generator=generator),
        positive=is_object,
    )
    images = torch.randn(2, 3, 160, 128, generator=generator)
    return dataclasses.replace(batch_with(regions, [0, 0]), images=images)


def losses_and_gradients(
    network: FastRcnn, batch: RegionBatch, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    def moved(value: Tensor) -> Tensor:
        return value.to(device, dtype if value.is_floating_point() else None)

    own = copy.deepcopy(network).to(device, dtype)
    regions = Regions(**{name: moved(value) for name, value in vars(batch.regions).items()})
    batch = dataclasses.replace(
        batch, images=moved(batch.images), regions=regions, seeds=moved(batch.seeds)
    )
    # TF32, the default of convolutions, has 10 bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        losses = own.losses(batch)
        (losses["class"] + losses["box"]).backward()
    found = {name: value.detach() for name, value in losses.items()}
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return {name: value.cpu().double() for name, value in found.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["small", "alexnet"])
def test_losses_on_a_device_are_those_in_double_precision(kind: str, device: str) -> None:
    network = small_network() if kind == "small" else alexnet()
    # With dropout, and batch norm of the regions.
    network.train()
    batch = drawn_batch()
    expected = losses_and_gradients(network, batch, "cpu", torch.float64)
    found = losses_and_gradients(network, batch, device, torch.float32)
    assert expected["class"] > 0
    assert expected["box"] > 0
    for name, value in expected.items():
        # Of 100,000 ReLUs one may have an input so close to zero that it opens in one precision
        # alone, which has been seen to change gradients by 1.6 %. Losses have no such steps.
        most = 1e-4 if name in ("class", "box") else 0.05
        assert (found[name] - value).norm() < most * value.norm(), name


def detect(network: FastRcnn, proposals: Sequence[Sequence[float]], size: tuple[int, int]):
    boxes = torch.tensor(proposals).float().reshape(-1, 4)
    (found,) = network.detect(torch.zeros(1, 3, 64, 64), [boxes], [boxes], [size])
    return found


def test_boxes_are_moved_by_the_offsets_of_their_class_and_cut_at_the_last_pixel() -> None:
    box, target = (10.0, 10, 30, 50), (14.0, 8, 40, 44)
    means, stds = statistics()["means"], statistics()["stds"]
    offsets = torch.zeros(2, N_CLASSES, 4)
    offsets[0, 1] = (torch.tensor(plain_offsets(box, target)) - means[1]) / stds[1]
    # To 20 px beyond the right and lower border of 60 x 50 px.
    beyond = plain_offsets(box, (20.0, 20, 79, 69))
    offsets[1, 2] = (torch.tensor(beyond) - means[2]) / stds[2]
    logits = torch.full((2, N_CLASSES + 1), -20.0)
    logits[0, 1], logits[1, 2] = 20, 10
    found = detect(with_answers(logits, offsets), [box, box], (50, 60))
    assert found.classes.tolist() == [1, 2]
    assert found.boxes[0].tolist() == pytest.approx(target, abs=1e-3)
    assert found.boxes[1].tolist() == pytest.approx([20, 20, 59, 49], abs=1e-3)


def no_moves() -> dict[str, Tensor]:
    return {"means": torch.zeros(N_CLASSES, 4), "stds": torch.ones(N_CLASSES, 4)}


def test_suppression_counts_the_last_pixels() -> None:
    # 2 x 10 px with a column in common: 10 of 30 pixels, and none without the last ones. The second
    # pair shares 10 of 50 pixels, which is less than 0.3.
    boxes = [(0.0, 0, 1, 9), (1.0, 0, 2, 9), (20.0, 0, 22, 9), (22.0, 0, 24, 9)]
    logits = torch.full((4, N_CLASSES + 1), -20.0)
    logits[:, 0] = torch.tensor([23.0, 22, 21, 20])
    network = with_answers(logits, torch.zeros(4, N_CLASSES, 4), **no_moves())
    found = detect(network, boxes, (64, 64))
    assert sorted(found.boxes[:, 0].tolist()) == pytest.approx([0, 20, 22])
    # Other classes do not suppress each other.
    logits[1, 0], logits[1, 1] = -20, 20
    found = detect(network, boxes, (64, 64))
    assert sorted(found.boxes[:, 0].tolist()) == pytest.approx([0, 1, 20, 22])


def test_only_scores_above_a_twentieth_and_a_hundred_of_them_are_kept() -> None:
    rows, columns = np.divmod(np.arange(150), 15)
    boxes = np.stack([columns * 4, rows * 4, columns * 4 + 2, rows * 4 + 2], axis=1)
    logits = torch.full((150, N_CLASSES + 1), -30.0)
    # Of class 0 and background alone.
    shares = torch.linspace(0.04, 0.9, 150)
    logits[:, 0] = torch.log(shares / (1 - shares))
    logits[:, N_CLASSES] = 0
    network = with_answers(logits, torch.zeros(150, N_CLASSES, 4), **no_moves())
    found = detect(network, boxes.tolist(), (64, 64))
    assert len(found.scores) == 100
    torch.testing.assert_close(found.scores, shares.flip(0)[:100])
    few = detect(network, boxes[:20].tolist(), (64, 64))
    assert len(few.scores) == int((shares[:20] > 0.05).sum())


def test_an_image_without_proposals_has_no_detections() -> None:
    for network in (small_network(), alexnet()):
        assert len(detect(network, [], (64, 64)).scores) == 0


def test_regions_in_parts_give_the_same_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_network()
    images = torch.randn(2, 3, 64, 64)
    corners = torch.rand(2, 11, 2, 2).sort(dim=2).values.reshape(2, 11, 4) * 60
    settings = (images, list(corners), list(corners), [(64, 64)] * 2)
    whole = network.detect(*settings)
    monkeypatch.setattr("relloc.transfer.detection.fast_rcnn._REGIONS_AT_ONCE", 4)
    for one, other in zip(whole, network.detect(*settings), strict=True):
        torch.testing.assert_close(one.boxes, other.boxes)
        torch.testing.assert_close(one.scores, other.scores)


def alexnet() -> FastRcnn:
    torch.manual_seed(0)
    network = FineTunedAlexNet(AlexNetBackbone().eval(), N_CLASSES, seed=0)
    return alexnet_fast_rcnn(network, **statistics(), seed=0).eval()


def test_the_papers_network_has_its_layers_but_pool5_and_fc8() -> None:
    torch.manual_seed(0)
    classifier = FineTunedAlexNet(AlexNetBackbone().eval(), N_CLASSES, seed=0).eval()
    network = alexnet()
    assert network.stride == 16
    assert isinstance(network.first_stage[0], nn.Conv2d)
    own = dict(network.named_parameters())
    for name, value in classifier.named_parameters():
        if name.startswith("head.10"):
            assert name not in own
        else:
            assert torch.equal(own.pop(name), value), name
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    assert shapes["predictor.score.weight"] == (N_CLASSES + 1, 4096)
    assert shapes["predictor.move.weight"] == (4 * N_CLASSES, 4096)
    assert len(shapes) == 4
    # Before the head: 6 x 6 cells of conv5.
    cells = torch.randn(2, 256, 6, 6)
    expected = network.head(cells)
    assert expected.shape == (2, 4096)
    # In training each region has a dropout of its own, by its seed.
    network.train()
    seeds = torch.tensor([5, 6])
    together = apply_layers(network.head, cells, seeds)
    assert not torch.allclose(together, expected)
    alone = apply_layers(network.head, cells[1:], seeds[1:])
    torch.testing.assert_close(together[1:], alone)


def test_other_networks_have_the_fifth_stage_as_their_head() -> None:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 16, 16)).eval()
    network = small_network()
    assert network.stride == 32
    stages = list(backbone.stages().values())
    for own, stage in ((network.trunk[3], stages[3]), (network.head[0], stages[4])):
        for value, expected in zip(own.parameters(), stage.parameters(), strict=True):
            assert torch.equal(value, expected)


def test_the_statistics_are_saved_with_the_weights() -> None:
    saved = small_network().state_dict()
    assert torch.equal(saved["means"], statistics()["means"])
    assert torch.equal(saved["stds"], statistics()["stds"])
