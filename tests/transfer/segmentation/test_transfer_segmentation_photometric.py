import random
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from relloc.errors import UsageError
from relloc.transfer.segmentation.photometric import (
    ColorChange,
    PhotometricDistortion,
    distorted,
    hsv_of,
    rgb_of,
)

NONE = ColorChange(brightness=None, contrast=None, contrast_first=False, saturation=None, hue=None)


def change(**values: Any) -> ColorChange:
    return ColorChange(**{**vars(NONE), **values})


def converted(values: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
    scaled = values.astype(np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def plain_twin(image: np.ndarray, colors: ColorChange) -> np.ndarray:
    """A BGR uint8 image after the changes, in the order of mmsegmentation."""
    if colors.brightness is not None:
        image = converted(image, beta=colors.brightness)
    if colors.contrast is not None and colors.contrast_first:
        image = converted(image, alpha=colors.contrast)
    if colors.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = converted(hsv[:, :, 1], alpha=colors.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if colors.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + colors.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if colors.contrast is not None and not colors.contrast_first:
        image = converted(image, alpha=colors.contrast)
    return image


def bgr_images(n: int = 1, side: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(n)]


def as_rgb(images: list[np.ndarray]) -> Tensor:
    bgr = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return bgr.flip(1).float()


@pytest.mark.parametrize(
    "colors",
    [
        change(brightness=31.7),
        change(brightness=-31.7),
        change(contrast=1.49),
        change(contrast=0.51, contrast_first=True),
    ],
)
def test_brightness_and_contrast_are_those_of_opencv_to_the_bit(colors: ColorChange) -> None:
    images = bgr_images()
    assert torch.equal(distorted(as_rgb(images), [colors]), as_rgb([plain_twin(images[0], colors)]))


@pytest.mark.parametrize(
    "colors",
    [
        change(saturation=0.5),
        change(saturation=1.37),
        change(hue=17),
        change(hue=-18),
        change(hue=0),
    ],
)
def test_saturation_and_hue_are_those_of_opencv(colors: ColorChange) -> None:
    images = bgr_images()
    found = distorted(as_rgb(images), [colors])
    difference = (found - as_rgb([plain_twin(images[0], colors)])).abs()
    # On some processors OpenCV fuses a product and a sum, which rounds once and not twice.
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.002


def test_a_hue_is_that_of_opencv_with_a_full_circle_of_180() -> None:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    theirs = cv2.cvtColor(colors, cv2.COLOR_BGR2HSV)
    hue, saturation, value = hsv_of(as_rgb([colors]))
    found = torch.cat([hue, saturation, value]).permute(1, 2, 0)
    assert torch.equal(found, torch.from_numpy(theirs)[0].unsqueeze(0).float())
    assert hue.max() == 179


def test_every_hue_and_saturation_gives_the_color_of_opencv() -> None:
    axes = np.meshgrid(np.arange(180), np.arange(0, 256, 3), np.arange(0, 256, 15))
    hsv = np.stack(axes, axis=-1).astype(np.uint8).reshape(1, -1, 3)
    theirs = as_rgb([cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)])
    hue, saturation, value = torch.from_numpy(hsv).float().unbind(dim=-1)
    found = rgb_of(hue.unsqueeze(0), saturation.unsqueeze(0), value.unsqueeze(0))
    assert (found - theirs).abs().max() <= 1
    assert (found == theirs).float().mean() > 0.99


def test_all_changes_together_follow_the_order_of_the_source() -> None:
    # Contrast before and after the others gives different images, by clipping.
    early = change(brightness=20, contrast=1.4, contrast_first=True, saturation=1.3, hue=9)
    late = change(brightness=20, contrast=1.4, contrast_first=False, saturation=1.3, hue=9)
    images = bgr_images(2)
    found = distorted(as_rgb(images), [early, late])
    theirs = as_rgb([plain_twin(images[0], early), plain_twin(images[1], late)])
    assert (found == theirs).float().mean() > 0.99
    assert (found - theirs).abs().max() <= 3  # a gray level that was rounded otherwise, times 1.4
    swapped = as_rgb([plain_twin(images[0], late), plain_twin(images[1], early)])
    assert (found == swapped).float().mean() < 0.9


def test_each_image_of_a_batch_is_changed_by_its_own_numbers_alone() -> None:
    distortion = PhotometricDistortion()
    changes = [distortion.draw(random.Random(seed)) for seed in range(12)]
    images = as_rgb(bgr_images(12, side=16))
    before = images.clone()
    together = distorted(images, changes)
    assert torch.equal(images, before)  # the input is left alone
    for index, colors in enumerate(changes):
        assert torch.equal(
            together[index : index + 1], distorted(images[index : index + 1], [colors])
        )
    assert torch.equal(distorted(images, [NONE] * 12), images)


def test_each_property_is_changed_in_half_of_the_images_within_its_range() -> None:
    distortion = PhotometricDistortion()
    drawn = [distortion.draw(random.Random(seed)) for seed in range(2000)]
    limits = {
        "brightness": (-32, 32),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-18, 17),
    }
    for name, (low, high) in limits.items():
        values = [getattr(one, name) for one in drawn if getattr(one, name) is not None]
        assert len(values) / 2000 == pytest.approx(0.5, abs=0.05)
        assert min(values) == pytest.approx(low, abs=(high - low) / 50)
        assert max(values) == pytest.approx(high, abs=(high - low) / 50)
    assert {one.hue for one in drawn if one.hue is not None} == set(range(-18, 18))
    assert sum(one.contrast_first for one in drawn) / 2000 == pytest.approx(0.5, abs=0.05)
    assert distortion.draw(random.Random(7)) == drawn[7]


@pytest.mark.parametrize(
    ("name", "value"),
    [("brightness", -1), ("contrast", (1.5, 0.5)), ("saturation", (1,)), ("hue", 0)],
)
def test_a_range_that_is_none_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        PhotometricDistortion(**{name: value})
