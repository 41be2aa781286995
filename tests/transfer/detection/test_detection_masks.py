"""Targets, loss and paste of masks beside plain loops and numbers."""

import math

import numpy as np
import plain_detection as plain
import pytest
import torch
from torch import Tensor

from relloc.transfer.detection import masks
from relloc.transfer.detection.batch import Targets
from relloc.transfer.detection.masks import (
    mask_loss,
    mask_targets,
    paste,
    pasted,
    positive_regions,
)
from relloc.transfer.detection.regions import Regions
from relloc.transfer.detections import Detections

# In double precision a share or probability nearer than this to the threshold may fall elsewhere.
UNSURE = 1e-5


def regions_of(boxes: Tensor, images: list[int], objects: list[int]) -> Regions:
    n = len(images)
    return Regions(
        boxes=boxes,
        images=torch.tensor(images, dtype=torch.int64),
        objects=torch.tensor(objects, dtype=torch.int64),
        classes=torch.arange(n),
        object_boxes=boxes + 1,
        positive=torch.ones(n, dtype=torch.bool),
    )


def objects_with(bitmaps: Tensor) -> Targets:
    n = len(bitmaps)
    return Targets(
        boxes=torch.zeros(n, 4), classes=torch.zeros(n, dtype=torch.int64), masks=bitmaps
    )


