import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import real_images_tar
from PIL import Image
from torch import Tensor

from relloc.data.annotations import Objects, RunLengths
from relloc.transfer.detections import Detections
from relloc.transfer.metrics.pictures import (
    draw_class_maps,
    draw_detections,
    voc_palette,
)

NAMES = ("cat", "dog")
# Of the pictures: the height of a title, and the gap before the first panel.
STRIP, GAP = 30, 8


def found(*rows: tuple[float, ...], masks: Tensor | None = None) -> Detections:
    """`rows` are x1 y1 x2 y2 class score."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(
        boxes=table[:, :4], classes=table[:, 4].long(), scores=table[:, 5], masks=masks
    )


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def panel(path: Path, place: int, height: int, width: int) -> np.ndarray:
    """The pixels of one panel of a picture, of the height and width it is drawn in."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    left = GAP + place * (width + GAP)
    return pixels[STRIP : STRIP + height, left : left + width]


def test_boxes_and_labels_are_drawn_in_the_color_of_the_class(tmp_path: Path) -> None:
    path = tmp_path / "found.png"
    rows = (50, 60, 150, 160, 0, 0.9), (300, 200, 400, 300, 0, 0.8), (300, 60, 400, 160, 1, 0.7)
    draw_detections(gray(400, 500), found(*rows), NAMES, path)
    pixels = panel(path, 0, 400, 500)
    first, second, third = pixels[160, 100], pixels[300, 350], pixels[160, 350]
    assert first.tolist() == second.tolist() != third.tolist()
    assert first.tolist() != [100, 100, 100]
    # The label stands above its box, filled with the color; inside and outside nothing changes.
    label = pixels[43:59, 51:100].reshape(-1, 3)
    assert (label == first).all(axis=1).mean() > 0.4
    assert (pixels[70:150, 60:140] == 100).all()
    assert (pixels[330:] == 100).all()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_less_sure_is_left_out(tmp_path: Path) -> None:
    low = found((50, 60, 150, 160, 0, 0.29))
    draw_detections(gray(400, 500), low, NAMES, tmp_path / "low.png")
    assert (panel(tmp_path / "low.png", 0, 400, 500) == 100).all()
    draw_detections(gray(400, 500), low, NAMES, tmp_path / "all.png", least_score=0.05)
    assert (panel(tmp_path / "all.png", 0, 400, 500) != 100).any()


def test_masks_are_translucent_and_the_surest_is_on_top(tmp_path: Path) -> None:
    masks = torch.zeros(2, 400, 500, dtype=torch.bool)
    masks[0, 100:200, 100:200] = True
    masks[1, 100:200, 150:250] = True
    rows = (100, 100, 200, 200, 0, 0.9), (150, 100, 250, 200, 0, 0.5)
    draw_detections(gray(400, 500), found(*rows, masks=masks), NAMES, tmp_path / "masks.png")
    pixels = panel(tmp_path / "masks.png", 0, 400, 500)
    surest, both, other = pixels[150, 120], pixels[150, 175], pixels[150, 220]
    assert surest.tolist() == both.tolist()
    # Two objects of one class can be told apart.
    assert surest.tolist() != other.tolist()
    # Half of a color and half of the image: no channel is lower than half of the image.
    assert (pixels[110:190, 110:140] >= 50).all()
    assert pixels[150, 300].tolist() == [100, 100, 100]


def test_annotated_objects_are_drawn_beside(tmp_path: Path) -> None:
    truth = Objects(
        boxes=np.array([[50, 60, 150, 160]], dtype=np.float32),
        xywh=np.array([[50.0, 60, 100, 100]]),
        classes=np.array([1]),
        difficult=np.array([True]),
        crowd=np.array([False]),
        areas=np.array([1e4]),
    )
    path = tmp_path / "both.png"
    draw_detections(gray(400, 500), found(), NAMES, path, truth=truth)
    assert (panel(path, 0, 400, 500) == 100).all()
    assert (panel(path, 1, 400, 500)[160, 100] != 100).any()
    assert panel(path, 1, 400, 500)[110, 100].tolist() == [100, 100, 100]
    left_part = RunLengths(counts=np.array([0, 120 * 400, 380 * 400]))
    masked = dataclasses.replace(truth, masks=(left_part,))
    draw_detections(gray(400, 500), found(), NAMES, path, truth=masked)
    assert panel(path, 1, 400, 500)[110, 100].tolist() != [100, 100, 100]


@pytest.mark.parametrize("size", [(3, 500), (90, 60), (1, 1)])
def test_images_of_any_size_and_boxes_outside_can_be_drawn(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    rows = (-20, -30, 5, 9, 0, 0.9), (40, 40, 30, 20, 1, 0.8), (1e6, 0, 2e6, 9, 1, 0.7)
    draw_detections(gray(*size), found(*rows), NAMES, tmp_path / "odd.png")
    with Image.open(tmp_path / "odd.png") as picture:
        assert max(picture.size) >= 480


def test_class_maps_have_the_colors_of_voc(tmp_path: Path) -> None:
    truth = np.zeros((400, 500), dtype=np.uint8)
    truth[:, 100:300], truth[:, 300:] = 1, 255
    predicted = np.zeros((400, 500), dtype=np.uint8)
    predicted[200:] = 2
    path = tmp_path / "maps.png"
    draw_class_maps(gray(400, 500), predicted, truth, ("background", *NAMES), path)
    assert (panel(path, 0, 400, 500) == 100).all()
    true, answered = panel(path, 1, 400, 500), panel(path, 2, 400, 500)
    assert [true[0, x].tolist() for x in (0, 200, 400)] == [[0, 0, 0], [128, 0, 0], [224, 224, 192]]
    assert [answered[y, 0].tolist() for y in (0, 399)] == [[0, 0, 0], [0, 128, 0]]


def test_the_palette_is_that_of_vocs_masks() -> None:
    # Aeroplane, person and tvmonitor as VOC's development kit lists them.
    palette = voc_palette()
    assert palette[[1, 15, 20]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128]]
    assert len(np.unique(palette, axis=0)) == 256


@pytest.mark.data
def test_the_palette_is_that_in_vocs_files() -> None:
    with tarfile.open(real_images_tar("voc_tiny")) as tar:
        name = next(name for name in tar.getnames() if "/SegmentationClass/" in name)
        mask = tar.extractfile(name)
        assert mask is not None
        with Image.open(mask) as image:
            colors = np.array(image.getpalette()).reshape(-1, 3)
    assert len(colors) == 256
    assert np.array_equal(colors, voc_palette())
