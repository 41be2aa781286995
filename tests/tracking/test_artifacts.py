from pathlib import Path

import pytest

from relloc.tracking import add_artifact, list_artifacts_to_send


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
    with pytest.raises(FileNotFoundError, match="is not a file in"):
        add_artifact(run_dir, "none.txt")
    assert list_artifacts_to_send(run_dir) == []
