import json
import os
from pathlib import Path

import pytest
from mixed_folder import jpeg, picture

from relloc.data.image_set import ImageSet, Splits
from relloc.data.lists import VOC_CLASSES, MultiLabeled, inaturalist2018, places205, voc
from relloc.errors import DataError, UnreadableImage


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(picture(20, 30, seed)))


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def below(images: ImageSet, root: Path) -> list[str]:
    return [os.path.relpath(images.source(index), root) for index in range(len(images))]


def vocdevkit(root: Path, year: int = 2007) -> Path:
    base = root / "VOCdevkit" / f"VOC{year}"
    for number in range(1, 4):
        image(base / "JPEGImages" / f"00000{number}.jpg", number)
    text(base / "ImageSets/Main/trainval.txt", "000001\n000002\n\n")
    text(base / "ImageSets/Main/test.txt", "000003  1\n")  # as in the lists of classes
    return root


def voc_of(root: Path | None, year: int = 2007, train: str = "trainval", **more: object) -> Splits:
    return voc(name="voc", root=root and str(root), year=year, train=train, held_out="test", **more)


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC{}"])
def test_voc_is_found_from_each_of_its_folders(tmp_path: Path, year: int, inner: str) -> None:
    splits = voc_of(vocdevkit(tmp_path, year) / inner.format(year), year)
    assert below(splits.train, tmp_path / f"VOCdevkit/VOC{year}/JPEGImages") == [
        "000001.jpg",
        "000002.jpg",
    ]
    assert (splits.train.split, splits.held_out.split, len(splits.held_out)) == (
        "trainval",
        "test",
        1,
    )
    assert splits.train.labels is None
    assert splits.held_out.read(0).size == (30, 20)


def test_a_missing_voc_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is not set.*VOC2007"):
        voc_of(None)
    with pytest.raises(DataError, match=r"JPEGImages is missing.*VOC2012"):
        voc_of(vocdevkit(tmp_path), year=2012)
    with pytest.raises(DataError, match=r"Main/train.txt is missing"):
        voc_of(tmp_path, train="train")
    text(tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/train.txt", "\n")
    with pytest.raises(DataError, match=r"Main/train.txt names no images"):
        voc_of(tmp_path, train="train")


@pytest.mark.parametrize("shared", ["000003", "000002\n000003"])
def test_voc_lists_that_share_images_are_refused(tmp_path: Path, shared: str) -> None:
    text(vocdevkit(tmp_path) / "VOCdevkit/VOC2007/ImageSets/Main/mine.txt", f"000001\n{shared}\n")
    with pytest.raises(
        DataError,
        match=r"voc\b.* 1 of 1 .*test\.txt .*mine\.txt.*000003\.jpg",
    ):
        voc_of(tmp_path, train="mine")
    with pytest.raises(DataError, match=r"test\.txt .*test\.txt.*000003\.jpg"):
        voc_of(tmp_path, train="test")


def test_places_and_inaturalist_lists_that_share_images_are_refused(tmp_path: Path) -> None:
    text(places_root(tmp_path) / "val.csv", "z/zoo/9.jpg 2\nz/zoo/2.jpg 2\n")
    with pytest.raises(DataError, match=r"1 of 2 .*val\.csv .*train\.csv.*z/zoo/2\.jpg"):
        places_of(tmp_path)
    text(tmp_path / "train2018.json", annotations("train_val2018/", (4,), {11: 4, 12: 4}))
    text(
        tmp_path / "val2018.json", annotations("", (4,), {12: 4})
    )  # the same file by its other name
    with pytest.raises(DataError, match=r"1 of 1 .*val2018\.json .*train2018\.json"):
        inat_of(tmp_path)


def test_a_list_with_a_nul_byte_is_damaged(tmp_path: Path) -> None:
    text(
        vocdevkit(tmp_path) / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt", "000001\n00\x00002\n"
    )
    with pytest.raises(DataError, match=r"trainval\.txt line 2 .*NUL byte"):
        voc_of(tmp_path)


def test_other_counts_than_the_published_are_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"voc trainval .*\b2 images.*\b5011\b"):
        voc_of(vocdevkit(tmp_path), published_images={"trainval": 5011, "test": 1})


