"""Tests that the chroma of images is blurred, beside scikit-image's CIELAB."""

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from skimage.color import lab2rgb, rgb2lab

from relloc.errors import UsageError
from relloc.patches.chroma_blur import ChromaBlur


def smooth_images(n: int, side: int) -> torch.Tensor:
    """Images of many colors, dark ones among them, without sharp steps."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 6, 6, generator=generator) ** 2 * 255
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def pixels_last(images: torch.Tensor) -> np.ndarray:
    return images.movedim(1, -1).double().numpy() / 255


def test_it_is_scikit_images_lab_with_a_and_b_averaged() -> None:
    images = smooth_images(3, 40)
    lab = rgb2lab(pixels_last(images))
    for channel in (1, 2):
        lab[..., channel] = uniform_filter(lab[..., channel], size=(1, 13, 13))
    expected = 255 * lab2rgb(lab)
    blurred = 255 * pixels_last(ChromaBlur(side_px=13)(images))
    inside = (slice(None), slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(blurred[inside], expected[inside], atol=0.02)
    assert np.abs(blurred - 255 * pixels_last(images)).max() > 5  # it did something


def test_at_a_border_the_mean_is_over_what_is_there() -> None:
    # Of colors that a screen can show with any other's lightness
    images = 100 + 0.2 * smooth_images(1, 12)
    blurred = rgb2lab(pixels_last(ChromaBlur(side_px=5)(images)))[0]
    lab = rgb2lab(pixels_last(images))[0]
    for row, column in ((0, 0), (0, 7), (11, 11), (1, 10)):
        rows = slice(max(0, row - 2), row + 3)
        columns = slice(max(0, column - 2), column + 3)
        expected = lab[rows, columns, 1:].mean(axis=(0, 1))
        np.testing.assert_allclose(blurred[row, column, 1:], expected, atol=0.05)
        np.testing.assert_allclose(blurred[row, column, 0], lab[row, column, 0], atol=0.05)


@pytest.mark.parametrize("levels", [(0, 0, 0), (255, 255, 255), (7, 7, 7), (200, 30, 90)])
def test_one_color_stays_itself_and_a_square_of_one_pixel_changes_nothing(
    levels: tuple[int, int, int],
) -> None:
    flat = torch.tensor(levels, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 9, 9)
    torch.testing.assert_close(ChromaBlur(side_px=13)(flat), flat, rtol=0, atol=0.05)
    images = smooth_images(2, 9)
    torch.testing.assert_close(ChromaBlur(side_px=1)(images), images, rtol=0, atol=0.05)


def test_an_even_side_has_no_middle() -> None:
    with pytest.raises(UsageError, match="chroma_blur.side_px is 12"):
        ChromaBlur(side_px=12)
