import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from annotated_sets import checked, write_cityscapes, write_image, write_mask

from relloc import ranks
from relloc.data.annotations import SegmentedImages, read_with_class_map
from relloc.data.cityscapes import CLASSES, CityscapesImages, cityscapes
from relloc.data.image_set import Splits
from relloc.errors import DataError, UnreadableImage

STEM = "gtFine/train/aachen/aachen_000000_000019_gtFine"
# trainId of each id from 0 to 33, as in the table of cityscapesScripts; 255 is not evaluated.
TRAIN_IDS = (
    *(255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255),
    *(5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18),
)


def cityscapes_of(root: Path, **settings: object) -> Splits:
    return cityscapes(name="cityscapes", root=str(root), train="train", held_out="val", **settings)


def train_of(root: Path) -> CityscapesImages:
    images = cityscapes_of(root).train
    assert isinstance(images, CityscapesImages)
    return images


def test_train_ids_are_read_as_they_are(tmp_path: Path):
    splits = cityscapes_of(write_cityscapes(tmp_path))
    assert isinstance(splits.train, SegmentedImages)
    assert (len(splits.train), len(splits.held_out), len(CLASSES)) == (2, 1, 19)
    assert (CLASSES[0], CLASSES[18]) == ("road", "bicycle")
    _, class_map = read_with_class_map(splits.train, 0)
    assert (class_map[3, 4], class_map[5, 6], class_map[0, 0]) == (18, 255, 0)
    assert splits.remarks == ()
    # Each mask belongs to its own image.
    assert "bochum" in splits.train.source(1)
    assert checked(splits).train.unreadable == {}


def test_label_ids_are_converted_by_the_table_where_train_ids_are_missing(tmp_path: Path):
    splits = cityscapes_of(write_cityscapes(tmp_path, "labelIds"))
    assert isinstance(splits.train, CityscapesImages)
    class_map = splits.train.class_map(0)
    assert (class_map[3, 4], class_map[5, 6], class_map[0, 0]) == (18, 255, 0)
    assert "3 of 3" in splits.remarks[0]
    labels = {(0, label): label for label in range(34)} | {(0, 34): 255}
    write_mask(tmp_path / f"{STEM}_labelIds.png", labels)
    converted = splits.train.class_map(0)[0, :35]
    np.testing.assert_array_equal(converted, [*TRAIN_IDS, 255])


def test_train_ids_come_first_where_both_are_there(tmp_path: Path):
    write_cityscapes(tmp_path, "labelIds")
    write_mask(tmp_path / f"{STEM}_labelTrainIds.png", fill=3)
    splits = cityscapes_of(tmp_path)
    assert isinstance(splits.train, CityscapesImages)
    assert splits.train.class_map(0)[3, 4] == 3
    assert "2 of 3" in splits.remarks[0]


@pytest.mark.parametrize(
    ("suffix", "value", "problem"),
    [("labelTrainIds", 26, "has the values 26"), ("labelIds", 77, "has the label 77")],
)
def test_wrong_values_make_an_image_unusable(tmp_path: Path, suffix: str, value: int, problem: str):
    write_mask(write_cityscapes(tmp_path, suffix) / f"{STEM}_{suffix}.png", {(1, 1): value})
    with pytest.raises(UnreadableImage, match=problem):
        train_of(tmp_path).class_map(0)
    found = checked(cityscapes_of(tmp_path))
    assert [name.rpartition("/")[2] for name in found.train.unreadable] == [
        "aachen_000000_000019_leftImg8bit.png"
    ]


def test_a_palette_mask_makes_an_image_unusable_and_a_missing_one_is_told_first(tmp_path: Path):
    path = write_cityscapes(tmp_path) / f"{STEM}_labelTrainIds.png"
    write_mask(path, mode="P")
    with pytest.raises(UnreadableImage, match="is palette, and should be gray"):
        train_of(tmp_path).class_map(0)
    assert len(checked(cityscapes_of(tmp_path)).train.unreadable) == 1
    path.unlink()
    with pytest.raises(DataError, match=rf"1 of 2 masks .*{STEM}_labelTrainIds\.png"):
        cityscapes_of(tmp_path)


def test_missing_folders_are_named(tmp_path: Path):
    write_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtFine/val")
    with pytest.raises(DataError, match=r"gtFine/val is missing.*gtFine_trainvaltest.zip"):
        cityscapes_of(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit/train/aachen")
    shutil.rmtree(tmp_path / "leftImg8bit/train/bochum")
    write_image(tmp_path / "leftImg8bit/train/aachen/other.png")
    with pytest.raises(DataError, match=r"leftImg8bit/train holds no images"):
        cityscapes_of(tmp_path)


def test_other_counts_than_published_are_a_warning_of_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_cityscapes(tmp_path)
    with pytest.warns(UserWarning, match="cityscapes train has 2 images, the published set 2975"):
        cityscapes_of(tmp_path, published_images={"train": 2975, "val": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cityscapes_of(tmp_path, published_images={"train": 2, "val": 1})
        monkeypatch.setattr(ranks, "rank", lambda: 1)
        cityscapes_of(tmp_path, published_images={"train": 2975, "val": 1})


def test_the_digest_covers_masks(tmp_path: Path):
    before = train_of(write_cityscapes(tmp_path)).digest()
    write_mask(tmp_path / f"{STEM}_labelTrainIds.png", fill=3)
    assert train_of(tmp_path).digest() != before
