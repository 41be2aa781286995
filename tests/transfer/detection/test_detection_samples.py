import random

import cv2
import numpy as np
import pytest
import torch
from made_objects import Rectangles

from relloc.errors import UsageError
from relloc.patches.normalize import ByDataset
from relloc.transfer.detection.samples import RandomSizes, prepared, to_batch
from relloc.transfer.resize import FittedImage

CPU = torch.device("cpu")
SIZES = RandomSizes(short_px=[40, 56, 80], long_px=100)
IMAGES = Rectangles(n=30)


def sample(index: int, seed: int, *, difficult: bool = False, images: Rectangles = IMAGES):
    return SIZES.sample(images, index, seed, difficult=difficult, masks=False)


def test_sizes_and_flips_are_drawn_from_the_seed() -> None:
    shorts, flips = set(), []
    for seed in range(200):
        one = sample(0, seed)
        assert one.seed == seed
        shorts.add(min(one.size))
        flips.append(one.flip)
        again = sample(0, seed)
        assert (again.size, again.flip) == (one.size, one.flip)
    # 48 x 64 px: at 80 the longer side would be 107, so that 100 decides.
    assert shorts == {40, 56, 75}
    assert 70 < sum(flips) < 130


def test_the_longer_side_is_limited_and_sides_are_rounded() -> None:
    """scale = min(1333 / long, 800 / short), and int(side * scale + 0.5)."""
    fitted = FittedImage(box=[1333, 800])
    rng = random.Random(0)
    for _ in range(200):
        height, width = rng.randint(20, 600), rng.randint(20, 600)
        scale = min(1333 / max(height, width), 800 / min(height, width))
        assert fitted.size(height, width) == (int(height * scale + 0.5), int(width * scale + 0.5))


@pytest.mark.parametrize("seed", range(6))
def test_pixels_and_boxes_are_moved_together(seed: int) -> None:
    one = sample(4, seed)
    height, width = one.size
    batch = to_batch([one], [0], CPU)
    expected = cv2.resize(one.image, (width, height), interpolation=cv2.INTER_LINEAR)
    x1, y1, x2, y2 = one.objects.boxes[0]
    scale_x, scale_y = width / one.image.shape[1], height / one.image.shape[0]
    box = np.array([x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y])
    if one.flip:
        expected = expected[:, ::-1]
        box = np.array([width - box[2], box[1], width - box[0], box[3]])
    assert batch.sizes == [one.size]
    assert batch.images.shape == (1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    pixels = torch.tensor(expected.transpose(2, 0, 1).copy()).float()
    shown = batch.images[0, :, :height, :width]
    gray_level = 1 / (255 * 0.224)
    torch.testing.assert_close(shown, ByDataset()(pixels[None])[0], rtol=0, atol=1.1 * gray_level)
    assert not batch.images[0, :, height:].any()
    assert not batch.images[0, :, :, width:].any()
    np.testing.assert_allclose(batch.targets[0].boxes[0].numpy(), box, rtol=1e-5)


def test_difficult_objects_and_crowds_are_background() -> None:
    assert len(sample(5, 0).objects) == 0
    assert len(sample(5, 0, difficult=True).objects) == 1
    assert len(sample(0, 0).objects) == 1
    assert len(sample(0, 0, difficult=True, images=Rectangles(n=3, crowd=(0,))).objects) == 0


def test_an_image_without_objects_left_has_no_targets() -> None:
    batch = to_batch([sample(5, 0), sample(0, 0)], [0, 0], CPU)
    assert [len(targets.boxes) for targets in batch.targets] == [0, 1]


def test_a_batch_may_be_empty() -> None:
    batch = to_batch([], [], CPU)
    assert len(batch.images) == 0


def test_an_image_to_test_on_is_prepared_as_one_to_train_on() -> None:
    one = sample(0, 0)
    (image,) = prepared([one.image], [one.size], torch.device("cpu"))
    batch = to_batch([one], [0], CPU)
    height, width = one.size
    shown = batch.images[0, :, :height, :width]
    assert torch.equal(shown.flip(-1) if one.flip else shown, image)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"short_px": []}, "augment.short_px"),
        ({"long_px": 70}, "augment.long_px is 70"),
        ({"flip": 2.0}, "augment.flip is 2"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RandomSizes(**{"short_px": [40, 80], "long_px": 100, **changes})
