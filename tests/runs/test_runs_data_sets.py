"""A data set by its settings."""

import re
from pathlib import Path
from typing import Any

import pytest

from relloc.data.image_set import Splits
from relloc.data.packing import Packing, pack
from relloc.data.photos import photos
from relloc.data.processes import without_progress
from relloc.errors import DataError, UsageError
from relloc.runs.data_sets import DataSet


def data_set(**changes: Any) -> DataSet:
    settings = {
        "setting": "data",
        "name": "folder",
        "shards": None,
        "unreadable_share": 0.0,
        "source": {"root": "/data/birds"},
        "list_images": lambda: photos(tiles=[0.4], stride=0.5),
    }
    return DataSet(**{**settings, **changes})


def test_a_wrong_share_is_told_by_its_setting() -> None:
    with pytest.raises(UsageError, match=r"eval\.knn\.data\.unreadable_share is 2"):
        data_set(setting="eval.knn.data", unreadable_share=2)


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, "birds"),
        ({"source": {"root": ["/data/birds", "/data/cars"]}}, "birds+cars"),
        ({"shards": "/packed/boats"}, "boats"),
        ({"name": "in1k"}, "in1k"),
        ({"source": {}}, "folder"),
    ],
)
def test_it_is_called_by_its_folder_where_all_are_called_alike(
    changes: dict[str, Any], short: str
) -> None:
    assert data_set(**changes).short_name == short


def test_the_same_images_are_the_same_whoever_names_them() -> None:
    assert data_set().images == data_set(setting="eval.knn.data", unreadable_share=1).images
    assert data_set().images != data_set(source={"root": "/data/cars"}).images
    assert data_set().images != data_set(shards="/packed").images


def test_folders_are_looked_for_unless_jobs_make_them(tmp_path: Path) -> None:
    data_set(source={"root": str(tmp_path)}).check_folders([])
    data_set(source={"root": "/local/set"}).check_folders(["cp -r SET /local/set"])
    data_set(source={"root": "/local/set", "download": True}).check_folders([])
    data_set(source={}).check_folders([])
    with pytest.raises(UsageError, match=r"data\.root=/local/set .*folder"):
        data_set(source={"root": "/local/set"}).check_folders(["module load cuda"])
    with pytest.raises(UsageError, match=r"data\.root is not set"):
        data_set(source={"root": None, "download": True}).check_folders([])
    with pytest.raises(UsageError, match=r"data\.shards=/local/set .*folder"):
        data_set(shards="/local/set").check_folders([])


def test_reading_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = data_set().read()
    output = capsys.readouterr().out
    counts = rf"\b{len(found.train)} images .*train.*\b{len(found.held_out)} held out"
    assert re.search(counts, output)


def test_what_is_wrong_with_images_is_told_by_the_setting() -> None:
    def failing() -> Splits:
        raise DataError("data.root=/x holds no images")

    with pytest.raises(DataError, match=r"^eval\.knn\.data\.root=/x holds no images$"):
        data_set(setting="eval.knn.data", list_images=failing).read()


def test_the_variable_that_named_a_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Splits:
        raise DataError("data.root=/nowhere is not a folder")

    monkeypatch.setenv("RELLOC_IN1K", "/nowhere")
    data = data_set(
        setting="eval.knn.data", name="in1k", source={"root": "/nowhere"}, list_images=failing
    )
    with pytest.raises(DataError, match=r"^eval\.knn\.data\.root=/nowhere .*RELLOC_IN1K"):
        data.read()


def test_packed_images_that_are_not_the_published_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packing = Packing(short_px=32, quality=90, subsampling="4:2:0", images_per_shard=500)
    photographs = photos(tiles=[0.4], stride=0.5)
    pack(
        photographs,
        tmp_path / "packed",
        packing,
        workers=1,
        progress=without_progress,
    )
    source = {"root": None, "published_images": {"train": 1281167, "val": 50000}}
    data = data_set(
        setting="eval.knn.data", name="in1k", shards=str(tmp_path / "packed"), source=source
    )
    with pytest.warns(UserWarning, match="photos") as warned:
        data.read()
    told = [str(one.message) for one in warned]
    assert any("photos" in one and "in1k" in one for one in told)
    assert any("1281167" in one for one in told)
    assert f"eval.knn.data.shards={tmp_path / 'packed'}" in capsys.readouterr().out
