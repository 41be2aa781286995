import os
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relloc.data.folder import class_folders, folder
from relloc.data.image_set import ImageSet, Splits
from relloc.errors import DataError, UnreadableImage

HOSTILE = [
    "two words.jpg",
    "zürich ✓ 写真.png",
    "line\nbreak.jpg",
    "-rf.jpg",
    "quote'\"$HOME.jpg",
    "50%#?&.jpg",
]


def touch(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def labeled_root(root: Path) -> Path:
    train = ["train/b/3.jpg", "train/a/2.jpg", "train/a/1.jpg", "train/b/deeper/4.png"]
    return touch(root, [*train, "val/a/5.jpg", "val/b/6.JPEG"])


def unlabeled(root: str | list[str] | None, share: float = 0.3) -> Splits:
    return folder(name="mine", root=root, held_out_share=share)


def names(images: ImageSet, root: Path) -> list[str]:
    return [os.path.relpath(images.source(index), root) for index in range(len(images))]


def all_names(splits: Splits, root: Path) -> list[str]:
    return sorted(names(splits.train, root) + names(splits.held_out, root))


def many(n: int, first: int = 0) -> list[str]:
    return [f"{number % 7}/{number}.jpg" for number in range(first, first + n)]


def test_class_folders_in_sorted_order_are_the_labels(tmp_path: Path) -> None:
    splits = folder(name="mine", root=str(labeled_root(tmp_path)), held_out_share=0.1)
    assert splits.labeled
    assert names(splits.train, tmp_path) == [
        "train/a/1.jpg",
        "train/a/2.jpg",
        "train/b/3.jpg",
        "train/b/deeper/4.png",
    ]
    assert splits.train.labels == [0, 0, 1, 1]
    assert names(splits.held_out, tmp_path) == ["val/a/5.jpg", "val/b/6.JPEG"]
    assert splits.held_out.labels == [0, 1]
    assert splits.train.classes == splits.held_out.classes == ("a", "b")
    assert (splits.train.name, splits.train.split, splits.held_out.split) == (
        "mine",
        "train",
        "val",
    )


def test_a_list_of_one_labeled_root_is_labeled_and_of_two_is_not(tmp_path: Path) -> None:
    one, two = labeled_root(tmp_path / "one"), labeled_root(tmp_path / "two")
    assert unlabeled([str(one)]).labeled
    with pytest.raises(DataError, match=r"one holds several splits .*data.source.pool_splits=true"):
        unlabeled([str(one), str(two)], share=0.5)
    pooled = folder(name="mine", root=[str(one), str(two)], held_out_share=0.5, pool_splits=True)
    assert pooled.train.labels is None
    assert len(all_names(pooled, tmp_path)) == 12


def test_one_class_is_a_labeled_data_set(tmp_path: Path) -> None:
    splits = unlabeled(
        str(touch(tmp_path, ["train/only/1.jpg", "train/only/2.jpg", "val/only/3.jpg"]))
    )
    assert (splits.labeled, splits.train.classes, splits.train.labels) == (True, ("only",), [0, 0])


@pytest.mark.parametrize("missing", ["train", "val"])
def test_with_one_split_only_images_are_unlabeled(tmp_path: Path, missing: str) -> None:
    shutil.rmtree(labeled_root(tmp_path) / missing)
    touch(tmp_path, many(20))
    splits = unlabeled(str(tmp_path))
    assert not splits.labeled
    assert len(all_names(splits, tmp_path)) == (22 if missing == "train" else 24)


def test_unlabeled_images_are_all_found_and_in_one_split_each(tmp_path: Path) -> None:
    splits = unlabeled(str(touch(tmp_path, many(100))))
    assert not splits.labeled
    assert splits.train.classes == ()
    assert all_names(splits, tmp_path) == sorted(many(100))
    assert (splits.train.split, splits.held_out.split) == ("train", "held_out")


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_about_the_share_is_held_out(tmp_path: Path, share: float) -> None:
    n = 1500
    held_out = len(unlabeled(str(touch(tmp_path, many(n))), share).held_out)
    assert abs(held_out - share * n) < 4 * (n * share * (1 - share)) ** 0.5


def test_adding_images_or_moving_the_folder_moves_no_image_to_the_other_split(
    tmp_path: Path,
) -> None:
    before = unlabeled(str(touch(tmp_path / "here", many(200))))
    old_train, old_held_out = (
        names(before.train, tmp_path / "here"),
        names(before.held_out, tmp_path / "here"),
    )
    shutil.move(tmp_path / "here", tmp_path / "there")
    after = unlabeled(str(touch(tmp_path / "there", many(300, first=200))) + "/")
    assert set(old_train) < set(names(after.train, tmp_path / "there"))
    assert set(old_held_out) < set(names(after.held_out, tmp_path / "there"))


def test_several_roots_are_pooled_in_their_order(tmp_path: Path) -> None:
    one, two = touch(tmp_path / "one", many(60)), touch(tmp_path / "two", many(60))
    splits = unlabeled([str(two), str(one)])
    roots = [name.split("/")[0] for name in names(splits.train, tmp_path)]
    assert roots == sorted(roots, reverse=True)
    assert set(roots) == {"one", "two"}
    alone = unlabeled(str(two))  # an image's split does not depend on the other roots
    assert names(alone.held_out, two) == [
        name.removeprefix("two/")
        for name in names(splits.held_out, tmp_path)
        if name.startswith("two/")
    ]


def test_a_root_inside_another_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, many(50))
    for roots in (
        [str(tmp_path), str(tmp_path / "3")],
        [str(tmp_path / "3"), str(tmp_path)],
        [str(tmp_path)] * 2,
    ):
        with pytest.raises(DataError, match="taken twice"):
            unlabeled(roots)


