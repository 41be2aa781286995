"""mIoU against torchmetrics and by hand."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from relloc.errors import DataError
from relloc.transfer.metrics.mean_iou import SegmentationMetric, SegmentationScores

VOID = 255


def scored(pairs: list[tuple[Tensor, Tensor]], n_classes: int) -> SegmentationScores:
    metric = SegmentationMetric(n_classes)
    for image, (predicted, truth) in enumerate(pairs):
        metric.add(image, predicted=predicted, truth=truth)
    return metric.evaluate()


def random_maps(
    n_images: int, n_classes: int, void_share: float, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Maps of several sizes, of whose pixels about half are right."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for image in range(n_images):
        size = (20 + image, 31)
        truth = torch.randint(n_classes, size, generator=generator)
        other = torch.randint(n_classes, size, generator=generator)
        predicted = torch.where(torch.rand(size, generator=generator) < 0.5, truth, other)
        is_void = torch.rand(size, generator=generator) < void_share
        pairs.append((predicted, truth.masked_fill(is_void, VOID).to(torch.uint8)))
    return pairs


@pytest.mark.parametrize("void_share", [0, 0.2, 0.95])
def test_torchmetrics_says_the_same(void_share: float) -> None:
    pairs = random_maps(6, 21, void_share)
    scores = scored(pairs, 21)
    oracle = MulticlassJaccardIndex(21, average="none", ignore_index=VOID)
    for predicted, truth in pairs:
        oracle.update(predicted[None], truth[None].long())
    torch.testing.assert_close(scores.iou_by_class.float(), oracle.compute())
    assert scores.mean_iou == pytest.approx(oracle.compute().mean().item(), rel=1e-6)


def test_pixels_of_all_images_are_counted_together() -> None:
    truth = torch.tensor([[0, 0, 1, VOID]], dtype=torch.uint8)
    small = torch.tensor([[1, VOID]], dtype=torch.uint8)
    scores = scored([(torch.tensor([[0, 1, 1, 0]]), truth), (torch.tensor([[0, 1]]), small)], 2)
    assert scores.confusion.tolist() == [[1, 1], [1, 1]]
    assert scores.iou_by_class.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert scores.mean_iou == pytest.approx(1 / 3)
    assert scores.printed_mean_iou == 33.33
    assert scores.pixel_accuracy == 0.5


def test_a_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    truth = torch.tensor([[0, 0, 1]], dtype=torch.uint8)
    scores = scored([(torch.tensor([[0, 0, 1]]), truth)], 3)
    assert scores.iou_by_class[:2].tolist() == [1, 1]
    assert math.isnan(scores.iou_by_class[2])
    assert scores.mean_iou == 1
    # Predicted alone is enough to count, with an IoU of 0.
    scores = scored([(torch.tensor([[0, 2, 1]]), truth)], 3)
    assert scores.iou_by_class.tolist() == [0.5, 1, 0]
    assert scores.mean_iou == 0.5


def test_void_of_the_truth_counts_nowhere() -> None:
    truth = torch.full((4, 4), VOID, dtype=torch.uint8)
    scores = scored([(torch.zeros(4, 4, dtype=torch.int64), truth)], 2)
    assert scores.confusion.sum() == 0
    assert math.isnan(scores.mean_iou)
    assert math.isnan(scores.pixel_accuracy)


def test_no_image_is_no_pixel() -> None:
    scores = SegmentationMetric(4).evaluate()
    assert scores.confusion.tolist() == [[0] * 4] * 4
    assert scores.confusion.dtype == torch.int64


def test_an_image_counts_once() -> None:
    ((predicted, truth),) = random_maps(1, 5, 0.1)
    metric = SegmentationMetric(5)
    for _ in range(2):
        metric.add(3, predicted=predicted, truth=truth)
    once = scored([(predicted, truth)], 5)
    assert torch.equal(metric.evaluate().confusion, once.confusion)


def test_an_unknown_class_in_the_truth_is_refused() -> None:
    metric = SegmentationMetric(5)
    truth = torch.tensor([[0, 5, 17, 254, VOID]], dtype=torch.uint8)
    metric.add(0, predicted=torch.zeros(1, 5, dtype=torch.int64), truth=truth)
    with pytest.raises(DataError, match="3 pixels"):
        metric.evaluate()


@pytest.mark.gpu
def test_a_gpu_counts_the_same() -> None:
    pairs = random_maps(5, 21, 0.1)
    on_gpu = [(predicted.cuda(), truth.cuda()) for predicted, truth in pairs]
    assert torch.equal(scored(on_gpu, 21).confusion, scored(pairs, 21).confusion)
