import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from relloc.tracking import add_artifact, open_store, sync

NewRun = Callable[..., Path]


@pytest.fixture
def make_run(new_run: NewRun) -> NewRun:
    """Makes a run folder with a file to send."""

    def make(name: str) -> Path:
        run_dir = new_run(name)
        (run_dir / "notes.txt").write_text(name)
        add_artifact(run_dir, "notes.txt")
        return run_dir

    return make


def files(folder: Path) -> list[str]:
    return sorted(file.read_text() for file in folder.rglob("notes.txt"))


def copy_folder(uri: str, run_id: str) -> Path:
    return Path(unquote(urlsplit(open_store(uri).get_run(run_id).info.artifact_uri).path))


@pytest.fixture
def store(empty_database: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "my store"
    folder.mkdir()
    return Path(shutil.copy(empty_database, folder / "mlflow.db"))


def test_files_go_beside_a_store_that_was_moved_and_earlier_ones_are_found(
    store: Path, make_run: NewRun, tmp_path: Path
) -> None:
    first = sync(make_run("first"), f"sqlite:///{store}")
    moved = tmp_path / "moved"
    shutil.move(store.parent, moved)
    uri = f"sqlite:///{moved}/mlflow.db"
    second = sync(make_run("second"), uri)
    assert second.experiment_id == first.experiment_id
    assert files(moved) == ["first", "second"]
    assert not store.parent.exists()
    for run in (first, second):
        assert copy_folder(uri, run.run_id).is_relative_to(moved)
        assert (copy_folder(uri, run.run_id) / "notes.txt").exists()


@pytest.mark.slow
def test_a_run_goes_on_in_a_store_that_was_moved(
    store: Path, make_run: NewRun, tmp_path: Path
) -> None:
    run_dir = make_run("run")
    sync(run_dir, f"sqlite:///{store}")
    moved = tmp_path / "moved"
    shutil.move(store.parent, moved)
    (run_dir / "notes.txt").write_text("changed")
    # In another process: MLflow's client remembers for good where the files of a run go.
    command = [
        sys.executable,
        "-m",
        "relloc.sync",
        str(run_dir),
        "--uri",
        f"sqlite:///{moved}/mlflow.db",
    ]
    subprocess.run(command, check=True, timeout=120)
    assert files(moved) == ["changed"]
    assert not store.parent.exists()


def test_of_a_copied_database_new_files_go_beside_it_and_old_ones_stay(
    store: Path, make_run: NewRun, tmp_path: Path
) -> None:
    first = sync(make_run("first"), f"sqlite:///{store}")
    copied = tmp_path / "copied"
    copied.mkdir()
    uri = f"sqlite:///{shutil.copy(store, copied)}"
    sync(make_run("second"), uri)
    assert files(copied) == ["second"]
    assert (copy_folder(uri, first.run_id) / "notes.txt").read_text() == "first"
    sync(make_run("third"), f"sqlite:///{store}")
    assert files(store.parent) == ["first", "third"]


def test_a_store_behind_a_link_was_not_moved(store: Path, make_run: NewRun, tmp_path: Path) -> None:
    first = sync(make_run("first"), f"sqlite:///{store}")
    os.symlink(store.parent, tmp_path / "link")
    uri = f"sqlite:///{tmp_path}/link/mlflow.db"
    sync(make_run("second"), uri)
    assert copy_folder(uri, first.run_id).is_relative_to(store.parent)
    assert files(store.parent) == ["first", "second"]


def test_files_that_somebody_keeps_elsewhere_stay_there(
    store: Path, make_run: NewRun, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "large disk"
    open_store(f"sqlite:///{store}").create_experiment("relloc", elsewhere.as_uri())
    moved = tmp_path / "moved"
    shutil.move(store.parent, moved)
    sync(make_run("run"), f"sqlite:///{moved}/mlflow.db")
    assert files(elsewhere) == ["run"]
