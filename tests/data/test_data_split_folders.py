from collections.abc import Sequence
from pathlib import Path

import pytest

from relloc.data.folder import folder
from relloc.data.image_set import Splits
from relloc.errors import DataError


def touch(root: Path, folders: Sequence[str], each: int = 6) -> Path:
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            (root / name / f"{number}.jpg").touch()
    return root


def found_in(root: Path, **settings: object) -> Splits:
    return folder(name="mine", root=str(root), held_out_share=0.5, **settings)


@pytest.mark.parametrize(
    "folders",
    [
        ("train/a", "test/a"),
        ("train/a", "val"),
        ("train", "val"),
        ("train/a", "valid/a"),
        ("train", "validation", "test"),
        ("Training set/a", "Test set/a"),
        ("Train/a", "Val/a"),
        ("train2017", "val2017"),
        ("seg_train/a", "seg_test/a"),
        ("ILSVRC2012_img_train/a", "ILSVRC2012_img_val"),
        ("ILSVRC/Data/CLS-LOC/train/a", "ILSVRC/Data/CLS-LOC/val/a"),
        ("val/a", "test/a"),
        ("train", "dev"),
        ("train", "eval"),
        ("train", "test1"),
        ("trainval/a", "test/a"),
        ("train_val", "test"),
        ("trainA", "testA"),
        ("TrainImages", "TestImages"),
        ("traindata/a", "testdata/a"),
        ("1_train", "2_test"),
        ("train_10", "test_20"),
        ("tr", "val"),
        ("unlabeled", "test"),
        ("fold1/a", "fold2/a"),
        ("split_0", "split_1"),
    ],
)
def test_several_splits_are_no_set_without_labels(tmp_path: Path, folders: Sequence[str]) -> None:
    root = touch(tmp_path, folders)
    with pytest.raises(DataError, match="several splits") as caught:
        found_in(root)
    message = str(caught.value)
    assert all(part in message for name in folders for part in name.split("/")[-2:-1])
    assert "data.source.pool_splits=true" in message
    pooled = found_in(root, pool_splits=True)
    assert len(pooled.train) + len(pooled.held_out) == 6 * len(folders)


@pytest.mark.parametrize(
    "folders",
    [
        ("train/a", "train/b"),
        ("test",),
        ("train", "plane", "automobile"),  # classes
        ("restrain", "reval", "contest"),
        ("bullet train", "test tube"),
        ("train", "unrelated"),
        ("train_1", "train_2"),
        ("train", "unlabeled"),
        ("manifold1", "fold"),
    ],
)
def test_other_folders_are_one_set_and_told_with_their_images(
    tmp_path: Path, folders: Sequence[str]
) -> None:
    splits = found_in(touch(tmp_path, folders))
    assert len(splits.train) + len(splits.held_out) == 6 * len(folders)
    assert splits.remarks[0].startswith(f"{tmp_path}: {6 * len(folders)} images without labels")
    for name in {name.split("/")[0] for name in folders}:
        assert (
            f"{name} {6 * sum(other.split('/')[0] == name for other in folders)}"
            in splits.remarks[0]
        )


def test_a_split_without_images_is_told_and_refuses_nothing(tmp_path: Path) -> None:
    root = touch(tmp_path, ["train/a"])
    (root / "val").mkdir()
    assert "none in val" in found_in(root).remarks[0]


def test_the_way_out_is_named_and_leads_out(tmp_path: Path) -> None:
    root = touch(tmp_path / "classes", ["train/a", "train/b", "test/a", "test/b"])
    with pytest.raises(
        DataError, match=r"data\.source\.train=train data\.source\.val=test"
    ) as caught:
        found_in(root)
    assert f"data.root={root / 'train'} takes train alone" in str(caught.value)
    splits = found_in(root, val="test")
    assert (splits.labeled, splits.held_out.split, len(splits.held_out)) == (True, "test", 12)
    assert len(found_in(root / "train").train) > 0
    flat = touch(tmp_path / "flat", ["train/a", "train/b", "val"])
    with pytest.raises(DataError, match=r"\bval has no class folders") as caught:
        found_in(flat)
    assert "data.source.val=" not in str(caught.value)
    deep = touch(tmp_path / "deep", ["x/train/a", "x/val/a"])
    with pytest.raises(
        DataError, match=rf"data\.root={deep / 'x'} data\.source\.train=train data\.source\.val=val"
    ):
        found_in(deep)


def test_named_splits_have_to_be_there(tmp_path: Path) -> None:
    root = touch(tmp_path, ["train/a", "val/a"])
    with pytest.raises(DataError, match=r"\btest has no class folders"):
        found_in(root, val="test")
    with pytest.raises(DataError, match=r"data\.source\.train .*data\.source\.val .*\bval\b"):
        found_in(root, train="val")
    with pytest.raises(DataError, match=r"data\.source\.pool_splits=true"):
        found_in(root, val="test", pool_splits=True)
    with pytest.raises(DataError, match="several roots"):
        folder(
            name="mine",
            root=[str(root / "train"), str(root / "val")],
            held_out_share=0.5,
            val="test",
        )


def test_roots_that_are_splits_are_pooled_as_they_were_named(tmp_path: Path) -> None:
    root = touch(tmp_path, ["train/a", "test/a"])
    pooled = folder(name="mine", root=[str(root / "train"), str(root / "test")], held_out_share=0.5)
    assert len(pooled.train) + len(pooled.held_out) == 12
    assert len(pooled.remarks) == 2


def test_a_folder_of_all_images_is_no_class(tmp_path: Path) -> None:
    root = touch(tmp_path, ["train/images", "val/images"])
    with pytest.raises(
        DataError,
        match=rf"\bimages\b.* data\.root={root / 'train'} ",
    ):
        found_in(root)
