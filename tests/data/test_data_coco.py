import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_sets import (
    HEIGHT,
    TRIANGLE,
    WIDTH,
    checked,
    coco_annotation,
    coco_content,
    crowd_annotation,
    write_coco,
    write_text,
)

from relloc.data.annotated_folders import ObjectFolder
from relloc.data.annotations import (
    ObjectImages,
    Polygons,
    RunLengths,
    decode_mask,
    images_with_objects,
)
from relloc.data.coco import coco
from relloc.data.image_set import Splits
from relloc.errors import DataError, UnreadableImage

TRAIN_FILE = "annotations/instances_train2017.json"


def coco_of(root: Path, **settings: object) -> Splits:
    return coco(name="coco2017", root=str(root), train="train2017", held_out="val2017", **settings)


def train_of(root: Path) -> ObjectFolder:
    images = coco_of(root).train
    assert isinstance(images, ObjectFolder)
    return images


def changed(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """COCO whose training annotations are changed by a function."""
    path = write_coco(root) / TRAIN_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


def test_objects_come_by_image_in_the_order_of_the_file(tmp_path: Path):
    splits = coco_of(write_coco(tmp_path))
    images = splits.train
    assert isinstance(images, ObjectImages)
    assert (images.split, splits.held_out.split, images.name) == ("train", "val", "coco2017")
    # By ascending category id, whatever the order of the file.
    assert images.classes == ("person", "train", "toothbrush")
    assert [images.image_id(index) for index in range(3)] == [9, 25, 30]
    assert images.size(1) == (HEIGHT, WIDTH)
    assert [len(images.objects(index)) for index in range(3)] == [1, 2, 0]
    found = images.objects(1)
    assert found.boxes.tolist() == [[10, 10, 40.25, 50.75], [1, 0, 3, 70]]
    assert found.xywh.tolist() == [[10, 10, 30.25, 40.75], [1, 0, 2, 70]]
    assert (found.boxes.dtype, found.xywh.dtype) == (np.float32, np.float64)
    assert (found.classes.tolist(), found.crowd.tolist()) == ([0, 2], [False, True])
    assert (found.areas.tolist(), found.difficult.tolist()) == ([560.5, 560.5], [False, False])
    assert images.objects(0).classes.tolist() == [1]
    assert images.read(1).size == (WIDTH, HEIGHT)
    assert checked(splits).findings() == []


def test_masks_are_polygons_and_run_lengths(tmp_path: Path):
    polygon, crowd = train_of(write_coco(tmp_path)).objects(1).masks
    assert isinstance(polygon, Polygons)
    assert [part.tolist() for part in polygon.parts] == [TRIANGLE]
    assert isinstance(crowd, RunLengths)
    pixels = decode_mask(crowd, HEIGHT, WIDTH)
    assert (pixels.sum(), pixels[30, 1], pixels[0, 0]) == (50, 1, 0)


def test_a_mask_of_several_parts(tmp_path: Path):
    parts = [TRIANGLE, [1.5, 2, 3, 4, 5, 6, 7, 8.25]]
    annotations = [coco_annotation(1, 9, segmentation=parts), coco_annotation(2, 9)]
    several, one = train_of(write_coco(tmp_path, annotations)).objects(0).masks
    assert isinstance(several, Polygons)
    assert isinstance(one, Polygons)
    assert [part.tolist() for part in several.parts] == parts
    assert [part.tolist() for part in one.parts] == [TRIANGLE]


def test_run_lengths_may_be_compressed_as_pycocotools_writes_them(tmp_path: Path):
    oracle = pytest.importorskip("pycocotools.mask")
    crowd = crowd_annotation(3, 9)
    encoded = oracle.frPyObjects(crowd["segmentation"], HEIGHT, WIDTH)
    text = {"counts": encoded["counts"].decode(), "size": [HEIGHT, WIDTH]}
    write_coco(tmp_path, [crowd, crowd | {"id": 4, "segmentation": text}])
    first, second = train_of(tmp_path).objects(0).masks
    assert isinstance(first, RunLengths)
    assert isinstance(second, RunLengths)
    assert first.counts.tolist() == second.counts.tolist()


def test_images_with_crowds_alone_are_kept_and_trained_on(tmp_path: Path):
    images = train_of(write_coco(tmp_path, [crowd_annotation(1, 30)]))
    assert len(images) == 3
    assert images_with_objects(images) == [2]


def test_a_file_without_any_object(tmp_path: Path):
    images = train_of(write_coco(tmp_path, []))
    assert images.objects(2).boxes.shape == (0, 4)
    assert images_with_objects(images) == []
    assert images.digest() == images.digest()


def test_images_may_lie_below_images(tmp_path: Path):
    write_coco(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images/train2017")
    assert train_of(tmp_path).read(0).size == (WIDTH, HEIGHT)


NAN = float("nan")
HUGE = [[0, 0, 1e9, 0, 5, 5]]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"category_id": 91}, "the file has no category 91"),
        ({"category_id": None}, "category_id is None"),
        ({"iscrowd": 2}, "iscrowd is 2"),
        ({"area": None}, "area is"),
        ({"area": NAN}, "area is"),
        ({"bbox": None}, "bbox is None"),
        ({"bbox": [1, 2, 3]}, r"bbox is \[1.0, 2.0, 3.0\]"),
        ({"bbox": [1, 2, -3, 4]}, "width and height of 0 or more"),
        ({"bbox": [1, 2, NAN, 4]}, "finite"),
        ({"bbox": [1, 2, "3", 4]}, "bbox is"),
        ({"bbox": [WIDTH, 2, 3, 4]}, "its box lies outside"),
        ({"segmentation": []}, "segmentation is missing or empty"),
        ({"segmentation": [[1, 2, 3, 4]]}, "has 4 numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "has 7 numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "segmentation is"),
        ({"segmentation": HUGE}, "reaches far out of the image"),
        ({"segmentation": {"counts": [1, 2, 3]}}, f"has 6 pixels, its image {HEIGHT * WIDTH}"),
        ({"segmentation": {"counts": [1, -2, 3]}}, "counts of segmentation"),
        ({"segmentation": {"counts": "\t"}}, "counts of segmentation"),
        ({"segmentation": {}}, "counts of segmentation"),
    ],
)
def test_a_wrong_annotation_makes_its_image_unusable(
    tmp_path: Path, wrong: dict[str, object], problem: str
):
    annotations = [
        coco_annotation(17, 25, **wrong),
        coco_annotation(18, 25),
        coco_annotation(19, 9),
    ]
    splits = coco_of(write_coco(tmp_path, annotations))
    images = splits.train
    assert isinstance(images, ObjectFolder)
    assert list(images.unusable()) == [1]
    with pytest.raises(UnreadableImage, match=f"annotation 17 in .*{problem}"):
        images.objects(1)
    assert images.objects(0).boxes.tolist() == [[10, 10, 40.25, 50.75]]
    assert images_with_objects(images) == [0]
    found = checked(splits)
    assert list(found.train.unreadable) == [f"{25:012d}.jpg"]
    (finding,) = found.findings()
    assert "annotation 17" in finding


