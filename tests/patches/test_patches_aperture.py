"""Tests that patches are covered but for a random window."""

import dataclasses
from typing import Any

import pytest
import torch
from scipy import stats

from relloc.errors import UsageError
from relloc.patches.aperture import COVER_PX, Aperture

APERTURE = Aperture(low=2 / 3, high=1, whole=3)


def windows_of(aperture: Aperture, n_images: int, patch_px: int) -> torch.Tensor:
    [windows] = aperture.draw(n_images, 9, patch_px, torch.Generator().manual_seed(0))
    return windows


def test_pixels_in_the_window_stay_and_all_others_are_covered() -> None:
    patches = torch.rand(5, 9, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 255
    windows = windows_of(APERTURE, 5, 12)
    covered = APERTURE(patches, windows)
    expected = torch.tensor(COVER_PX).view(3, 1, 1).expand(5, 9, 3, 12, 12).clone()
    for image in range(5):
        for cell in range(9):
            top, left, bottom, right = windows[image, cell].tolist()
            visible = patches[image, cell, :, top:bottom, left:right]
            expected[image, cell, :, top:bottom, left:right] = visible
    assert torch.equal(covered, expected)
    assert (covered != patches).any()


def test_some_patches_stay_whole_and_the_others_share_one_window() -> None:
    n = 3000
    windows = windows_of(APERTURE, n, 96)
    whole = (windows == torch.tensor([0, 0, 96, 96])).all(dim=2)
    # Windows as large as the patch, one of 33 sizes, look like whole patches.
    smaller = ~whole.all(dim=1)
    assert smaller.float().mean().item() == pytest.approx(32 / 33, abs=0.02)
    assert (whole[smaller].sum(dim=1) == 3).all()
    # Each cell is as likely to stay whole.
    counts = whole[smaller].sum(dim=0)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    for image in windows[smaller][:50]:
        assert len({tuple(window) for window in image.tolist()}) == 2


def test_sides_and_places_are_uniform_over_whole_pixels() -> None:
    windows = windows_of(dataclasses.replace(APERTURE, whole=0), 20_000, 96)[:, 0]
    tops, lefts, bottoms, rights = windows.T
    sides = bottoms - tops
    assert torch.equal(sides, rights - lefts)
    counts = sides.bincount()[64:]
    assert len(counts) == 33
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    for starts in (tops, lefts):
        of_smallest = starts[sides == 64]
        assert (of_smallest.min(), of_smallest.max()) == (0, 32)
        assert (starts + sides).max() == 96


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": 0.0}, "aperture.low is 0"),
        ({"high": 1.5}, "aperture.high is 1.5"),
        ({"high": 0.5}, "aperture.high 0.5"),
        ({"whole": -1}, "aperture.whole is -1"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(APERTURE, **wrong)
