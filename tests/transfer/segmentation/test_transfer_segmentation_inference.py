from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from relloc.errors import UsageError
from relloc.transfer.segmentation.inference import SlidingWindows, WholeImage

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
CITYSCAPES = {"box": (2049, 1025), "window_px": 769, "stride_px": 513}


class MadeUp(nn.Module):
    """A network whose logits depend on where in the window a pixel lies, and on its color."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.windows.append(tuple(images.shape))
        height, width = images.shape[-2:]
        rows = torch.linspace(0, 1, height).view(1, 1, -1, 1)
        columns = torch.linspace(-1, 1, width).view(1, 1, 1, -1)
        return images * rows + images.flip(1) * columns + rows * columns

    def resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)

    def segment(self, images: Tensor, out_size: Sequence[int]) -> Tensor:
        return self.resized(self(images), out_size).argmax(dim=1).to(torch.uint8)


def plain_windows(network: nn.Module, images: Tensor, side: int, stride: int) -> Tensor:
    """Mean logits over windows, by padding those of each to the whole image."""
    height, width = images.shape[-2:]
    total = torch.zeros(1, 3, height, width)
    counts = torch.zeros(1, 1, height, width)
    for row in range(max(height - side + stride - 1, 0) // stride + 1):
        for column in range(max(width - side + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + side, height), min(column * stride + side, width)
            top, left = max(bottom - side, 0), max(right - side, 0)
            logits = network(images[:, :, top:bottom, left:right])
            total += pad(logits, (left, width - right, top, height - bottom))
            counts[:, :, top:bottom, left:right] += 1
    assert counts.min() >= 1
    return total / counts


@torch.no_grad()
def test_eight_windows_cover_an_image_of_cityscapes() -> None:
    images = torch.randn(1, 3, 1025, 2049)
    network = MadeUp()
    found = SlidingWindows(**CITYSCAPES).logits(network, images)
    assert network.windows == [(1, 3, 769, 769)] * 8
    torch.testing.assert_close(found, plain_windows(MadeUp(), images, 769, 513))


@pytest.mark.parametrize("size", [(20, 20), (21, 45), (7, 33), (5, 6), (20, 34)])
@torch.no_grad()
def test_windows_are_those_of_a_plain_loop_at_any_size(size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size)
    view = SlidingWindows(box=(99, 99), window_px=20, stride_px=14)
    found = view.logits(MadeUp(), images)
    torch.testing.assert_close(found, plain_windows(MadeUp(), images, 20, 14))


def test_an_image_is_tested_at_its_size_in_the_box_and_answered_at_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    # Smoothed, so that a pixel that is rounded otherwise seldom changes the largest logit.
    image = cv2.GaussianBlur(image, (0, 0), 3)
    fitted = torch.from_numpy(cv2.resize(image, (85, 64), interpolation=cv2.INTER_LINEAR))
    normalized = ((fitted.permute(2, 0, 1).float() - MEAN) / STD).unsqueeze(0)
    for view, logits in (
        (WholeImage(box=(200, 64)), MadeUp()(normalized)),
        (
            SlidingWindows(box=(200, 64), window_px=32, stride_px=20),
            plain_windows(MadeUp(), normalized, 32, 20),
        ),
    ):
        found = view.class_map(MadeUp(), torch.from_numpy(image))
        assert found.shape == (30, 40)
        expected = MadeUp().resized(logits, (30, 40))[0].argmax(dim=0)
        assert (found == expected).float().mean() > 0.98
        assert len(found.unique()) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("box", (10, 20)), ("window_px", 0), ("stride_px", 0), ("stride_px", 770)]
)
def test_windows_that_leave_pixels_out_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"view.{name}"):
        SlidingWindows(**{**CITYSCAPES, name: value})
