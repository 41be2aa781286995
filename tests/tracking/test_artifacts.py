import json
import os
from pathlib import Path

import pytest

from relloc.tracking import add_artifact, list_artifacts_to_send
from relloc.tracking.artifacts import sort_artifacts


def test_added_files_are_listed_once_in_order_while_they_exist(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("b.txt", "pictures/a.png", "b.txt"):
        (tmp_path / name).write_text(name)
        add_artifact(tmp_path, name)
    assert list_artifacts_to_send(tmp_path) == ["b.txt", "pictures/a.png"]
    (tmp_path / "b.txt").unlink()
    assert list_artifacts_to_send(tmp_path) == ["pictures/a.png"]


def test_only_files_of_the_folder_can_be_added(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="lies outside"):
        add_artifact(run_dir, "../secret.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        add_artifact(run_dir, "none.txt")
    assert list_artifacts_to_send(run_dir) == []


def test_only_files_of_the_folder_are_sent_whatever_the_list_says(tmp_path: Path) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    (run_dir / "pictures").mkdir(parents=True)
    outside.mkdir()
    for file in (run_dir / "a.txt", run_dir / "pictures" / "b.png", outside / "key"):
        file.write_text("x")
    (run_dir / "link").symlink_to(outside / "key")
    (run_dir / "folder").symlink_to(outside)
    (run_dir / "inner").symlink_to(run_dir / "a.txt")
    (run_dir / "loop").symlink_to(run_dir / "loop")
    os.mkfifo(run_dir / "pipe")
    hostile = [
        "../outside/key",
        "pictures/../../outside/key",
        str(outside / "key"),
        "link",
        "folder/key",
    ]
    nothing = ["loop", "pipe", "pictures", "", "none.txt", "n" * 5000, "a.txt/b"]
    good = ["pictures/../a.txt", str(run_dir / "pictures" / "b.png"), "inner", "a.txt"]
    (run_dir / "artifacts.json").write_text(json.dumps([*hostile, *nothing, *good]))
    names, refused = sort_artifacts(run_dir)
    assert names == ["a.txt", "pictures/b.png", "inner"]
    assert len(refused) == len(hostile)
    assert all(repr(name) in line for name, line in zip(hostile, refused, strict=True))


def test_a_run_folder_behind_a_link_has_its_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "a.txt").write_text("x")
    add_artifact(tmp_path / "link", "a.txt")
    assert list_artifacts_to_send(tmp_path / "link") == ["a.txt"]