def test_links_are_followed_and_lead_to_no_image_twice(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", many(30))
    root = touch(tmp_path / "root", many(30, first=30))
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "3" / "back up").symlink_to(root)
    splits = unlabeled(str(root))
    real = [os.path.realpath(root / name) for name in all_names(splits, root)]
    assert len(real) == len(set(real)) == 60


def test_hidden_files_and_folders_and_what_is_no_image_are_left_out(tmp_path: Path) -> None:
    others = [
        "readme.txt",
        "a.jpg.part",
        "jpg",
        "1/.hidden.jpg",
        "1/._5.jpg",
        ".thumbnails/5.jpg",
        "1/.git/x.png",
    ]
    splits = unlabeled(str(touch(tmp_path, [*many(40), *others])))
    assert all_names(splits, tmp_path) == sorted(many(40))
    root = touch(
        labeled_root(tmp_path / "labeled"), ["train/.ipynb_checkpoints/1.jpg", "val/a/notes.txt"]
    )
    assert folder(name="mine", root=str(root), held_out_share=0.1).train.classes == ("a", "b")


def test_a_hidden_root_is_read_when_asked_for(tmp_path: Path) -> None:
    assert len(all_names(unlabeled(str(touch(tmp_path / ".photos", many(40)))), tmp_path)) == 40


def test_hostile_names_are_found_read_and_hashed(tmp_path: Path) -> None:
    pixels = np.full((4, 5, 3), 77, np.uint8)
    hostile = [*HOSTILE, os.fsdecode(b"latin-\xe9.png")]
    for name in hostile:
        Image.fromarray(pixels).save(tmp_path / name, "PNG")
    touch(tmp_path, many(40))
    splits = unlabeled(str(tmp_path), share=0.5)
    assert set(hostile) < set(all_names(splits, tmp_path))
    read = 0
    for images in (splits.train, splits.held_out):
        assert len(images.digest()) == 16
        for index, name in enumerate(names(images, tmp_path)):
            if name in hostile:
                assert np.array_equal(np.asarray(images.read(index)), pixels)
                read += 1
            else:
                with pytest.raises(UnreadableImage, match="is an empty file"):
                    images.read(index)
    assert read == len(hostile)


@pytest.mark.parametrize("root", [None, ""])
def test_an_unset_root_says_how_to_set_it(root: str | None) -> None:
    with pytest.raises(DataError, match=r"data\.root .*data\.root=FOLDER.* RELLOC_DATA"):
        unlabeled(root)
    with pytest.raises(DataError, match=r"data\.root is not set"):
        class_folders(name="in1k", root=root, train="train", val="val")


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "no such")
    with pytest.raises(DataError, match=f"data.root={missing} is not a folder"):
        unlabeled(missing)
    with pytest.raises(DataError, match=f"data.root={missing} is not a folder"):
        unlabeled([str(tmp_path), missing])


def test_too_few_images_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image .*data\.root.*\.jpg, .*\b0 images") as caught:
        unlabeled(str(tmp_path))
    # Another share of nothing would be nothing
    assert "held_out_share" not in str(caught.value)
    touch(tmp_path, ["one.jpg"])
    with pytest.raises(DataError, match=r"\b0 images .*\b1 held|\b1 image .*\b0 held"):
        unlabeled(str(tmp_path))


@pytest.mark.parametrize("share", [0, 1, -0.1, 5])
def test_a_share_is_between_0_and_1(tmp_path: Path, share: float) -> None:
    with pytest.raises(DataError, match=f"data.source.held_out_share is {share}"):
        unlabeled(str(touch(tmp_path, many(10))), share)


def test_splits_with_other_classes_are_refused_with_one_of_them(tmp_path: Path) -> None:
    touch(labeled_root(tmp_path), ["val/dog/1.jpg"])
    with pytest.raises(DataError, match=r"\btrain\b.*\bval\b.*\b1 class\b.*\bdog\b"):
        unlabeled(str(tmp_path))


