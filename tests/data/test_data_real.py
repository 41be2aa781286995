from pathlib import Path

import numpy as np
import pytest

from relloc.data.crops import Crops
from relloc.data.folder import folder
from relloc.data.image_set import ImageSet
from relloc.geometry import PatchGrid, ShortSide
from relloc.seeds import Use

pytestmark = pytest.mark.data


def decode_all(images: ImageSet) -> None:
    for index in range(len(images)):
        image = images.read(index)
        assert image.mode == "RGB"
        assert min(image.size) >= 100
        assert np.asarray(image).std() > 1, images.source(index)


def test_small_imagenette_is_ten_classes_of_700_and_300_images_that_all_decode(
    real_images: Path,
) -> None:
    root = real_images / "imagenette_small"
    splits = folder(name="imagenette_small", root=str(root), held_out_share=0.05)
    assert splits.labeled
    assert (len(splits.train), len(splits.held_out)) == (700, 300)
    listed = (root / "classes.txt").read_text()
    assert len(splits.train.classes) == 10
    assert all(wnid in listed for wnid in splits.train.classes)
    assert set(splits.train.labels or []) == set(splits.held_out.labels or []) == set(range(10))
    decode_all(splits.train)
    decode_all(splits.held_out)


def test_demo_photos_are_unlabeled_all_decode_and_give_crops(real_images: Path) -> None:
    splits = folder(name="demo", root=str(real_images / "demo_photos"), held_out_share=0.2)
    assert not splits.labeled
    assert len(splits.train) + len(splits.held_out) == 239
    assert 24 <= len(splits.held_out) <= 72  # 48 expected, 4 standard deviations
    decode_all(splits.train)
    decode_all(splits.held_out)
    grid = PatchGrid(patch_px=64, gap_px=21, jitter_px=(0, 21), resize=ShortSide(px=292))
    crops = Crops(splits.held_out, grid, use=Use.CROP, seed=0, centered=False)
    for index in range(len(crops)):
        sample = crops[index, index]
        assert sample.unreadable == {}
        assert sample.pixels is not None
        assert sample.pixels.shape == (255, 255, 3)
