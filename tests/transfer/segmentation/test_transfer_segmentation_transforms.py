import random
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from relloc.data.annotations import VOID
from relloc.errors import UsageError
from relloc.transfer.resize import fitted_size
from relloc.transfer.segmentation.photometric import PhotometricDistortion
from relloc.transfer.segmentation.transforms import CropSample, TrainingCrops, is_mixed

CPU = torch.device("cpu")
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)


class NoChange(PhotometricDistortion):
    """Draws colors as they are, so that geometry can be compared alone."""

    def draw(self, rng: random.Random) -> Any:
        drawn = super().draw(rng)
        values = {"brightness": None, "contrast": None, "saturation": None, "hue": None}
        return type(drawn)(**{**vars(drawn), **values})


def crops(**changes: Any) -> TrainingCrops:
    settings = {"box": (160, 64), "crop_px": 48, "photometric": NoChange(), **changes}
    return TrainingCrops(**settings)


def image_and_classes(height: int = 60, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """An image, and a class map of blocks with some void."""
    rng = np.random.default_rng(height + width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    blocks = rng.integers(0, 4, (height // 10 + 1, width // 10 + 1), dtype=np.uint8)
    classes = np.kron(blocks, np.ones((10, 10), dtype=np.uint8))[:height, :width].copy()
    classes[:7] = VOID
    return image, classes


def plain_twin(
    image: np.ndarray, classes: np.ndarray, sample: CropSample, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """A crop by OpenCV, in the order of mmsegmentation's pipeline, without changed colors."""
    plan = sample.plan
    new_size = (plan.size[1], plan.size[0])
    image = cv2.resize(image, new_size, interpolation=cv2.INTER_LINEAR)
    classes = cv2.resize(classes, new_size, interpolation=cv2.INTER_NEAREST)
    image = image[plan.top : plan.top + side, plan.left : plan.left + side]
    classes = classes[plan.top : plan.top + side, plan.left : plan.left + side]
    if plan.flip:
        image, classes = cv2.flip(image, 1), cv2.flip(classes, 1)
    normalized = (image.astype(np.float32) - MEAN) / STD
    padding = ((0, side - image.shape[0]), (0, side - image.shape[1]))
    normalized = np.pad(normalized, (*padding, (0, 0)))
    return normalized, np.pad(classes, padding, constant_values=VOID)


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (20, 150), (41, 37)])
def test_crops_are_those_of_opencv_also_where_they_are_padded(size: tuple[int, int]) -> None:
    view = crops()
    image, classes = image_and_classes(*size)
    samples = [view.sample(image, classes, seed) for seed in range(12)]
    batch = view.batch(samples, CPU)
    assert batch.images.shape == (12, 3, 48, 48)
    padded = 0
    for number, sample in enumerate(samples):
        pixels, class_map = plain_twin(image, classes, sample, 48)
        assert np.array_equal(batch.class_maps[number].numpy(), class_map)
        difference = np.abs(batch.images[number].permute(1, 2, 0).numpy() - pixels) * STD
        assert difference.max() <= 1.001
        padded += min(sample.plan.size) < 48
        corner = batch.images[number, :, sample.plan.size[0] :, :]
        assert not corner.any()
    assert padded > 0
    assert padded < 12 or size == (20, 150)  # whose long side is at the limit of the box
    assert {sample.plan.flip for sample in samples} == {True, False}


def test_sizes_cover_the_range_of_ratios_and_round_as_the_protocol() -> None:
    view = crops(box=(2048, 512))
    sizes = set()
    for seed in range(400):
        image, classes = np.zeros((75, 100, 3), np.uint8), np.zeros((75, 100), np.uint8)
        ratio = random.Random(seed).uniform(0.5, 2)
        size = view.sample(image, classes, seed).plan.size
        assert size == fitted_size(75, 100, (int(2048 * ratio), int(512 * ratio)))
        sizes.add(size[0])
    assert 256 <= min(sizes) < 262
    assert 1016 < max(sizes) <= 1024


def plain_choice(
    classes: np.ndarray, corners: list[tuple[int, int]], side: int, most: float
) -> tuple[int, int]:
    """The corner that mmsegmentation takes, if these are drawn one after the other."""
    top, left = corners[0]
    for number in range(10):
        shown = classes[top : top + side, left : left + side]
        labels, counts = np.unique(shown, return_counts=True)
        counts = counts[labels != VOID]
        if len(counts) > 1 and np.max(counts) / np.sum(counts) < most:
            break
        top, left = corners[number + 1]
    return top, left


@pytest.mark.parametrize("most", [0.4, 0.6, 0.75, 0.9])
def test_the_crop_is_the_one_that_a_plain_loop_takes(most: float) -> None:
    view = crops(most_of_one_class=most, ratio=(1, 1), crop_px=24)
    image, classes = image_and_classes(64, 160)  # the size of the box: nothing is resized
    classes[:, :90] = 1  # most crops show this class alone
    redrawn, given_up = 0, 0
    for seed in range(150):
        rng = random.Random(seed)
        rng.uniform(1, 1)
        corners = [(rng.randint(0, 64 - 24), rng.randint(0, 160 - 24)) for _ in range(11)]
        plan = view.sample(image, classes, seed).plan
        assert plan.size == (64, 160)
        assert (plan.top, plan.left) == plain_choice(classes, corners, 24, most)
        redrawn += (plan.top, plan.left) != corners[0]
        given_up += (plan.top, plan.left) == corners[10]
    assert redrawn
    assert given_up or most > 0.4


def test_of_crops_that_all_fail_the_eleventh_is_kept() -> None:
    view = crops(ratio=(1, 1), crop_px=24)
    image, classes = image_and_classes(64, 160)
    classes[:] = 1
    rng = random.Random(5)
    rng.uniform(1, 1)
    corners = [(rng.randint(0, 64 - 24), rng.randint(0, 160 - 24)) for _ in range(11)]
    plan = view.sample(image, classes, 5).plan
    assert (plan.top, plan.left) == corners[10]
    at_once = crops(ratio=(1, 1), crop_px=24, most_of_one_class=1).sample(image, classes, 5).plan
    assert (at_once.top, at_once.left) == corners[0]


def test_void_pixels_do_not_count_as_a_class() -> None:
    classes = np.full((10, 10), VOID, dtype=np.uint8)
    assert not is_mixed(classes, 0.75)
    classes[0] = 3
    assert not is_mixed(classes, 0.75)  # one class beside void
    classes[0, :3] = 4
    assert is_mixed(classes, 0.75)  # 7 of 10
    classes[0, 3:] = 4
    classes[1, 0] = 3
    assert not is_mixed(classes, 0.75)  # 10 of 11
    classes[:] = 1
    classes[:, :5] = 2
    classes[:5, :5] = 1
    assert not is_mixed(classes, 0.75)  # exactly the share: less is asked for


def test_a_sample_is_the_same_in_any_batch_and_another_by_another_seed() -> None:
    view = TrainingCrops(box=(160, 64), crop_px=48)  # colors, too
    images = [image_and_classes(60 + 3 * number, 80) for number in range(6)]

    def samples() -> list[CropSample]:
        random.seed()  # Python's own generator has no part in it
        return [view.sample(*pair, seed) for seed, pair in enumerate(images)]

    together = view.batch(samples(), CPU)
    again = view.batch(samples()[::-1], CPU)
    assert torch.equal(together.images, again.images.flip(0))
    assert torch.equal(together.class_maps, again.class_maps.flip(0))
    for number, sample in enumerate(samples()):
        alone = view.batch([sample], CPU)
        assert torch.equal(alone.images[0], together.images[number])
    other = view.batch([view.sample(*images[0], 99)], CPU)
    assert not torch.equal(other.images[0], together.images[0])


def test_a_batch_of_no_samples_is_empty() -> None:
    batch = crops().batch([], CPU)
    assert batch.images.shape == (0, 3, 48, 48)
    assert batch.class_maps.shape == (0, 48, 48)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("box", (64, 160)),
        ("ratio", (2.0, 0.5)),
        ("ratio", (0.001, 2.0)),
        ("ratio", (1.0,)),
        ("crop_px", 0),
        ("most_of_one_class", 0),
        ("flip", 1.5),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"augment.{name}"):
        crops(**{name: value})


@pytest.mark.gpu
def test_crops_on_a_gpu_are_those_on_a_cpu() -> None:
    view = TrainingCrops(box=(160, 64), crop_px=48)
    image, classes = image_and_classes()
    samples = [view.sample(image, classes, seed) for seed in range(16)]
    on_cpu, on_gpu = view.batch(samples, CPU), view.batch(samples, torch.device("cuda"))
    assert torch.equal(on_gpu.class_maps.cpu(), on_cpu.class_maps)
    # A value that is rounded to the other side changes the hue of a dark pixel by much.
    difference = (on_gpu.images.cpu() - on_cpu.images).abs()
    assert (difference > 0.02).float().mean() < 0.01