def test_empty_boxes_and_boxes_over_the_border_are_told_and_used(tmp_path: Path):
    annotations = [
        # As annotation 918 of COCO's own training file.
        coco_annotation(918, 25, bbox=[10.5, 10.5, 1.03, 0.0], area=0.0),
        coco_annotation(5, 9, bbox=[80, 60, 10.5, 10.5]),
        coco_annotation(6, 30, bbox=[80, 60, 12, 5]),
    ]
    splits = coco_of(write_coco(tmp_path, annotations))
    found = checked(splits)
    assert found.train.unreadable == {}
    told = {kind: images.examples for kind, images in found.train.odd_annotations.items()}
    assert sorted(told.values()) == [(f"{25:012d}.jpg: object 918",), (f"{30:012d}.jpg: object 6",)]
    assert len(found.findings()) == 2
    assert len(splits.train) == 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content["images"][1].pop("id"), "image 2 has no id"),
        (lambda content: content["images"][1].pop("file_name"), "image 25 has no file_name"),
        (lambda content: content["images"][1].pop("height"), r"image 25 .* height and width"),
        (lambda content: content["images"][1].update(width=0), r"image 25 .* height and width"),
        (lambda content: content["images"][1].update(id=9), "has two images 9"),
        (lambda content: content["images"].clear(), "names no images"),
        (lambda content: content["images"].append(7), "image 4 has no id"),
        (lambda content: content["annotations"][2].pop("id"), "annotation 3 has no id"),
        (
            lambda content: content["annotations"][2].pop("image_id"),
            "annotation 42 has no image_id",
        ),
        (
            lambda content: content["annotations"][2].update(image_id=3),
            "annotation 42 is of image 3",
        ),
        (
            lambda content: content["annotations"][2].update(image_id=3, bbox=None),
            "no image 3, .* annotation 42",
        ),
        (lambda content: content["categories"].pop(), "differ in their categories"),
        (lambda content: content["categories"][0].pop("name"), "category 7 has no name"),
        (lambda content: content["categories"][0].update(name="x"), "differ in their categories"),
        (lambda content: content.pop("annotations"), "has no list annotations"),
    ],
)
def test_files_that_belong_to_nothing_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
):
    with pytest.raises(DataError, match=f"instances_train2017.json.*{problem}"):
        coco_of(changed(tmp_path, change))


