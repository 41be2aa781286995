"""Squares cut on a device, against Pillow."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relloc.data import resampling
from relloc.data.cuts import Cut, Resampling, apply, batch_cuts, square_of_resized
from relloc.data.resampling import squares
from relloc.data.views import Center, CutView, RandomCrop, RandomResized, Squash

# Wide, tall, tiny, very long, and reduced and enlarged: of tall ones Pillow resizes columns first.
SIZES = [(300, 400), (401, 200), (56, 56), (33, 20), (400, 41), (30, 300), (3, 7), (120, 119)]
VIEWS = [
    Center(short_px=64, crop_px=56),
    Squash(short_px=64, side_px=56),
    RandomResized(crop_px=56, scale=(0.01, 1.0)),
    RandomCrop(short_px=200, crop_px=56),
]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("most_weights", [resampling._MOST_WEIGHTS, 3_000])
def test_squares_are_pillows_bit_for_bit(
    view: CutView, most_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, and in several parts."""
    monkeypatch.setattr(resampling, "_MOST_WEIGHTS", most_weights)
    rng = random.Random(0)
    images = [noise(*size) for size in SIZES]
    cuts = [view.cut(image.height, image.width, rng) for image in images]
    found = squares([tensor(image) for image in images], batch_cuts(cuts))
    assert found.shape == (len(SIZES), 3, 56, 56)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for pixels, image, cut in zip(found, images, cuts, strict=True):
        assert torch.equal(pixels, tensor(apply(image, cut)))
    is_random = isinstance(view, RandomResized | RandomCrop)
    assert len({cut.mirrored for cut in cuts}) == (2 if is_random else 1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_square_of_a_resized_image_is_pillows(data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(4, 300)) for _ in range(2))
    size = (data.draw(st.integers(8, 300)), data.draw(st.integers(8, 300)))
    side = data.draw(st.integers(1, min(size)))
    corner = (
        data.draw(st.integers(0, size[0] - side)),
        data.draw(st.integers(0, size[1] - side)),
    )
    cut = Cut(steps=(square_of_resized(height, width, size, corner, side),))
    image = noise(height, width, seed=height)
    [found] = squares([tensor(image)], batch_cuts([cut]))
    assert torch.equal(found, tensor(apply(image, cut)))


def test_only_what_is_needed_is_read() -> None:
    """Of pixels that a square depends on, none is left out, and hardly more are named."""
    step = Resampling(box=(40, 30, 72, 94), within=(0, 0, 100, 100), size=(16, 64))
    top, left, bottom, right = step.needed()
    assert (top, left, bottom, right) == (39, 29, 74, 95)
    image = np.array(noise(100, 100))
    expected = np.asarray(apply(Image.fromarray(image), Cut(steps=(step,))))
    outside = np.ones((100, 100), dtype=bool)
    outside[top:bottom, left:right] = False
    image[outside] = 0
    assert np.array_equal(apply(Image.fromarray(image), Cut(steps=(step,))), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_gpu_makes_the_same_squares(view: CutView) -> None:
    rng = random.Random(0)
    images = [tensor(noise(*size)) for size in SIZES]
    cuts = batch_cuts([view.cut(image.shape[1], image.shape[2], rng) for image in images])
    found = squares([image.cuda() for image in images], cuts)
    assert torch.equal(found.cpu(), squares(images, cuts))


def test_the_kernel_makes_the_same_squares() -> None:
    """Interpreted on a CPU."""
    script = Path(__file__).with_name("interpreted_resampling.py")
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
