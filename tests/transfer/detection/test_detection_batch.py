import dataclasses
from typing import Any

import pytest
import torch
from detection_batches import batch_of, targets

from relloc.transfer.detection.batch import (
    pad_images,
    round_up_side,
    stack_boxes,
)
from relloc.transfer.detections import Detections


def test_images_are_padded_right_and_below_to_multiples_of_32() -> None:
    images = [torch.ones(3, 33, 20), torch.full((3, 10, 65), 2.0)]
    padded = pad_images(images)
    assert padded.shape == (2, 3, 64, 96)
    for image, place in zip(images, padded, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(place[:, :height, :width], image)
        assert place.sum() == image.sum()
    assert [round_up_side(side) for side in (1, 32, 33, 800)] == [32, 32, 64, 800]
    assert len(pad_images([])) == 0


def test_a_batch_has_as_many_of_everything_as_images() -> None:
    batch = batch_of([(40, 50), (64, 64)], [targets([]), targets([[0, 0, 9, 9]])])
    for name in ("sizes", "targets", "groups", "seeds"):
        fewer: dict[str, Any] = {name: getattr(batch, name)[:1]}
        with pytest.raises(ValueError, match=f"1 {name}"):
            dataclasses.replace(batch, **fewer)


def test_detections_go_back_to_the_pixels_of_the_original_image() -> None:
    found = Detections(
        boxes=torch.tensor([[10.0, 20, 30, 40]]),
        scores=torch.tensor([0.5]),
        classes=torch.tensor([3]),
    )
    back = found.rescaled((600, 801), (300, 400))
    x_scale = 400 / 801
    assert back.boxes[0].tolist() == pytest.approx([10 * x_scale, 10, 30 * x_scale, 20])
    assert torch.equal(back.scores, found.scores)


def test_boxes_of_several_images_are_stacked() -> None:
    cpu = torch.device("cpu")
    stacked, is_real = stack_boxes([torch.ones(1, 4), torch.ones(3, 4), torch.ones(0, 4)], cpu)
    assert stacked.shape == (3, 3, 4)
    assert is_real.sum(dim=1).tolist() == [1, 3, 0]
    assert torch.equal(stacked[..., 0] == 1, is_real)
    assert stack_boxes([], cpu)[0].shape == (0, 0, 4)