def annotation(*objects: tuple[str, int]) -> str:
    inner = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult></object>"
        for name, hard in objects
    )
    return f"<annotation>{inner}</annotation>"


def class_lists(root: Path, labels: dict[str, tuple[int, int]], split: str = "trainval") -> Path:
    """`<class>_<split>.txt` of all classes; those not named are nowhere."""
    for name in VOC_CLASSES:
        first, second = labels.get(name, (-1, -1))
        text(
            root / f"VOCdevkit/VOC2007/ImageSets/Main/{name}_{split}.txt",
            f"000001 {first:2d}\n000002 {second:2d}\n",
        )
    return root


def presence_of(images: ImageSet) -> list[dict[str, int]]:
    """What is not absent, an image."""
    assert isinstance(images, MultiLabeled)
    rows = images.presence()
    assert all(len(row) == len(VOC_CLASSES) == 20 for row in rows)
    return [
        {name: mark for name, mark in zip(VOC_CLASSES, row, strict=True) if mark != -1}
        for row in rows
    ]


def test_presence_is_what_the_class_lists_say(tmp_path: Path) -> None:
    root = class_lists(vocdevkit(tmp_path), {"cat": (1, 0), "dog": (-1, 1), "tvmonitor": (1, 1)})
    assert presence_of(voc_of(root).train) == [
        {"cat": 1, "tvmonitor": 1},
        {"cat": 0, "dog": 1, "tvmonitor": 1},
    ]


def test_a_list_of_ones_own_takes_presence_from_annotations(tmp_path: Path) -> None:
    base = vocdevkit(tmp_path) / "VOCdevkit/VOC2007"
    text(base / "ImageSets/Main/mine.txt", "000002\n000001\n")
    text(base / "Annotations/000001.xml", annotation(("cat", 1), ("cat", 0), ("dog", 1)))
    text(base / "Annotations/000002.xml", annotation(("person", 0)))
    assert presence_of(voc_of(tmp_path, train="mine").train) == [
        {"person": 1},
        {"cat": 1, "dog": 0},
    ]
    text(base / "Annotations/000002.xml", "<annotation>")
    with pytest.raises(DataError, match=r"000002\.xml is not XML"):
        presence_of(voc_of(tmp_path, train="mine").train)
    (base / "Annotations/000002.xml").unlink()
    with pytest.raises(DataError, match=r"000002\.xml is missing"):
        presence_of(voc_of(tmp_path, train="mine").train)


def test_class_lists_that_do_not_match_the_split_are_refused(tmp_path: Path) -> None:
    root = class_lists(vocdevkit(tmp_path), {})
    lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
    for content, reason in [
        ("000001 1\n", r"cow_trainval\.txt .*\btrainval\.txt .*\b000002\b"),
        ("000001 1\n000002 1\n000009 1\n", r"cow_trainval\.txt .*\b000009\b"),
        (
            "000001 1\n000002 2\n",
            r"cow_trainval\.txt line 2: '000002 2' .*1, 0 or -1",
        ),
    ]:
        text(lists / "cow_trainval.txt", content)
        with pytest.raises(DataError, match=reason):
            presence_of(voc_of(root).train)
    (lists / "cow_trainval.txt").unlink()  # half unpacked: some lists are there
    with pytest.raises(
        DataError, match=r"cow_trainval.txt is missing: .*PASCAL VOC2007 development kit"
    ):
        presence_of(voc_of(root).train)


def places_root(root: Path) -> Path:
    image(root / "pics/a/abbey/1 of 2.jpg")
    image(root / "pics/z/zoo/2.jpg", 1)
    text(root / "train.csv", "a/abbey/1 of 2.jpg 0\nz/zoo/2.jpg 2\na/abbey/gone.jpg 0\n")
    text(root / "val.csv", "z/zoo/9.jpg 2\n")
    return root


