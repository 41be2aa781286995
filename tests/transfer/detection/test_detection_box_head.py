"""RoIAlign, losses and detections of regions beside plain loops and numbers."""

import math

import numpy as np
import plain_detection as plain
import pytest
import torch
from detection_batches import random_objects, rows
from torch import Tensor

from relloc.transfer.detection.align import align
from relloc.transfer.detection.box_head import (
    BoxPredictor,
    DetectionRule,
    box_losses,
    detections,
)
from relloc.transfer.detection.boxes import ROI_STDS
from relloc.transfer.detection.regions import Regions


def test_regions_are_aligned_as_by_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 6, 8, generator=generator)
    # Large and small ones, one smaller than a pixel, one at the edges.
    boxes = torch.tensor([[3.0, 5, 120, 90], [40, 40, 56, 56], [9, 9, 9.5, 9.25], [0, 0, 128, 96]])
    images = torch.tensor([0, 1, 1, 0])
    aligned = align(features, boxes, images, side=4, stride=16)
    for number in range(4):
        own = features[images[number]].double().numpy()
        expected = plain.roi_align(own, boxes[number].tolist(), 4, 16)
        assert np.abs(aligned[number].numpy() - expected).max() < 1e-4


def test_features_in_bfloat16_are_aligned_in_float32() -> None:
    # A ramp along x: the features are the coordinates.
    ramp = torch.arange(64.0).repeat(1, 1, 8, 1).bfloat16()
    boxes = torch.tensor([[400.0, 16, 432, 48]])
    images = torch.tensor([0])
    aligned = align(ramp, boxes, images, side=2, stride=16)
    assert aligned.dtype == torch.bfloat16
    exact = align(ramp.float(), boxes, images, side=2, stride=16)
    assert torch.equal(aligned, exact.bfloat16())
    # The middle of a bin is half a cell to the left: the first cell has its middle at 8 px.
    assert exact[0, 0, 0].tolist() == pytest.approx([25, 26])


def test_aligned_features_have_the_layout_of_the_map() -> None:
    features = torch.randn(2, 4, 5, 6)
    boxes, images = torch.tensor([[4.0, 4, 60, 50]]), torch.tensor([1])
    for layout in (torch.contiguous_format, torch.channels_last):
        own = features.contiguous(memory_format=layout)
        aligned = align(own, boxes, images, side=3, stride=16)
        assert aligned.is_contiguous(memory_format=layout)
        assert torch.equal(aligned, align(features, boxes, images, side=3, stride=16))


def test_the_predictor_starts_as_published() -> None:
    predictor = BoxPredictor(2048, 20, torch.Generator().manual_seed(0))
    assert predictor.score.weight.shape == (21, 2048)
    assert predictor.move.weight.shape == (80, 2048)
    assert predictor.score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert predictor.move.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not predictor.score.bias.any()
    assert not predictor.move.bias.any()
    features = torch.randn(3, 2048)
    logits, offsets = predictor(features)
    assert logits.shape == (3, 21)
    assert torch.equal(offsets.reshape(3, 80), predictor.move(features))


def regions_of(images: list[int], classes: list[int], n_classes: int) -> Regions:
    generator = torch.Generator().manual_seed(1)
    n = len(images)
    boxes = random_objects(n, (100, 100), 1, generator).boxes
    boxes[:, 2:] += 5
    return Regions(
        boxes=boxes,
        images=torch.tensor(images),
        objects=torch.zeros(n, dtype=torch.int64),
        classes=torch.tensor(classes),
        object_boxes=boxes + torch.randn(n, 4, generator=generator),
        positive=torch.tensor(classes) < n_classes,
    )


def test_both_losses_are_divided_by_all_regions_of_their_group() -> None:
    # Groups of two images: one of 3 + 1 regions, one of a single image with 2.
    regions = regions_of([0, 0, 0, 1, 2, 2], [0, 3, 3, 2, 1, 3], n_classes=3)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    offsets = torch.randn(6, 3, 4, generator=generator, requires_grad=True)
    losses = box_losses(logits, offsets, regions, [0, 0, 1])

    class_losses, region_losses = [], []
    for number in range(6):
        own = rows(logits.detach())[number]
        class_ = int(regions.classes[number])
        class_losses.append(math.log(sum(math.exp(value) for value in own)) - own[class_])
        region_losses.append(0.0)
        if class_ < 3:
            box = rows(regions.object_boxes)[number]
            wanted = plain.encode(rows(regions.boxes)[number], box, ROI_STDS)
            given = rows(offsets[number].detach())[class_]
            region_losses[-1] = sum(abs(g - w) for g, w in zip(given, wanted, strict=True))
    for name, each in (("class", class_losses), ("box", region_losses)):
        expected = 2 / 3 * sum(each[:4]) / 4 + 1 / 3 * sum(each[4:]) / 2
        assert losses[name].item() == pytest.approx(expected, rel=1e-4)

    losses["box"].backward()
    assert offsets.grad is not None
    # Only the offsets of the true class of a positive region are trained.
    is_trained = (offsets.grad != 0).all(dim=2)
    assert is_trained.nonzero().tolist() == [[0, 0], [3, 2], [4, 1]]


