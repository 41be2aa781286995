from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from relloc.geometry import CENTER, PatchGrid
from relloc.patches import picture
from relloc.patches.color import Drop, Keep
from relloc.patches.normalize import PerPatch
from relloc.patches.picture import draw_patches
from relloc.patches.pipeline import PatchPipeline

GRID = PatchGrid(patch_px=8, gap_px=3, jitter_px=(0, 3), resize=None)  # spans 33
IMAGES = torch.randint(
    256, (2, 3, 33, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_the_picture_is_a_file_and_the_figure_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "patches.png"
    draw_patches(
        IMAGES,
        PatchPipeline(grid=GRID, color=Drop(noise="gaussian"), normalize=PerPatch()),
        path,
        seed=0,
    )
    with Image.open(path) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 50  # not an empty sheet
    assert plt.get_fignums() == []


def test_the_boxes_shown_are_those_that_the_patches_were_cut_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture.plt, "close", lambda figure: None)
    untouched = PatchPipeline(grid=GRID, color=Keep(), normalize=lambda pixels: pixels)
    draw_patches(IMAGES, untouched, tmp_path / "patches.png", seed=3)
    axes = np.array(plt.gcf().axes).reshape(2, 2)
    monkeypatch.undo()
    for column, image in enumerate(IMAGES):
        boxes, mosaic = axes[0, column].patches, np.asarray(axes[1, column].images[0].get_array())
        assert np.array_equal(axes[0, column].images[0].get_array(), image.permute(1, 2, 0))
        assert len(boxes) == 9
        assert [
            cell for cell, box in enumerate(boxes) if box.get_edgecolor()[:3] == to_rgb("red")
        ] == [CENTER]
        expected = np.ones((33, 33, 3))
        for box in boxes:
            left, top = map(int, box.get_xy())
            rows, columns = slice(top, top + box.get_height()), slice(left, left + box.get_width())
            expected[rows, columns] = image[:, rows, columns].permute(1, 2, 0) / 255
        assert np.allclose(mosaic, expected, atol=0.02)  # stretched to the range of the patches
    plt.close("all")


def test_boxes_of_scaled_patches_are_those_that_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = PatchGrid(patch_px=8, gap_px=1, jitter_px=0, resize=None, scale=(2, 2))
    assert grid.span_px == 3 * 4 + 2
    # Twice as large, a patch of 8 px shows 4: its whole cell.
    halves = torch.zeros(1, 3, 14, 14, dtype=torch.uint8)
    halves[..., 5:9, 5:9] = 255
    monkeypatch.setattr(picture.plt, "close", lambda figure: None)
    untouched = PatchPipeline(grid=grid, color=Keep(), normalize=lambda pixels: pixels)
    draw_patches(halves, untouched, tmp_path / "patches.png", seed=3)
    upper, lower = plt.gcf().axes
    monkeypatch.undo()
    center = upper.patches[CENTER]
    assert (*center.get_xy(), center.get_width(), center.get_height()) == (5, 5, 4, 4)
    shown = np.asarray(lower.images[0].get_array())
    assert shown.shape == (28, 28, 3)
    assert (shown[10:18, 10:18] == 1).all()
    assert (shown[:8, :8] == 0).all()
    plt.close("all")
