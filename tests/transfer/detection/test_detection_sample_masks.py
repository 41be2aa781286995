"""Masks of training samples beside those that are decoded, resized by OpenCV, and mirrored."""

import dataclasses
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from relloc.data.annotations import Mask, Objects, Polygons, RunLengths, decode_mask
from relloc.transfer.detection.samples import RandomSizes, to_batch

HEIGHT, WIDTH = 61, 83
CPU = torch.device("cpu")


def objects(masks: tuple[Mask, ...]) -> Objects:
    n = len(masks)
    boxes = np.array([[5, 6, 30 + number, 40] for number in range(n)]).reshape(-1, 4)
    return Objects(
        boxes=boxes.astype(np.float32),
        xywh=boxes.astype(np.float64),
        classes=np.arange(n),
        difficult=np.zeros(n, bool),
        crowd=np.zeros(n, bool),
        areas=np.full(n, 100.0),
        masks=masks,
    )


def random_run_lengths(rng: np.random.Generator) -> RunLengths:
    pixels = rng.random((WIDTH, HEIGHT)) < 0.5
    flat = np.concatenate([[False], pixels.reshape(-1)])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [HEIGHT * WIDTH]]))
    return RunLengths(counts=counts.astype(np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneImage:
    """A set of one image with some objects."""

    found: Objects
    name: str = "one"
    split: str = "train"
    labels: None = None
    classes: tuple[str, ...] = tuple("abcdefgh")

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def objects(self, index: int) -> Objects:
        return self.found

    def size(self, index: int) -> tuple[int, int]:
        return HEIGHT, WIDTH

    def count(self, index: int) -> int:
        return len(self.found)

    def image_id(self, index: int) -> int:
        return index

    def unusable(self) -> dict[int, str]:
        return {}

    def source(self, index: int) -> str:
        return "one"

    def digest(self) -> str:
        return "0"


def sample_of(found: Objects, *, short_px: int, flip: float, **changes: Any) -> Any:
    augment = RandomSizes(short_px=[short_px], long_px=400, flip=flip)
    images = OneImage(found=found)
    return augment.sample(images, 0, 7, **{"difficult": False, "masks": True, **changes})


@pytest.mark.parametrize("flip", [0.0, 1.0])
# Smaller, as it is, a little larger, and several times larger.
@pytest.mark.parametrize("short_px", [32, 61, 67, 203])
def test_masks_are_resized_as_by_opencv(short_px: int, flip: float) -> None:
    rng = np.random.default_rng(0)
    outline = np.array([10.5, 4.25, 70.1, 30.9, 40.6, 58.8, 12.3, 44.4])
    masks = (
        Polygons(parts=(outline, np.array([60.0, 2, 80, 2, 80, 20]))),
        random_run_lengths(rng),
        random_run_lengths(rng),
    )
    sample = sample_of(objects(masks), short_px=short_px, flip=flip)
    batch = to_batch([sample], [0], CPU)
    (size,), (targets,) = batch.sizes, batch.targets
    assert targets.masks is not None
    assert targets.masks.shape == (3, *size)
    for found, mask in zip(targets.masks.numpy(), masks, strict=True):
        pixels = decode_mask(mask, HEIGHT, WIDTH)
        assert 0.1 < pixels.mean() < 0.9
        expected = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
        if flip:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(found, expected)


def test_only_the_masks_of_trained_objects_are_there() -> None:
    rng = np.random.default_rng(0)
    masks = tuple(random_run_lengths(rng) for _ in range(5))
    found = objects(masks)
    found.crowd[1] = True
    found.areas[2] = 0
    found.boxes[3, 2] = found.boxes[3, 0] + 0.5
    sample = sample_of(found, short_px=61, flip=0.0)
    (targets,) = to_batch([sample], [0], CPU).targets
    assert targets.classes.tolist() == [0, 4]
    assert targets.masks is not None
    for own, number in zip(targets.masks.numpy(), (0, 4), strict=True):
        np.testing.assert_array_equal(own, decode_mask(masks[number], HEIGHT, WIDTH))
    without = sample_of(found, short_px=61, flip=0.0, masks=False)
    assert to_batch([without], [0], CPU).targets[0].masks is None


def test_an_image_of_crowds_alone_has_no_masks() -> None:
    found = objects((random_run_lengths(np.random.default_rng(0)),))
    found.crowd[0] = True
    (targets,) = to_batch([sample_of(found, short_px=40, flip=1.0)], [0], CPU).targets
    assert targets.boxes.shape == (0, 4)
    assert targets.masks is not None
    assert targets.masks.shape == (0, 40, 54)
