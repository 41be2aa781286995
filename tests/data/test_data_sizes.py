"""Which images of a set are too small for a grid, told without decoding files."""

from pathlib import Path

import pytest
from PIL import Image

from relloc.data import sizes
from relloc.data.folder import FolderImages, folder
from relloc.data.photos import PhotoTiles
from relloc.data.sizes import images_smaller_than


def image_files(root: Path, short_sides: list[int]) -> FolderImages:
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
    for number, side in enumerate(short_sides):
        size = (side, 100) if number % 2 else (100, side)
        Image.new("RGB", size).save(root / "train" / "a" / f"{number}.png")
    Image.new("RGB", (100, 100)).save(root / "val" / "a" / "0.png")
    images = folder(name="x", root=str(root), held_out_share=0.1).train
    assert isinstance(images, FolderImages)
    return images


def test_the_shorter_side_decides_and_unreadable_files_do_not_count(tmp_path: Path) -> None:
    images = image_files(tmp_path, [40, 39, 38, 41])
    Path(images.paths[2]).write_bytes(b"no image")
    found = images_smaller_than(images, 40)
    assert (found.indices, found.first_size, found.n_looked_at) == ((1,), (100, 39), 4)
    assert found.share == 1 / 4
    assert images_smaller_than(images, 39).first_size is None


def test_of_many_images_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "MOST_LOOKED_AT", 3)
    found = images_smaller_than(image_files(tmp_path, [40, 39, 40, 40, 39, 40]), 40)
    assert (found.indices, found.n_looked_at) == ((4,), 3)


def test_images_that_are_no_files_of_their_own_have_sizes_too() -> None:
    tiles = PhotoTiles(split="held_out", tiles=[0.2, 0.4], stride=1)
    sides = [tile.side_px for tile in tiles.tiles]
    side_px = max(sides)
    small = [index for index, side in enumerate(sides) if side < side_px]
    assert 0 < len(small) < len(sides)
    assert images_smaller_than(tiles, side_px).indices == tuple(small)