def places_of(root: Path) -> Splits:
    return places205(
        name="places205", root=str(root), train_list="train.csv", val_list="val.csv", images="pics"
    )


def test_places_lines_are_split_at_the_last_space(tmp_path: Path) -> None:
    splits = places_of(places_root(tmp_path))
    assert below(splits.train, tmp_path / "pics") == [
        "a/abbey/1 of 2.jpg",
        "z/zoo/2.jpg",
        "a/abbey/gone.jpg",
    ]
    assert splits.train.labels == [0, 2, 0]
    assert splits.held_out.labels == [2]
    assert splits.train.classes == splits.held_out.classes == ("a/abbey", "1", "z/zoo")
    assert splits.labeled
    assert splits.train.read(0).size == (30, 20)


def test_an_image_that_is_listed_and_not_there_is_unreadable_when_read(tmp_path: Path) -> None:
    splits = places_of(places_root(tmp_path))
    with pytest.raises(UnreadableImage, match="is missing"):
        splits.train.read(2)


def test_labels_are_part_of_the_digest_and_the_place_is_not(tmp_path: Path) -> None:
    one, two = (places_of(places_root(tmp_path / name)).train.digest() for name in ("one", "two"))
    assert one == two
    text(tmp_path / "two/train.csv", "a/abbey/1 of 2.jpg 0\nz/zoo/2.jpg 1\na/abbey/gone.jpg 0\n")
    text(tmp_path / "two/val.csv", "z/zoo/9.jpg 1\n")
    assert places_of(tmp_path / "two").train.digest() != one


@pytest.mark.parametrize("line", ["a/abbey/1.jpg", "a/abbey/1.jpg zoo", "a/abbey/1.jpg -1", "3"])
def test_a_line_of_another_form_is_told_with_its_number(tmp_path: Path, line: str) -> None:
    text(places_root(tmp_path) / "val.csv", f"z/zoo/2.jpg 2\n\n{line}\n")
    with pytest.raises(DataError, match=rf"val\.csv line 3: .*{line}"):
        places_of(tmp_path)


def test_places_lists_that_are_missing_empty_or_of_other_classes_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.csv is missing: .*Places205"):
        places_of(tmp_path)
    text(places_root(tmp_path) / "val.csv", "q/quay/1.jpg 3\n")
    with pytest.raises(DataError, match=r"val\.csv: label 3 .*train\.csv"):
        places_of(tmp_path)
    text(tmp_path / "val.csv", "")
    with pytest.raises(DataError, match="val.csv names no images"):
        places_of(tmp_path)


def annotations(prefix: str, categories: tuple[int, ...], images: dict[int, int]) -> str:
    return json.dumps(
        {
            "images": [{"id": one, "file_name": f"{prefix}Aves/{one}.jpg"} for one in images],
            "annotations": [
                {"id": 7, "image_id": one, "category_id": images[one]} for one in reversed(images)
            ],
            "categories": [{"id": number, "name": f"species {number}"} for number in categories],
        }
    )


def inat_of(root: Path) -> Splits:
    return inaturalist2018(
        name="inat18",
        root=str(root),
        train_annotations="train2018.json",
        val_annotations="val2018.json",
        images="train_val2018",
    )


