import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from annotated_sets import (
    HEIGHT,
    WIDTH,
    annotation_file,
    checked,
    voc_annotation,
    voc_object,
    write_image,
    write_text,
    write_voc,
)

from relloc.data.annotated_folders import ObjectFolder
from relloc.data.annotations import ObjectImages, images_with_objects
from relloc.data.image_set import Splits
from relloc.data.voc_objects import voc_detection
from relloc.errors import DataError, UnreadableImage, UsageError

PUBLISHED = {"trainval": 16551, "test": 4952}


def voc_of(root: Path, **settings: object) -> Splits:
    defaults = {
        "years": [2007, 2012],
        "train": "trainval",
        "held_out": "test",
        "held_out_year": 2007,
        "reference": "mmdet",
    }
    return voc_detection(root=str(root), **{**defaults, **settings})


def train_of(root: Path, **settings: object) -> ObjectFolder:
    images = voc_of(root, **settings).train
    assert isinstance(images, ObjectFolder)
    return images


def objects_of(path: Path, *objects: str) -> None:
    write_text(path, voc_annotation(*objects))


def test_both_years_are_trained_on_and_2007_is_held_out(tmp_path: Path):
    splits = voc_of(write_voc(tmp_path))
    names = [os.path.basename(splits.train.source(index)) for index in range(3)]
    assert names == ["000005.jpg", "000007.jpg", "2008_000002.jpg"]
    assert (splits.train.name, splits.train.split, len(splits.train)) == ("voc0712", "trainval", 3)
    assert (splits.held_out.name, splits.held_out.split) == ("voc2007", "test")
    assert isinstance(splits.train, ObjectImages)
    assert splits.train.classes[11] == "dog"
    assert splits.train.read(0).size == (WIDTH, HEIGHT)
    assert (splits.train.size(0), splits.train.image_id(2)) == ((HEIGHT, WIDTH), 2)


def test_one_year_is_named_by_it(tmp_path: Path):
    splits = voc_of(write_voc(tmp_path), years=[2007])
    assert (splits.train.name, len(splits.train)) == ("voc2007", 2)


def test_coordinates_are_read_as_each_reference_does(tmp_path: Path):
    objects = (voc_object("cat", (11, 21, 31, 61)), voc_object("car", (1.9, 2, 45.7, 60.2), 1))
    objects_of(annotation_file(write_voc(tmp_path)), *objects)
    found = train_of(tmp_path).objects(0)
    assert found.boxes.tolist() == [[10, 20, 30, 60], [0, 1, 44, 59]]
    assert (found.boxes.dtype, found.classes.tolist()) == (np.float32, [7, 6])
    assert (found.difficult.tolist(), found.crowd.tolist()) == ([False, True], [False, False])
    assert found.areas.tolist() == [20 * 40, 44 * 58]
    assert found.masks == ()
    other = train_of(tmp_path, reference="detectron2").objects(0)
    np.testing.assert_allclose(other.boxes, [[10, 20, 31, 61], [0.9, 1, 45.7, 60.2]], rtol=1e-6)


def test_occluded_objects_are_known_where_the_annotation_says_so(tmp_path: Path):
    root = write_voc(tmp_path)
    before = train_of(root).digest()
    occluded = voc_object("cat", (1, 1, 9, 9)).replace(
        "<difficult>", "<occluded>1</occluded><difficult>"
    )
    objects_of(annotation_file(root), occluded, voc_object("dog", (11, 21, 31, 61)))
    objects = train_of(root).objects(0)
    assert objects.occluded is not None
    assert objects.occluded.tolist() == [True, False]
    assert objects.difficult.tolist() == [False, False]
    assert objects.xywh[0].tolist() == [0, 0, 8, 8]
    # What detectors do not read leaves the digest, and so results that are there, as they are.
    objects_of(
        annotation_file(root), occluded.replace("d>1<", "d>0<"), voc_object("dog", (11, 21, 31, 61))
    )
    without = train_of(root).digest()
    objects_of(annotation_file(root), occluded, voc_object("dog", (11, 21, 31, 61)))
    assert train_of(root).digest() == without != before


