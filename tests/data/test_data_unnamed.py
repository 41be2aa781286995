"""Data sets that were given no name are called after their folder, and recognized without it."""

import dataclasses
from pathlib import Path

import pytest
from mixed_folder import write_many

from relloc.data.folder import folder
from relloc.data.image_set import Splits
from relloc.data.packing import Packing, pack
from relloc.data.processes import without_progress
from relloc.data.shards import shards
from relloc.data.unnamed import UNNAMED, called_after
from relloc.runs.data_sets import DataSet


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        ("/data/birds/", "birds"),
        (["/data/birds", "/data/cars"], "birds+cars"),
        ("/", UNNAMED),
        ("/data/\udce9t\udce9", r"\xe9t\xe9"),
    ],
)
def test_a_set_is_called_after_its_folders(folders: str | list[str], name: str) -> None:
    assert called_after(folders) == name


def read(root: Path, name: str = UNNAMED, packed: Path | None = None) -> Splits:
    source = {"name": name, "root": str(root), "held_out_share": 0.1}
    return DataSet(
        setting="data",
        name=name,
        shards=str(packed) if packed else None,
        unreadable_share=0.0,
        source=source,
        list_images=lambda: folder(**source),
    ).read()


def names(splits: Splits) -> tuple[str, str, bool]:
    return splits.train.name, splits.held_out.name, splits.is_unnamed


def test_what_is_read_has_the_name_of_its_folder_also_when_packed(tmp_path: Path) -> None:
    root = write_many(tmp_path / "birds", 8, 8)
    splits = read(root)
    assert names(splits) == ("birds", "birds", True)
    assert splits.train.digest() == read(root, "mine").train.digest()
    assert names(read(root, "mine")) == ("mine", "mine", False)
    packing = Packing(short_px=96, quality=95, subsampling="4:4:4", images_per_shard=4)
    pack(splits, tmp_path / "packed", packing, workers=1, progress=without_progress)
    assert names(shards(root=str(tmp_path / "packed"))) == ("birds", "birds", True)
    # What older versions packed is called after the folder of the tars, or as the settings say
    manifest = tmp_path / "packed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"called": "birds"', '"more": "old"'))
    assert names(read(root, packed=tmp_path / "packed")) == ("packed", "packed", True)
    assert names(read(root, "mine", packed=tmp_path / "packed")) == ("mine", "mine", True)


def test_the_field_that_says_so_is_kept_by_changes(tmp_path: Path) -> None:
    splits = read(write_many(tmp_path / "birds", 4, 4))
    assert dataclasses.replace(splits, published_images={"val": 4}).is_unnamed