def blobs(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks of a few connected parts."""
    coarse = torch.randn(n, 1, 6, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth[:, 0] > 0).to(torch.uint8)


def test_targets_are_those_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = [
        objects_with(blobs(2, 60, 80, generator)),
        objects_with(torch.zeros(0, 50, 50, dtype=torch.uint8)),
        objects_with(blobs(3, 50, 64, generator)),
    ]
    # Larger and smaller than 28 px, with fractions, at the edge, and over it.
    boxes = torch.tensor(
        [[3.2, 4.7, 70.4, 51.9], [0, 0, 20, 17.5], [10, 5, 38, 33], [20.5, 8, 63.9, 49.2]]
    )
    regions = regions_of(boxes, [0, 0, 2, 2], [1, 0, 2, 0])
    found = mask_targets(regions, [2, 0, 2], targets)
    assert found.dtype == torch.bool
    for number in range(4):
        image, object_ = int(regions.images[number]), int(regions.objects[number])
        bitmap = targets[image].masks
        assert bitmap is not None
        # Images are padded to multiples of 32 px.
        rows, columns = bitmap.shape[1:]
        padded = np.zeros((1, -(-rows // 32) * 32, -(-columns // 32) * 32))
        padded[0, :rows, :columns] = bitmap[object_].numpy()
        shares = plain.roi_align(padded, boxes[number].tolist(), 28, 1)[0]
        is_sure = np.abs(shares - 0.5) > UNSURE
        assert is_sure.mean() > 0.9
        np.testing.assert_array_equal(found[number].numpy()[is_sure], (shares >= 0.5)[is_sure])
        assert 0 < found[number].float().mean() < 1


def test_half_a_cell_is_in_the_target_and_pixels_are_squares() -> None:
    bitmap = torch.zeros(1, 40, 40, dtype=torch.uint8)
    bitmap[0, 5:33, 10:24] = 1
    # One pixel for each cell: without the half-pixel shift of aligned=True the mask would move.
    at_pixels = regions_of(torch.tensor([[4.0, 5, 32, 33]]), [0], [0])
    (found,) = mask_targets(at_pixels, [1], [objects_with(bitmap)])
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[:, 6:20] = True
    assert torch.equal(found, expected)
    # Half a pixel to the left, each edge cell has a share of one half.
    between = regions_of(torch.tensor([[3.5, 5, 31.5, 33]]), [0], [0])
    (found,) = mask_targets(between, [1], [objects_with(bitmap)])
    expected[:, 20] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("side", "corner"), [(32, True), (40, False)])
def test_beyond_the_last_pixel_lies_the_padding_of_the_image(side: int, corner: bool) -> None:
    """An object fills the image, and a region of 14 px lies in its lower right corner.

    Cells are half a pixel wide, and each has one sample point. That of the last one lies a quarter
    of a pixel beyond the center of the last pixel. Where the image is padded, three quarters are of
    the object in each direction, so 9/16 in the corner; a cell that is a fifth of a pixel wide has
    a share of 0.6 in each direction, and 0.36 in the corner.
    """
    image = objects_with(torch.ones(1, side, side, dtype=torch.uint8))
    large = regions_of(torch.tensor([[side - 14.0, side - 14, side, side]]), [0], [0])
    (found,) = mask_targets(large, [1], [image])
    assert found.all()
    short = side - 28 / 5
    small = regions_of(torch.tensor([[short, short, side, side]]), [0], [0])
    (found,) = mask_targets(small, [1], [image])
    assert bool(found[-1, -1]) is corner
    # At the edge alone, more than half of each sample point is of the object.
    assert found[-1, :20].all()
    assert found[:20, -1].all()


def test_targets_of_an_image_without_masks_are_refused() -> None:
    without = Targets(boxes=torch.zeros(1, 4), classes=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks"):
        mask_targets(regions_of(torch.zeros(1, 4), [0], [0]), [1], [without])


def test_no_regions_have_no_targets() -> None:
    empty = objects_with(torch.zeros(0, 9, 9, dtype=torch.uint8))
    found = mask_targets(regions_of(torch.zeros(0, 4), [], []), [0], [empty])
    assert found.shape == (0, 28, 28)
    assert mask_targets(regions_of(torch.zeros(0, 4), [], []), [], []).shape == (0, 28, 28)


def test_positive_regions_keep_their_order() -> None:
    positive = [True, False, True, False, False, True, True]
    regions = Regions(
        boxes=torch.arange(28.0).view(7, 4),
        images=torch.tensor([0, 0, 0, 1, 1, 3, 3]),
        objects=torch.arange(7) + 10,
        classes=torch.arange(7) + 20,
        object_boxes=torch.arange(28.0).view(7, 4) + 30,
        positive=torch.tensor(positive),
    )
    found, counts = positive_regions(regions, 4)
    assert counts == [2, 0, 0, 2]
    places = [0, 2, 5, 6]
    for name in ("boxes", "images", "objects", "classes", "object_boxes"):
        assert torch.equal(getattr(found, name), getattr(regions, name)[places]), name
    assert found.positive.all()


def cross_entropy(logit: float, target: float) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def test_the_loss_is_a_mean_over_the_regions_of_a_pair_of_images() -> None:
    # Constant logits, so that a region's loss is that of one cell: all of it is in the target.
    logits = torch.tensor([2.0, -1, 0.5, 3, -2]).view(5, 1, 1).expand(5, 28, 28)
    targets = torch.ones(5, 28, 28, dtype=torch.bool)
    # The first pair has three regions, all of the second image; then one; the last image has one.
    images = torch.tensor([1, 1, 1, 2, 4])
    losses = [cross_entropy(value, 1) for value in (2, -1, 0.5, 3, -2)]
    found = mask_loss(logits, targets, images, [0, 0, 1, 1, 2])
    pairs = [sum(losses[:3]) / 3, losses[3], losses[4]]
    expected = (2 * pairs[0] + 2 * pairs[1] + 1 * pairs[2]) / 5
    assert found.item() == pytest.approx(expected, rel=1e-6)
    # One group of all has another denominator.
    of_all = mask_loss(logits, targets, images, [0] * 5)
    assert of_all.item() == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_the_loss_of_a_region_is_the_mean_over_its_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 28, 28, generator=generator)
    targets = torch.rand(2, 28, 28, generator=generator) > 0.7
    values = []
    for logit, target in zip(logits.flatten(), targets.flatten(), strict=True):
        values.append(cross_entropy(float(logit), float(target)))
    found = mask_loss(logits, targets, torch.tensor([0, 1]), [0, 0])
    assert found.item() == pytest.approx(sum(values) / (2 * 28 * 28), rel=1e-5)


def test_the_loss_of_no_regions_is_zero_and_has_a_gradient() -> None:
    logits = torch.zeros(0, 28, 28, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = mask_loss(logits, torch.zeros(0, 28, 28, dtype=torch.bool), nothing, [0, 0, 1])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


def probabilities_by_loops(
    cells: np.ndarray, box: list[float], size: tuple[int, int]
) -> np.ndarray:
    """The probability at the center of each pixel, between centers of cells, and 0 beyond them."""
    n_cells = len(cells)
    padded = np.pad(cells, 1)
    height, width = size
    result = np.zeros(size)
    for row in range(height):
        for column in range(width):
            # In cells, where the center of the first one is at 0.
            v = (row + 0.5 - box[1]) / (box[3] - box[1]) * n_cells - 0.5
            u = (column + 0.5 - box[0]) / (box[2] - box[0]) * n_cells - 0.5
            if not (-1 < v < n_cells and -1 < u < n_cells):
                continue
            top, left = math.floor(v), math.floor(u)
            down, across = v - top, u - left
            for cell_row, row_share in ((top, 1 - down), (top + 1, down)):
                for cell_column, column_share in ((left, 1 - across), (left + 1, across)):
                    value = padded[cell_row + 1, cell_column + 1]
                    result[row, column] += row_share * column_share * value
    return result


BOXES = torch.tensor(
    [
        [3.3, 4.6, 30.2, 25.9],
        [-10.0, -4, 20, 17],  # over the edges
        [0.0, 0, 40, 30],  # the whole image
        [12.4, 9.3, 14.1, 9.9],  # smaller than its cells
        [50.0, 40, 60, 55],  # outside
    ]
)


def some_cells(n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(n, 1, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")
    return (3 * smooth[:, 0]).sigmoid()


def test_masks_are_pasted_as_by_plain_loops() -> None:
    cells = some_cells()
    found = paste(cells, BOXES, (30, 40))
    assert found.shape == (5, 30, 40)
    assert found.dtype == torch.bool
    for number in range(5):
        expected = probabilities_by_loops(
            cells[number].double().numpy(), BOXES[number].tolist(), (30, 40)
        )
        is_sure = np.abs(expected - 0.5) > UNSURE
        assert is_sure.mean() > 0.99
        np.testing.assert_array_equal(found[number].numpy()[is_sure], (expected >= 0.5)[is_sure])
    assert found[:3].flatten(1).any(dim=1).all()
    assert not found[4].any()


@pytest.mark.parametrize("at_once", [1, 1200, 2500, 5000])
def test_parts_give_the_masks_of_all_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paste(some_cells(), BOXES, (30, 40))
    monkeypatch.setattr(masks, "_PIXELS_AT_ONCE", at_once)
    assert torch.equal(paste(some_cells(), BOXES, (30, 40)), whole)


def test_a_full_mask_has_the_pixels_of_its_box_and_one_half_is_in() -> None:
    box = torch.tensor([[2.0, 3, 9, 8]])
    for value in (1.0, 0.5):
        (found,) = paste(torch.full((1, 28, 28), value), box, (12, 12))
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[3:8, 2:9] = True
        assert torch.equal(found, expected)
    assert not paste(torch.full((1, 28, 28), 0.499), box, (12, 12)).any()


def test_boxes_without_area_and_no_boxes_have_no_pixels() -> None:
    boxes = torch.tensor([[4.5, 2, 4.5, 9], [1, 3.5, 8, 3.5]])
    assert not paste(torch.ones(2, 28, 28), boxes, (12, 12)).any()
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)


def test_masks_are_pasted_after_boxes_were_rescaled() -> None:
    found = Detections(
        boxes=torch.tensor([[4.0, 6, 18, 16]]),
        scores=torch.tensor([0.9]),
        classes=torch.tensor([1]),
        mask_cells=torch.ones(1, 28, 28),
    )
    whole = pasted(found.rescaled((24, 24), (12, 12)), (12, 12))
    assert whole.mask_cells is None
    assert whole.masks is not None
    expected = torch.zeros(1, 12, 12, dtype=torch.bool)
    expected[0, 3:8, 2:9] = True
    assert torch.equal(whole.masks, expected)
    assert torch.equal(whole.boxes, found.boxes / 2)
    without = Detections(boxes=found.boxes, scores=found.scores, classes=found.classes)
    assert pasted(without, (12, 12)) is without