def test_a_uniform_answer_to_512_regions_an_image_has_the_loss_log_21() -> None:
    images = [0] * 512 + [1] * 512
    regions = regions_of(images, [20] * 1024, n_classes=20)
    losses = box_losses(torch.zeros(1024, 21), torch.zeros(1024, 20, 4), regions, [0, 0])
    assert losses["class"].item() == pytest.approx(math.log(21), rel=1e-5)
    assert losses["box"].item() == 0


def detect_by_loops(
    logits: Tensor, offsets: Tensor, boxes: Tensor, size: tuple[int, int], rule: DetectionRule
) -> list[tuple[float, int, list[float]]]:
    n_regions, n_classes = offsets.shape[:2]
    found = []
    for class_ in range(n_classes):
        candidates, scores = [], []
        for number in range(n_regions):
            exponents = np.exp(logits[number].double().numpy())
            score = exponents[class_] / exponents.sum()
            if score > rule.above_score:
                offset = rows(offsets[number])[class_]
                box = plain.decode(rows(boxes)[number], offset, ROI_STDS)
                candidates.append(plain.clip(box, size))
                scores.append(float(score))
        for place in plain.suppress(candidates, scores, rule.nms_overlap):
            found.append((scores[place], class_, candidates[place]))
    found.sort(key=lambda each: -each[0])
    return found[: rule.most_per_image]


def test_detections_are_those_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    counts, sizes = [25, 0, 15], [(100, 90), (64, 64), (60, 110)]
    n = sum(counts)
    boxes = random_objects(n, (60, 90), 1, generator).boxes
    boxes[:, 2:] += 3
    logits = 2 * torch.randn(n, 5, generator=generator)
    offsets = torch.randn(n, 4, 4, generator=generator)
    rule = DetectionRule(most_per_image=30)
    found = detections(logits, offsets, boxes, counts, sizes, rule)
    first = 0
    for count, size, own in zip(counts, sizes, found, strict=True):
        part = slice(first, first + count)
        expected = detect_by_loops(logits[part], offsets[part], boxes[part], size, rule)
        assert own.classes.tolist() == [class_ for _, class_, _ in expected]
        assert own.scores.tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-4)
        wanted = torch.tensor([box for _, _, box in expected]).reshape(-1, 4)
        assert torch.allclose(own.boxes, wanted, atol=1e-3)
        first += count
    assert [len(own.boxes) for own in found][:2] == [30, 0]


def test_a_score_has_to_exceed_the_least_and_classes_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[10.0, 10, 50, 50], [11, 10, 50, 50]])
    shares = torch.tensor([[0.5, 0.4, 0.06, 0.04], [0.3, 0.45, 0.2, 0.05]])
    rule = DetectionRule()
    (found,) = detections(shares.log(), torch.zeros(2, 3, 4), boxes, [2], [(60, 60)], rule)
    # One box of each class, the better one; the last column is background.
    assert found.classes.tolist() == [0, 1, 2]
    assert found.scores.tolist() == pytest.approx([0.5, 0.45, 0.2])
    assert found.boxes[:, 0].tolist() == pytest.approx([10, 11, 11])
    strict = DetectionRule(above_score=0.2, most_per_image=2)
    shares = torch.tensor([[0.2, 0.1, 0.1, 0.6], [0.3, 0.25, 0.21, 0.24]])
    (found,) = detections(shares.log(), torch.zeros(2, 3, 4), boxes, [2], [(60, 60)], strict)
    assert found.scores.tolist() == pytest.approx([0.3, 0.25])
    # Four equal logits are scores of exactly a quarter.
    logits, offsets = torch.zeros(1, 4), torch.zeros(1, 3, 4)
    for above, n_found in ((0.25, 0), (0.2499, 3)):
        rule = DetectionRule(above_score=above)
        (found,) = detections(logits, offsets, boxes[:1], [1], [(60, 60)], rule)
        assert len(found.scores) == n_found
