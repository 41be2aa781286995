import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from relloc.data.folder import folder
from relloc.data.image_set import Splits
from relloc.data.listing import PassedOver, class_folders_of, describe_passed_over, images_below
from relloc.errors import DataError


def image(path: Path, kind: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
        path, kind
    )
    return path


def listed(root: Path) -> tuple[list[str], PassedOver]:
    passed_over = PassedOver()
    paths = list(images_below(root, passed_over))
    return [os.path.relpath(path, root) for path in paths], passed_over


def labeled(root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            image(root / split / name / f"{split}{name}.jpg")
    return root


def found_in(root: Path) -> Splits:
    return folder(name="mine", root=str(root), held_out_share=0.5)


def test_images_of_all_suffixes_and_of_none_are_taken(tmp_path: Path) -> None:
    kinds = {
        "a.jfif": "JPEG",
        "b.JPE": "JPEG",
        "c": "JPEG",
        "d": "PNG",
        "e": "WEBP",
        "f": "TIFF",
        "g": "GIF",
        "h.pgm": "PPM",
    }
    if features.check("avif"):
        kinds |= {"i.avif": "AVIF", "j": "AVIF"}
    for name, kind in kinds.items():
        image(tmp_path / name, kind)
    assert listed(tmp_path) == (sorted(kinds), PassedOver())


def test_what_is_no_image_is_counted_by_its_suffix(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    for name in (
        "b.heic",
        "1/c.HEIC",
        "README",
        "d.CR2",
        "e.a-suffix-too-long-to-tell",
        "Thumbs.db",
        ".DS_Store",
        "._a.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    names, passed_over = listed(tmp_path)
    assert names == ["a.jpg"]
    assert passed_over == {".heic": 2, ".cr2": 1, "without a suffix": 1, "with longer suffixes": 1}
    for words in ("2 .heic", "1 .cr2", "1 without a suffix", "1 with longer suffixes", "convert"):
        assert words in describe_passed_over(passed_over)
    assert describe_passed_over(PassedOver()) == ""
    many = PassedOver({f".{number}": 20 - number for number in range(10)})
    assert describe_passed_over(many).endswith(", 13 .7 and 23 others")


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"],
)
def test_folders_of_programs_hold_no_images(tmp_path: Path, name: str) -> None:
    image(tmp_path / "1" / "a.jpg")
    image(tmp_path / "1" / name / "a.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    assert listed(tmp_path) == (["1/a.jpg"], PassedOver({f"folders {name}": 1}))


def test_folders_of_programs_are_no_classes(tmp_path: Path) -> None:
    root = labeled(tmp_path)
    image(root / "train" / "@eaDir" / "x.jpg")
    image(root / "val" / ".ipynb_checkpoints" / "x.jpg")
    splits = found_in(root)
    assert (splits.labeled, splits.train.classes, len(splits.train), len(splits.held_out)) == (
        True,
        ("a", "b"),
        2,
        2,
    )
    assert any("1 folders @eaDir" in remark for remark in splits.remarks)


@pytest.mark.parametrize("name", ["lost+found", "__MACOSX"])
def test_what_unpacking_left_among_classes_is_refused(tmp_path: Path, name: str) -> None:
    root = labeled(tmp_path)
    for split in ("train", "val"):
        (root / split / name).mkdir()
    with pytest.raises(DataError, match=rf"{re.escape(name)} is no class\b"):
        found_in(root)
    assert class_folders_of(root / "train" / name) == ()


def test_images_beside_the_classes_are_counted(tmp_path: Path) -> None:
    root = labeled(tmp_path)
    image(root / "train" / "stray.jpg")
    (root / "test").mkdir()
    remarks = " ".join(found_in(root).remarks)
    assert re.search(r"train: 2 images .*\b2 classes.* val: 2 images .*\b2 classes", remarks)
    assert re.search(r"not used.* test\b", remarks)
    assert re.search(r"\b1 images? .*class folder", remarks)


def test_a_link_to_a_folder_above_brings_no_image_of_another_split_or_class(tmp_path: Path) -> None:
    root = labeled(tmp_path)
    for target in ("../../..", "..", "."):
        (root / "train" / "a" / f"up{target.count('/')}{len(target)}").symlink_to(target)
    splits = found_in(root)
    assert [
        os.path.basename(path) for path in (splits.train.source(0), splits.train.source(1))
    ] == [
        "traina.jpg",
        "trainb.jpg",
    ]
    assert len(splits.train) == 2
    assert any("3 links" in remark for remark in splits.remarks)


def test_links_to_themselves_end_nothing(tmp_path: Path) -> None:
    root = labeled(tmp_path)
    (root / "train" / "loop").symlink_to("loop")
    (root / "train" / "a" / "loop.jpg").symlink_to("loop.jpg")
    (root / "train" / "a" / "loop").symlink_to("loop")
    splits = found_in(root)
    assert splits.train.classes == ("a", "b")
    assert len(splits.train) == 3  # one of them is told as unreadable when it is read


def test_pipes_are_passed_over_and_not_waited_for(tmp_path: Path) -> None:
    root = labeled(tmp_path)
    os.mkfifo(root / "train" / "a" / "pipe.jpg")
    os.mkfifo(root / "train" / "a" / "pipe")
    splits = found_in(root)
    assert len(splits.train) == 2
    assert any("1 pipes, sockets or devices" in remark for remark in splits.remarks)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path) -> None:
    image(tmp_path / "1" / "a.jpg")
    (tmp_path / "1").chmod(0)
    try:
        with pytest.raises(DataError, match="1 can't be listed"):
            listed(tmp_path)
    finally:
        (tmp_path / "1").chmod(0o700)