def test_a_file_that_is_cut_off_or_missing_is_told(tmp_path: Path):
    path = write_coco(tmp_path) / TRAIN_FILE
    text = path.read_text()
    path.write_text(text[: text.index('"id": 41')])
    with pytest.raises(DataError, match="instances_train2017.json is cut off .* in annotations"):
        coco_of(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"instances_train2017.json is missing.*train2017.zip"):
        coco_of(tmp_path)


def test_half_unpacked_archives_are_told(tmp_path: Path):
    write_coco(tmp_path)
    (tmp_path / "train2017" / f"{25:012d}.jpg").unlink()
    path = tmp_path / "train2017" / f"{9:012d}.jpg"
    path.write_bytes(path.read_bytes()[:500])
    assert list(checked(coco_of(tmp_path)).train.unreadable) == [f"{9:012d}.jpg", f"{25:012d}.jpg"]
    (tmp_path / "val2017").rename(tmp_path / "val")
    with pytest.raises(DataError, match=r"val2017 is missing: .*val2017.zip"):
        coco_of(tmp_path)


def test_the_same_split_twice_is_refused(tmp_path: Path):
    write_coco(tmp_path)
    with pytest.raises(DataError, match="results on images that were trained on"):
        coco(name="coco2017", root=str(tmp_path), train="val2017", held_out="val2017")


def test_other_counts_than_published_are_a_warning(tmp_path: Path):
    write_coco(tmp_path)
    with pytest.warns(UserWarning, match="coco2017 train has 3 images, the published set 118287"):
        coco_of(tmp_path, published_images={"train": 118287, "val": 1})


def test_the_digest_covers_annotations_and_not_the_folder(tmp_path: Path):
    before = train_of(write_coco(tmp_path / "a")).digest()
    assert train_of(write_coco(tmp_path / "b")).digest() == before
    other = [*TRIANGLE[:-1], 50.76]
    for number, wrong in enumerate(({"segmentation": [other]}, {"area": 1}, {"iscrowd": 1})):
        annotations = [
            coco_annotation(40, 25, **wrong),
            coco_annotation(41, 9, category_id=7),
            crowd_annotation(42, 25),
        ]
        root = write_coco(tmp_path / str(number), annotations)
        assert train_of(root).digest() != before


def test_annotations_take_little_memory_and_are_sent_cheaply(tmp_path: Path):
    n_images, n_objects, n_corners = 400, 3000, 25
    rng = np.random.default_rng(0)
    corners = np.round(rng.uniform(0, 60, (n_objects, 2 * n_corners)), 2).tolist()
    annotations = [
        coco_annotation(number, 1 + number % n_images, segmentation=[corners[number]])
        for number in range(n_objects)
    ]
    write_coco(tmp_path)
    content = coco_content(range(1, n_images + 1), annotations)
    write_text(tmp_path / TRAIN_FILE, json.dumps(content))
    images = train_of(tmp_path)
    sent = len(pickle.dumps(images, pickle.HIGHEST_PROTOCOL))
    # 4 bytes a coordinate, 100 for the rest of an object, and the path of each image.
    paths = sum(map(len, images.paths))
    assert sent < 4 * 2 * n_corners * n_objects + 100 * n_objects + paths + 60 * n_images
    received = pickle.loads(pickle.dumps(images))
    (mask, *_) = received.objects(7).masks
    assert mask.parts[0].tolist() == corners[7]
