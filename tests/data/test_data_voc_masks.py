from pathlib import Path

import numpy as np
import pytest
from annotated_sets import (
    HEIGHT,
    WIDTH,
    checked,
    voc_palette,
    write_image,
    write_mask,
    write_text,
    write_voc_masks,
)
from PIL import Image

from relloc.data.annotated_folders import ClassMapFolder
from relloc.data.annotations import SegmentedImages, read_with_class_map
from relloc.data.image_set import Splits
from relloc.data.voc_masks import CLASSES, voc_colors, voc_segmentation
from relloc.errors import DataError, UnreadableImage

MASK = "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png"
AUG_MASK = "VOCdevkit/VOC2012/SegmentationClassAug/2008_000003.png"


def voc_of(root: Path, **settings: object) -> Splits:
    defaults = {"name": "voc2012", "train": "train", "held_out": "val", "aug": "aug"}
    return voc_segmentation(root=str(root), **{**defaults, **settings})


def train_of(root: Path, **settings: object) -> ClassMapFolder:
    images = voc_of(root, **settings).train
    assert isinstance(images, ClassMapFolder)
    return images


def test_palette_masks_give_classes_and_void(tmp_path: Path):
    splits = voc_of(write_voc_masks(tmp_path, aug=False))
    assert isinstance(splits.train, SegmentedImages)
    assert (len(splits.train), len(splits.held_out), len(splits.train.classes)) == (2, 1, 21)
    assert (splits.train.classes[0], splits.train.classes[20]) == ("background", "tvmonitor")
    rgb, class_map = read_with_class_map(splits.train, 0)
    assert (rgb.shape, rgb.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    assert (class_map.shape, class_map.dtype) == ((HEIGHT, WIDTH), np.uint8)
    assert (class_map[3, 4], class_map[5, 6], class_map[7, 8]) == (1, 20, 255)
    assert np.count_nonzero(class_map) == 3
    assert checked(splits).findings() == []


def test_masks_of_sbd_are_added_where_they_are_and_the_remark_says_so(tmp_path: Path):
    splits = voc_of(write_voc_masks(tmp_path, aug=True))
    assert len(splits.train) == 4
    assert isinstance(splits.train, ClassMapFolder)
    assert splits.train.class_map(2)[3, 4] == 15
    assert "2 of 4" in splits.remarks[0]
    assert len(train_of(tmp_path, aug=None)) == 2


def test_without_masks_of_sbd_the_remark_names_their_folder(tmp_path: Path):
    (remark,) = voc_of(write_voc_masks(tmp_path, aug=False)).remarks
    assert "SegmentationClassAug does not exist" in remark


def test_without_a_list_all_further_masks_of_sbd_are_taken(tmp_path: Path):
    devkit = write_voc_masks(tmp_path, aug=True) / "VOCdevkit/VOC2012"
    (devkit / "ImageSets/Segmentation/aug.txt").unlink()
    # The copy of DeepLab has masks of the other lists, too, and of held-out images.
    for name in ("2007_000032", "2007_000033"):
        write_mask(devkit / f"SegmentationClassAug/{name}.png")
    images = train_of(tmp_path)
    assert [Path(path).stem for path in images.mask_paths[2:]] == ["2008_000003", "2008_000007"]
    for path in (devkit / "SegmentationClassAug").glob("2008*"):
        path.unlink()
    with pytest.raises(DataError, match=r"data\.source\.aug=null"):
        voc_of(tmp_path)


def test_sbd_must_not_hold_out_what_it_trains_on(tmp_path: Path):
    write_voc_masks(tmp_path, aug=True)
    write_text(tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/aug.txt", "2007_000033\n")
    with pytest.raises(DataError, match="results on images that were trained on"):
        voc_of(tmp_path)


def test_counts_without_sbd_differ_from_the_published(tmp_path: Path):
    with pytest.warns(UserWarning, match="voc2012 train has 2 images, the published set 10582"):
        voc_of(write_voc_masks(tmp_path, aug=False), published_images={"train": 10582, "val": 1})


def test_colors_are_those_of_the_toolkit():
    colors = voc_palette()
    for color, number in voc_colors().items():
        assert list(color) == colors[3 * number : 3 * number + 3]
    assert len(voc_colors()) == len(CLASSES) + 1
    assert voc_colors()[224, 224, 192] == 255


def rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def gray_of_colors(path: Path) -> None:
    Image.open(path).convert("RGB").convert("L").save(path)


def sorted_palette(path: Path) -> None:
    mask = Image.open(path)
    colors = voc_palette()
    colors[3:6], colors[60:63] = colors[60:63], colors[3:6]
    mask.putpalette(colors)
    mask.save(path)


def other_size(path: Path) -> None:
    Image.open(path).resize((40, 30)).save(path)


def transposed(path: Path) -> None:
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


def as_jpeg(path: Path) -> None:
    Image.open(path).convert("L").save(path, "JPEG")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:120])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (rgb, "is RGB color, and should be palette or gray"),
        (gray_of_colors, "has the values 38"),
        (sorted_palette, "shows 1 in the color of 20"),
        (other_size, "mask has 40 x 30 px, the image 90 x 70 px"),
        (transposed, "mask has 70 x 90 px, the image 90 x 70 px"),
        (as_jpeg, "is JPEG, not PNG"),
        (cut_off, "OSError: Truncated"),
        (empty, "is an empty file"),
    ],
)
def test_a_wrong_mask_makes_its_image_unusable(tmp_path: Path, damage, problem: str):
    damage(write_voc_masks(tmp_path, aug=False) / MASK)
    splits = voc_of(tmp_path)
    assert isinstance(splits.train, ClassMapFolder)
    with pytest.raises(UnreadableImage, match=problem) as raised:
        read_with_class_map(splits.train, 0)
    assert "mask" in str(raised.value)
    read_with_class_map(splits.train, 1)
    found = checked(splits)
    assert list(found.train.unreadable) == ["2007_000032.jpg"]
    assert found.held_out.unreadable == {}


