import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from mixed_folder import jpeg, picture, write_many
from PIL import Image

from relloc.data.check import Check, check
from relloc.data.folder import folder
from relloc.data.photos import photos


@contextlib.contextmanager
def unseen(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    yield lambda now, text: None


def checked(root: Path, published: Mapping[str, int] | None = None, workers: int = 2) -> Check:
    data = folder(name="mine", root=str(root), held_out_share=0.5)
    data = dataclasses.replace(data, published_images=published or {})
    return check(data, workers=workers, progress=unseen)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write_many(tmp_path / "clean", 7, 3)


def test_in_a_clean_set_nothing_is_found(clean: Path) -> None:
    found = checked(clean, {"train": 7, "val": 3})
    assert found.findings() == []
    assert (found.name, found.train.split, found.held_out.split) == ("mine", "train", "val")
    assert (found.train.images, found.train.published, found.train.class_images) == (7, 7, (3, 4))
    assert found.train.short_px == (96, 96, 96)
    assert found.leaked.n == found.train.repeated.n == 0


def test_hashes_of_originals_are_of_their_bytes(clean: Path) -> None:
    sample = checked(clean).train.sha256
    assert len(sample) == 7
    for name, sha in sample.items():
        assert hashlib.sha256((clean / "train" / name).read_bytes()).hexdigest() == sha


def test_of_many_originals_a_few_are_hashed(tmp_path: Path) -> None:
    sample = checked(write_many(tmp_path, 50, 2, height=70, width=70)).train.sha256
    assert 10 <= len(sample) <= 16
    assert {name[0] for name in sample} == {"a", "b"}


def test_other_counts_than_published_are_told(clean: Path) -> None:
    (finding,) = checked(clean, {"train": 8, "val": 3}).findings()
    assert re.search(r"\btrain\b.*\b7 images\b.*\b8\b", finding)


def test_the_same_file_twice_is_told_within_a_split_and_across_as_a_leak(clean: Path) -> None:
    twice = (clean / "train/a/0000.jpg").read_bytes()
    (clean / "train/b/copy.jpg").write_bytes(twice)
    (clean / "train/b/third.jpg").write_bytes(twice)
    (clean / "val/a/seen.jpg").write_bytes(twice)
    (clean / "val/b/too.jpg").write_bytes((clean / "train/b/0003.jpg").read_bytes())
    found = checked(clean)
    assert (found.train.repeated.n, found.held_out.repeated.n) == (2, 0)
    assert found.train.repeated.examples == ("b/copy.jpg = a/0000.jpg", "b/third.jpg = a/0000.jpg")
    assert found.leaked.n == 2
    assert found.leaked.examples == ("a/seen.jpg = a/0000.jpg", "b/too.jpg = b/0003.jpg")
    first, *_ = found.findings()
    assert re.search(r"^LEAK: 2 images .*\bval\b.*\btrain\b", first)


def test_sizes_colors_and_broken_files_are_told(clean: Path) -> None:
    picture(63, 90).save(clean / "train/a/s63.png")
    picture(64, 320).save(clean / "train/a/s64.png")
    picture(64, 321).save(clean / "train/a/wide.png")
    picture(400, 70).save(clean / "train/b/tall.png")
    Image.new("RGB", (80, 80), (9, 200, 3)).save(clean / "train/b/green.png")
    (clean / "val/b/cut.jpg").write_bytes(jpeg(picture(90, 90))[:700])
    (clean / "val/b/empty.jpg").touch()
    (clean / "val/b/void.jpg").touch()
    found = checked(clean)
    assert found.train.small.examples == ("a/s63.png",)
    assert found.train.long.examples == ("a/wide.png", "b/tall.png")
    assert found.train.single_color.examples == ("b/green.png",)
    assert found.train.short_px == (63, 96, 96)
    assert set(found.held_out.unreadable) == {"b/cut.jpg", "b/empty.jpg", "b/void.jpg"}
    assert found.held_out.unreadable["b/empty.jpg"] == "is an empty file"
    assert found.held_out.repeated.n == 0  # two empty files are not one image twice
    findings = "\n".join(found.findings())
    assert re.search(r"^train: 1 image .* 64 px \(a/s63\.png\)", findings, re.MULTILINE)
    assert re.search(r"^val: 3 images .*read", findings, re.MULTILINE)


def test_many_are_counted_and_the_first_named(clean: Path) -> None:
    for number in range(9):
        Image.new("RGB", (80, 80), (number, 0, 0)).save(clean / f"train/b/z{number}.png")
    found = checked(clean).train.single_color
    assert (found.n, len(found.examples)) == (9, 5)


def test_it_survives_json_and_does_not_depend_on_processes(clean: Path) -> None:
    (clean / "val/b/empty.jpg").touch()
    found = checked(clean, {"train": 7}, workers=1)
    assert Check.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert checked(clean, {"train": 7}, workers=3) == found


def test_images_in_memory_and_unlabeled_ones_are_checked(tmp_path: Path) -> None:
    found = check(photos(tiles=[0.4], stride=1.0), workers=1, progress=unseen)
    assert found.findings() == []
    unlabeled = checked(write_many(tmp_path, 12, 1) / "train")
    assert unlabeled.train.images + unlabeled.held_out.images == 12
    assert unlabeled.train.class_images is None