def test_images_without_objects_stay_and_are_not_trained_on(tmp_path: Path):
    objects_of(annotation_file(write_voc(tmp_path)))
    hard = voc_object("dog", (1, 1, 50, 50), difficult=1)
    objects_of(annotation_file(tmp_path, "000007"), hard)
    images = train_of(tmp_path)
    assert [len(images.objects(index)) for index in range(3)] == [0, 1, 1]
    assert images.objects(0).boxes.shape == (0, 4)
    # mmdetection counts difficult objects as objects.
    assert images_with_objects(images) == [1, 2]
    assert images_with_objects(images, least_px=HEIGHT + 1) == []


def test_other_counts_than_published_are_a_warning_for_the_published_years(tmp_path: Path):
    write_voc(tmp_path)
    with pytest.warns(UserWarning, match="the published set") as told:
        splits = voc_of(tmp_path, published_images=PUBLISHED)
    assert [str(warning.message).split()[0] for warning in told] == ["voc0712", "voc2007"]
    assert checked(splits).train.objects == 3
    published = {"trainval": (3, 16551), "test": (1, 4952)}
    for check in (checked(splits).train, checked(splits).held_out):
        assert (check.images, check.published) == published[check.split]
    for years in ([2007], [2012], [2012, 2007]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            splits = voc_of(tmp_path, years=years, published_images=PUBLISHED)
        found = checked(splits)
        assert found.train.published is found.held_out.published is None
        assert found.findings() == []


def test_objects_of_other_classes_are_left_out_and_counted(tmp_path: Path):
    dog = voc_object("dog", (1, 1, 9, 9))
    # Its box is not looked at.
    unicorn = voc_object("unicorn", (9, "x", 2, 2))
    objects_of(annotation_file(write_voc(tmp_path)), unicorn, dog, "<object></object>")
    splits = voc_of(tmp_path)
    assert isinstance(splits.train, ObjectFolder)
    assert splits.train.unusable() == {}
    assert splits.train.objects(0).classes.tolist() == [11]
    assert splits.train.table.ids.tolist() == [2, 1, 1]
    (remark,) = splits.remarks
    assert re.search(r"^trainval: 2 objects .*object 1 \(unicorn\) in .*000005\.xml", remark)
    objects_of(annotation_file(tmp_path), dog)
    assert voc_of(tmp_path).remarks == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "000005.xml is missing"),
        ("", "000005.xml is not XML"),
        (voc_annotation()[:60], r"000005.xml is not XML: .*line 2"),
        ("PK\x03\x04", "000005.xml is not XML"),
        (voc_annotation(voc_object("dog", (9, 1, 9, 9))), r"object 1 \(dog\) is empty"),
        (voc_annotation(voc_object("dog", (9, 8, 19, 2))), r"object 1 \(dog\) is empty"),
        (voc_annotation(voc_object("dog", (9, "x", 19, 2))), r"ymin of object 1 \(dog\) is 'x'"),
        (
            voc_annotation(voc_object("dog", (9, "nan", 19, 2))),
            r"ymin of object 1 \(dog\) is 'nan'",
        ),
        (voc_annotation("<object><name>dog</name></object>"), "xmin of object 1"),
        (voc_annotation(voc_object("dog", (91, 1, 95, 9))), "object 1 lies outside"),
        (voc_annotation(height=0), "has 90 x 0 px"),
        (voc_annotation(height=""), "height of the image is ''"),
        ("<annotation></annotation>", "height of the image is ''"),
    ],
)
def test_a_wrong_annotation_makes_its_image_unusable(
    tmp_path: Path, content: str | None, problem: str
):
    path = annotation_file(write_voc(tmp_path))
    path.unlink()
    if content is not None:
        write_text(path, content)
    splits = voc_of(tmp_path)
    images = splits.train
    assert isinstance(images, ObjectFolder)
    assert list(images.unusable()) == [0]
    for use in (images.objects, images.size, images.read):
        with pytest.raises(UnreadableImage, match=problem):
            use(0)
    assert images_with_objects(images) == [1, 2]
    found = checked(splits)
    assert list(found.train.unreadable) == ["VOC2007/JPEGImages/000005.jpg"]
    assert found.held_out.unreadable == {}
    (finding,) = found.findings()
    assert "000005.xml" in finding


