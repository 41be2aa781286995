"""Contact sheets: what lies where, and names and images that are odd."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_folder import picture
from PIL import Image

from relloc.data.folder import FolderImages
from relloc.features.source import EncodeConfig
from relloc.studies.contact_sheet import Tile, contact_sheet, read_patches, save_contact_sheets

RED = np.full((10, 10, 3), (255, 0, 0), dtype=np.uint8)
BLUE = np.full((30, 30, 3), (0, 0, 255), dtype=np.uint8)


def columns_of(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """The columns, from left to right, in which the color is seen."""
    found = (np.asarray(sheet) == color).all(axis=2)
    return np.flatnonzero(found.any(axis=0))


def rows_of(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return columns_of(sheet.transpose(Image.Transpose.TRANSPOSE), color)


def test_tiles_have_one_size_and_stand_beside_each_other() -> None:
    rows = [[Tile(pixels=RED, framed=True), Tile(pixels=BLUE)], [Tile(pixels=BLUE)]]
    sheet = contact_sheet(rows, title="", tile_px=40)
    assert len(columns_of(sheet, (255, 0, 0))) == 40
    assert len(rows_of(sheet, (255, 0, 0))) == 40
    # Blue is right of red in the first row, and below it in the second.
    blue = columns_of(sheet, (0, 0, 255))
    assert len(blue) == 80
    assert blue[0] == columns_of(sheet, (255, 0, 0))[0]
    assert len(rows_of(sheet, (0, 0, 255))) == 80


def test_captions_are_drawn_below_and_never_wider_than_their_tile() -> None:
    def ink(*caption: str) -> tuple[np.ndarray, int]:
        sheet = contact_sheet([[Tile(pixels=RED, caption=caption)]], title="", tile_px=60)
        pixels = np.asarray(sheet)
        is_text = (pixels.max(axis=2) < 128).any(axis=0)
        return np.flatnonzero(is_text), sheet.height

    short, height = ink("0.93")
    assert len(short)
    long, _ = ink("a very long name of a file that goes on and on.jpg")
    assert long[-1] - long[0] < 60
    assert long[-1] > short[-1]
    none, height_without = ink()
    assert not len(none)
    assert height > height_without


@pytest.mark.parametrize("caption", ["a\nb", "\udce9.jpg", "\u202ereversed", "日本.jpg", ""])
def test_odd_names_are_drawn(caption: str) -> None:
    sheet = contact_sheet([[Tile(pixels=None, caption=(caption,))]], title=caption, tile_px=60)
    assert sheet.size[0] >= 60


def test_many_rows_are_several_files(tmp_path: Path) -> None:
    rows = [[Tile(pixels=RED)]] * 5
    (one,) = save_contact_sheets(rows, tmp_path / "new", "sheet", title="all", tile_px=20)
    assert one == tmp_path / "new" / "sheet.png"
    several = save_contact_sheets(
        rows, tmp_path, "sheet", title="all", tile_px=20, rows_per_sheet=2
    )
    assert [path.name for path in several] == ["sheet_1.png", "sheet_2.png", "sheet_3.png"]
    heights = []
    for path in several:
        with Image.open(path) as sheet:
            heights.append(sheet.height)
    assert heights[0] == heights[1] > heights[2]
    assert save_contact_sheets([], tmp_path, "none", title="", tile_px=20) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_patches_are_read_in_their_order_and_missing_ones_are_none(
    tmp_path: Path, workers: int
) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number in (0, 2):
        picture(60, 80, seed=number).save(paths[number])
    images = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    config = EncodeConfig(
        batch=1,
        workers=workers,
        device=torch.device("cpu"),
        precision="fp32",
        unreadable_share=0.0,
    )
    boxes = [(0, 0, 16, 16), (10, 20, 26, 36), (1, 1, 5, 5), (64, 44, 80, 60)]
    found = read_patches(
        images, torch.tensor([2, 0, 1, 2]), torch.tensor(boxes), px=16, config=config
    )
    assert found[2] is None
    for number, index in ((0, 2), (1, 0), (3, 2)):
        x1, y1, x2, y2 = boxes[number]
        expected = np.asarray(images.read(index))[y1:y2, x1:x2]
        assert np.array_equal(found[number], expected)