@pytest.mark.parametrize(
    ("aug", "lost", "told"),
    [
        (False, ["SegmentationClass/2007_000032"], "1 of 2 masks of voc2012 train"),
        (False, ["SegmentationClass/2007_000033"], "1 of 1 masks of voc2012 val"),
        (
            True,
            ["SegmentationClassAug/2008_000003", "SegmentationClassAug/2008_000007"],
            "2 of 4 masks of voc2012 train",
        ),
    ],
)
def test_missing_masks_are_counted_before_they_are_read(
    tmp_path: Path, aug: bool, lost: list[str], told: str
):
    devkit = write_voc_masks(tmp_path, aug=aug) / "VOCdevkit/VOC2012"
    for name in lost:
        (devkit / f"{name}.png").unlink()
    with pytest.raises(DataError, match=rf"{told} are missing.*{lost[0]}\.png"):
        voc_of(tmp_path)


def test_a_mask_that_vanishes_later_is_called_missing(tmp_path: Path):
    write_voc_masks(tmp_path, aug=False)
    images = train_of(tmp_path)
    (tmp_path / MASK).unlink()
    with pytest.raises(UnreadableImage, match=r"2007_000032\.png is missing"):
        images.class_map(0)


def test_a_class_out_of_range_in_sbd_is_told(tmp_path: Path):
    write_mask(write_voc_masks(tmp_path, aug=True) / AUG_MASK, {(0, 0): 21, (0, 1): 255})
    with pytest.raises(UnreadableImage, match="has the values 21, and should have 0 to 20"):
        train_of(tmp_path).class_map(2)


def test_a_mask_of_void_alone_is_told_and_used(tmp_path: Path):
    write_mask(write_voc_masks(tmp_path, aug=False) / MASK, mode="P", fill=255)
    found = checked(voc_of(tmp_path))
    assert found.train.unreadable == {}
    assert [kind for kind, images in found.train.odd_annotations.items() if images.n == 1] == [
        "no pixel of a class"
    ]


def test_missing_folders_are_named(tmp_path: Path):
    write_image(tmp_path / "VOCdevkit/VOC2012/JPEGImages/1.jpg")
    with pytest.raises(DataError, match=r"VOC2012/SegmentationClass is missing"):
        voc_of(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass").mkdir()
    with pytest.raises(DataError, match=r"Segmentation/train.txt is missing"):
        voc_of(tmp_path)


def test_the_digest_covers_masks_and_not_the_folder(tmp_path: Path):
    before = train_of(write_voc_masks(tmp_path / "a", aug=False)).digest()
    write_voc_masks(tmp_path / "b", aug=False)
    assert train_of(tmp_path / "b").digest() == before
    write_mask(tmp_path / "b" / MASK, {(3, 4): 2}, mode="P")
    assert train_of(tmp_path / "b").digest() != before