def test_an_image_of_another_size_than_annotated_is_unusable(tmp_path: Path):
    write_text(annotation_file(write_voc(tmp_path)), voc_annotation(height=90, width=70))
    splits = voc_of(tmp_path)
    with pytest.raises(UnreadableImage, match="annotation has 70 x 90 px, the image 90 x 70 px"):
        splits.train.read(0)
    assert list(checked(splits).train.unreadable) == ["VOC2007/JPEGImages/000005.jpg"]


def test_a_missing_image_is_unusable(tmp_path: Path):
    splits = voc_of(write_voc(tmp_path))
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2008_000002.jpg").unlink()
    assert list(checked(splits).train.unreadable) == ["VOC2012/JPEGImages/2008_000002.jpg"]


def test_a_box_over_the_border_is_told_and_used(tmp_path: Path):
    objects = [voc_object("dog", (5, 5, 9, 9)), voc_object("dog", (5, 5, 95, 9))]
    objects_of(annotation_file(write_voc(tmp_path)), *objects)
    splits = voc_of(tmp_path)
    found = checked(splits)
    assert found.train.unreadable == {}
    ((kind, images),) = found.train.odd_annotations.items()
    assert "border" in kind
    assert (images.n, images.examples) == (1, ("VOC2007/JPEGImages/000005.jpg: object 2",))
    assert len(train_of(tmp_path).objects(0)) == 2


def test_half_unpacked_archives_say_what_is_missing(tmp_path: Path):
    write_voc(tmp_path)
    shutil.rmtree(tmp_path / "VOCdevkit/VOC2012/Annotations")
    with pytest.raises(DataError, match=r"VOC2012/Annotations is missing"):
        voc_of(tmp_path)
    shutil.rmtree(tmp_path / "VOCdevkit/VOC2012")
    with pytest.raises(DataError, match=r"VOC2012/JPEGImages is missing"):
        voc_of(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    with pytest.raises(DataError, match=r"VOC2007/ImageSets/Main/test.txt is missing"):
        voc_of(tmp_path, years=[2007])


def test_the_folder_of_one_year_does_not_stand_for_two(tmp_path: Path):
    root = write_voc(tmp_path) / "VOCdevkit/VOC2007"
    assert len(train_of(root, years=[2007])) == 2
    with pytest.raises(DataError, match="folder of one year"):
        voc_of(root)


@pytest.mark.parametrize(
    "settings",
    [{"years": []}, {"years": [2007, 2007]}, {"reference": "mmdet3"}],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, object]):
    with pytest.raises(UsageError, match=r"data\.source\."):
        voc_of(write_voc(tmp_path), **settings)


def test_training_on_held_out_images_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="results on images that were trained on"):
        voc_of(write_voc(tmp_path), held_out="trainval")


def test_the_digest_covers_annotations_and_not_the_folder(tmp_path: Path):
    before = train_of(write_voc(tmp_path / "a")).digest()
    assert train_of(write_voc(tmp_path / "b")).digest() == before
    assert train_of(tmp_path / "a", reference="detectron2").digest() != before
    path = annotation_file(tmp_path / "b")
    path.write_text(path.read_text().replace("<xmin>11<", "<xmin>12<"))
    changed = train_of(tmp_path / "b").digest()
    assert changed != before
    path.write_text("")
    assert train_of(tmp_path / "b").digest() not in (before, changed)


def test_a_set_can_be_sent_to_another_process(tmp_path: Path):
    images = train_of(write_voc(tmp_path))
    received = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(received.objects(2).boxes, images.objects(2).boxes)


def test_lists_of_a_class_name_images_too(tmp_path: Path):
    write_image(write_voc(tmp_path) / "x.jpg")
    write_text(tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/dog_mine.txt", "000005  1\n000007 -1\n")
    assert len(train_of(tmp_path, years=[2007], train="dog_mine")) == 2