@pytest.mark.parametrize("prefix", ["train_val2018/", ""])
def test_inaturalist_joins_images_and_categories_by_number(tmp_path: Path, prefix: str) -> None:
    image(tmp_path / "train_val2018/Aves/11.jpg")
    text(tmp_path / "train2018.json", annotations(prefix, (20, 4, 9), {11: 20, 12: 4, 13: 20}))
    text(tmp_path / "val2018.json", annotations(prefix, (20, 4, 9), {14: 9}))
    splits = inat_of(tmp_path)
    assert below(splits.train, tmp_path / "train_val2018") == [
        "Aves/11.jpg",
        "Aves/12.jpg",
        "Aves/13.jpg",
    ]
    assert (
        splits.train.classes == splits.held_out.classes == ("species 4", "species 9", "species 20")
    )
    assert (splits.train.labels, splits.held_out.labels) == ([2, 0, 2], [1])
    assert (splits.train.split, splits.held_out.split) == ("train", "val")
    assert splits.train.read(0).size == (30, 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "val2018.json is not JSON"),
        ("[]", "val2018.json is no annotation file"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"val2018\.json: .*file name",
        ),
        (annotations("", (5,), {14: 5}), r"val2018\.json: .*category: 5"),
    ],
)
def test_inaturalist_files_of_another_form_are_told(
    tmp_path: Path, content: str, reason: str
) -> None:
    text(tmp_path / "train2018.json", annotations("", (4,), {11: 4}))
    with pytest.raises(
        DataError, match=rf"^{tmp_path}/val2018.json is missing: .*iNaturalist 2018"
    ):
        inat_of(tmp_path)
    text(tmp_path / "val2018.json", content)
    with pytest.raises(DataError, match=reason):
        inat_of(tmp_path)


def test_an_impossible_file_name_of_an_annotation_file_is_unreadable_when_read(
    tmp_path: Path,
) -> None:
    content = annotations("", (4,), {11: 4, 12: 4}).replace("12.jpg", "1\\u00002.jpg")
    text(tmp_path / "train2018.json", content)
    text(tmp_path / "val2018.json", annotations("", (4,), {14: 4}))
    splits = inat_of(tmp_path)
    assert len(splits.train.digest()) == 16
    with pytest.raises(UnreadableImage, match="null byte"):
        splits.train.read(1)


def test_categories_that_mean_another_thing_in_the_other_file_are_told(tmp_path: Path) -> None:
    text(tmp_path / "train2018.json", annotations("", (4, 9), {11: 4, 12: 9}))
    held_out = json.loads(annotations("", (4, 9), {13: 9}))
    text(tmp_path / "val2018.json", json.dumps(held_out))
    assert inat_of(tmp_path).labeled
    held_out["categories"][0]["name"], held_out["categories"][1]["name"] = "species 9", "species 4"
    text(tmp_path / "val2018.json", json.dumps(held_out))
    with pytest.raises(
        DataError, match=r"val2018\.json: category 4 .*species 9,.* train2018\.json .*species 4"
    ):
        inat_of(tmp_path)


def test_a_category_or_an_image_with_two_meanings_is_told(tmp_path: Path) -> None:
    text(tmp_path / "val2018.json", annotations("", (4, 9), {13: 9}))
    train = json.loads(annotations("", (4, 9), {11: 4, 12: 9}))
    twice = train | {"categories": [*train["categories"], {"id": 4, "name": "another"}]}
    text(tmp_path / "train2018.json", json.dumps(twice))
    with pytest.raises(DataError, match="category 4 is both"):
        inat_of(tmp_path)
    first = train["annotations"][0]
    twice = train | {"annotations": [*train["annotations"], first | {"category_id": 4}]}
    text(tmp_path / "train2018.json", json.dumps(twice))
    with pytest.raises(DataError, match="two categories"):
        inat_of(tmp_path)


def test_labels_of_places_that_disagree_between_the_lists_are_told(tmp_path: Path) -> None:
    places_root(tmp_path)
    text(tmp_path / "val.csv", "z/zoo/9.jpg 0\n")
    with pytest.raises(DataError, match=r"val.csv: z/zoo/9.jpg has label 0, .* z/zoo .* have 2"):
        places_of(tmp_path)
    text(
        tmp_path / "val.csv", "z/elsewhere/9.jpg 0\n"
    )  # a folder that training images say nothing of
    assert places_of(tmp_path).held_out.labels == [0]
    text(tmp_path / "train.csv", "a/1.jpg 0\na/2.jpg 1\n")  # folders that are no classes
    text(tmp_path / "val.csv", "a/9.jpg 1\n")
    assert places_of(tmp_path).held_out.labels == [1]
    text(tmp_path / "train.csv", f"a/1.jpg {10**12}\n")
    with pytest.raises(DataError, match="line 1"):
        places_of(tmp_path)
