from pathlib import Path

import numpy as np
import pytest
from annotated_sets import checked
from archives import unpack_real_images

from relloc.data.annotated_folders import ObjectFolder
from relloc.data.annotations import (
    ObjectImages,
    SegmentedImages,
    decode_mask,
    images_with_objects,
    read_with_class_map,
)
from relloc.data.coco import coco
from relloc.data.voc_masks import voc_segmentation
from relloc.data.voc_objects import voc_detection

pytestmark = [
    pytest.mark.data,
    # pycocotools is older than NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


@pytest.fixture(scope="module")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_real_images("voc_tiny", tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_real_images("coco_tiny", tmp_path_factory.mktemp("coco"))


def test_boxes_of_voc_lie_in_their_images_and_nothing_is_wrong(voc_root: Path):
    splits = voc_detection(
        root=str(voc_root),
        years=[2012],
        train="trainval",
        held_out="test",
        held_out_year=2012,
        reference="mmdet",
    )
    assert (len(splits.train), len(splits.held_out)) == (36, 28)
    found = checked(splits)
    assert found.findings() == []
    assert (found.train.objects or 0) + (found.held_out.objects or 0) == 187
    classes = set()
    for images in (splits.train, splits.held_out):
        assert isinstance(images, ObjectImages)
        assert images_with_objects(images) == list(range(len(images)))
        for index in range(len(images)):
            objects = images.objects(index)
            height, width = images.size(index)
            assert objects.boxes.min() >= 0
            assert (objects.boxes[:, 2:] < [width, height]).all()
            classes |= set(objects.classes.tolist())
    assert classes == set(range(20))


def test_masks_of_voc_fit_images_and_show_the_classes_of_their_objects(voc_root: Path):
    splits = voc_segmentation(
        name="voc2012", root=str(voc_root), train="train", held_out="val", aug="aug"
    )
    assert (len(splits.train), len(splits.held_out)) == (36, 28)
    assert checked(splits).findings() == []
    seen = set()
    for images in (splits.train, splits.held_out):
        assert isinstance(images, SegmentedImages)
        for index in range(len(images)):
            rgb, class_map = read_with_class_map(images, index)
            assert rgb.shape[:2] == class_map.shape
            seen |= set(np.unique(class_map).tolist())
    assert seen == {*range(21), 255}


def test_coco_equals_what_pycocotools_reads(coco_root: Path):
    oracle_module = pytest.importorskip("pycocotools.coco")
    splits = coco(name="coco2017", root=str(coco_root), train="train2017", held_out="val2017")
    assert (len(splits.train), len(splits.held_out), len(splits.train.classes)) == (36, 20, 80)
    assert (splits.train.classes[0], splits.train.classes[79]) == ("person", "toothbrush")
    found = checked(splits)
    assert found.train.unreadable == found.held_out.unreadable == {}
    assert (found.train.objects, found.held_out.objects) == (179, 104)
    for images in (splits.train, splits.held_out):
        assert isinstance(images, ObjectFolder)
        annotations = coco_root / f"annotations/instances_{images.split}2017.json"
        oracle = oracle_module.COCO(str(annotations))
        category_ids = sorted(oracle.getCatIds())
        for index in range(len(images)):
            expected = oracle.loadAnns(oracle.getAnnIds(images.image_id(index)))
            objects = images.objects(index)
            classes = [category_ids.index(each["category_id"]) for each in expected]
            assert objects.classes.tolist() == classes
            assert objects.xywh.tolist() == [each["bbox"] for each in expected]
            assert objects.areas.tolist() == [each["area"] for each in expected]
            for mask, each in zip(objects.masks, expected, strict=True):
                drawn = decode_mask(mask, *images.size(index))
                np.testing.assert_array_equal(drawn, oracle.annToMask(each))