@pytest.mark.parametrize("missing", ["train", "val"])
def test_class_folders_names_the_layout_it_needs(tmp_path: Path, missing: str) -> None:
    shutil.rmtree(labeled_root(tmp_path) / missing)
    with pytest.raises(DataError, match=f"{missing} .*in1k .*/train/CLASS/.*/val/CLASS/"):
        class_folders(name="in1k", root=str(tmp_path), train="train", val="val")


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, ["train/a/1.jpg", "val/a/notes.txt"])
    with pytest.raises(DataError, match=r"val .*no images \(\.jpg"):
        class_folders(name="in1k", root=str(tmp_path), train="train", val="val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder_is_named(tmp_path: Path, split: str) -> None:
    for removed in (labeled_root(tmp_path) / split / "a").iterdir():
        removed.unlink()
    message = rf"{split}: 1 of 2 class folders .*\(a\)"
    with pytest.raises(DataError, match=message):
        unlabeled(str(tmp_path))
    with pytest.raises(DataError, match=message):
        class_folders(name="in1k", root=str(tmp_path), train="train", val="val")
    for number in range(7):
        for each in ("train", "val"):
            (tmp_path / each / f"empty{number}").mkdir()
    (tmp_path / split / "a" / "back.jpg").touch()
    with pytest.raises(DataError, match=r"7 of 9 .* \(empty0, empty1, empty2, empty3, empty4, …\)"):
        unlabeled(str(tmp_path))


def test_what_a_folder_is_to_hold_and_where_to_get_it_is_told(tmp_path: Path) -> None:
    settings = {
        "name": "in1k",
        "train": "train",
        "val": "val",
        "holding": "ImageNet, from its site",
    }
    with pytest.raises(DataError, match=r"data\.root is not set.*ImageNet, from its site"):
        class_folders(root=None, **settings)
    with pytest.raises(DataError, match=f"{tmp_path / 'gone'} .*ImageNet, from its site"):
        class_folders(root=str(tmp_path / "gone"), **settings)
    with pytest.raises(
        DataError,
        match=r"train .* data\.root .*ImageNet, from its site",
    ):
        class_folders(root=str(tmp_path), **settings)


def test_another_count_than_the_published_is_a_warning(tmp_path: Path) -> None:
    labeled_root(tmp_path)
    settings = {"name": "in1k", "root": str(tmp_path), "train": "train", "val": "val"}
    with pytest.warns(UserWarning, match="the published set") as caught:
        class_folders(**settings, published_images={"train": 1281167, "val": 2})
    (warning,) = caught
    assert re.search(r"\bin1k train\b.*\b4 images.*\b1281167\b", str(warning.message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        class_folders(**settings, published_images={"train": 4, "val": 2})


def digests(root: str | list[str]) -> tuple[str, str]:
    splits = unlabeled(root)
    return splits.train.digest(), splits.held_out.digest()


def test_the_digest_stays_when_the_folder_moves_and_changes_with_a_file(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "far" / "there"
    first = digests(str(touch(here, many(50))))
    shutil.move(here, there)
    assert digests(str(there)) == first
    touch(there, ["0/new.jpg"])
    train, held_out = digests(str(there))
    assert (train != first[0]) + (held_out != first[1]) == 1


def test_the_digest_is_the_same_from_a_relative_path_and_for_mixed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "one", many(40))
    touch(tmp_path / "two", many(40))
    monkeypatch.chdir(tmp_path)
    absolute = digests([str(tmp_path / "one"), str(tmp_path / "two")])
    assert digests(["one", "two"]) == absolute
    assert digests(["one", str(tmp_path / "two")]) == absolute


def test_the_digest_tells_names_and_labels_apart_even_of_one_image_or_one_class(
    tmp_path: Path,
) -> None:
    found = []
    for number, (class_name, image) in enumerate(
        [("cat", "1.jpg"), ("cat", "2.jpg"), ("dog", "1.jpg")]
    ):
        root = touch(
            tmp_path / str(number), [f"train/{class_name}/{image}", f"val/{class_name}/{image}"]
        )
        found.append(unlabeled(str(root)).train.digest())
    assert len(set(found)) == 3


def test_unlabeled_splits_are_not_labeled_together_with_labeled_ones(tmp_path: Path) -> None:
    with_labels = unlabeled(str(labeled_root(tmp_path / "labeled")))
    without = unlabeled(str(touch(tmp_path / "unlabeled", many(50))))
    assert not Splits(train=with_labels.train, held_out=without.held_out).labeled
    touch(tmp_path / "other", ["train/x/1.jpg", "val/x/1.jpg"])
    other = unlabeled(str(tmp_path / "other"))
    assert not Splits(train=with_labels.train, held_out=other.held_out).labeled
