from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Imagenette

from relloc.data import imagenette as module
from relloc.data.imagenette import imagenette
from relloc.errors import DataError

WNIDS = sorted(Imagenette._WNID_TO_CLASS)


def in_torchvisions_layout(root: Path, folder: str) -> Path:
    for split, n in (("train", 2), ("val", 1)):
        for label, wnid in enumerate(WNIDS):
            (root / folder / split / wnid).mkdir(parents=True)
            for number in range(n):
                color = np.full((8, 8, 3), 20 * label, np.uint8)
                Image.fromarray(color).save(root / folder / split / wnid / f"{wnid}_{number}.JPEG")
    return root


@pytest.mark.parametrize(
    ("size", "folder"),
    [("160px", "imagenette2-160"), ("320px", "imagenette2-320"), ("full", "imagenette2")],
)
@pytest.mark.parametrize("download", [False, True])
def test_what_torchvision_left_on_disk_is_read_and_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Any, folder: str, download: bool
) -> None:
    in_torchvisions_layout(tmp_path, folder)
    monkeypatch.delattr(module, "Imagenette")
    splits = imagenette(root=str(tmp_path), size=size, download=download)
    for images, split in ((splits.train, "train"), (splits.held_out, "val")):
        oracle = Imagenette(tmp_path, split=split, size=size)
        assert images.split == split
        assert images.labels == [label for _, label in oracle._samples]
        assert [images.source(index) for index in range(len(images))] == [
            path for path, _ in oracle._samples
        ]
        assert np.array_equal(images.read(5), oracle[5][0])
    assert splits.labeled
    assert splits.train.classes == tuple(WNIDS)
    assert splits.train.name == "imagenette"


def test_missing_images_say_which_setting_fetches_them(tmp_path: Path) -> None:
    in_torchvisions_layout(tmp_path, "imagenette2-160")
    with pytest.raises(
        DataError, match="imagenette2-320 is missing: set data.source.download=true"
    ):
        imagenette(root=str(tmp_path), size="320px", download=False)


def test_missing_images_are_fetched_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, *, split: str, size: str, download: bool) -> None:
        assert download
        in_torchvisions_layout(Path(root), {"320px": "imagenette2-320"}[size])

    monkeypatch.setattr(module, "Imagenette", fetch)
    splits = imagenette(root=str(tmp_path), size="320px", download=True)
    assert (len(splits.train), len(splits.held_out)) == (20, 10)


@pytest.mark.parametrize(
    "error",
    [
        OSError("Network is unreachable"),
        RuntimeError("File not found or corrupted."),
        TimeoutError("too slow"),
    ],
)
def test_a_failed_download_is_a_data_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(module, "Imagenette", fail)
    with pytest.raises(DataError, match=f"Imagenette .*{tmp_path}: {error}"):
        imagenette(root=str(tmp_path), size="160px", download=True)


def test_a_download_that_left_half_of_the_folders_is_told(tmp_path: Path) -> None:
    (tmp_path / "imagenette2-160" / "train" / WNIDS[0]).mkdir(parents=True)
    with pytest.raises(DataError, match=r"\bval .*class folders"):
        imagenette(root=str(tmp_path), size="160px", download=True)


@pytest.mark.parametrize("root", [None, ""])
def test_an_unset_root_says_how_to_set_it(root: str | None) -> None:
    with pytest.raises(DataError, match="data.root is not set: give data.root=FOLDER"):
        imagenette(root=root, size="160px", download=True)
