"""The folder of a sweep: what may be one, finding it by name, and what a refused command leaves."""

import dataclasses
import os
from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.status import Status
from relloc.sweeps.point_status import PointStatus
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import Sweep, check_folder, check_name, content_of, find_sweep, word_of


def point(tmp_path: Path) -> Point:
    return Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "runs" / "a")


def new_sweep(folder: Path) -> Sweep:
    sweep = Sweep(folder)
    with sweep.locked():
        sweep.add([point(folder)], ["train"])
    return sweep


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        " ",
        ".",
        "..",
        "../evil",
        "a/b",
        "/a",
        "a\\b",
        "a:b",
        "a,b",
        "50%",
        ".lock",
        "-x",
        "a\n",
        "a\x1b",
        " a",
    ],
)
def test_what_is_no_name_of_one_folder_is_refused(name: str | None) -> None:
    with pytest.raises(UsageError, match="^sweep="):
        check_name(name)
    with pytest.raises(UsageError):
        check_name("a" * 201)


@pytest.mark.parametrize("name", ["gaps", "20261128-120000", "é", "a b", "v1.2", "a=1", 5])
def test_other_names_are_taken(name: object) -> None:
    check_name(name)


def test_a_folder_with_files_of_others_is_no_sweep(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    check_folder(tmp_path / "new" / "sweep", runs)
    (tmp_path / "code").mkdir()
    with pytest.raises(UsageError, match=r"hydra\.sweep\.dir="):
        check_folder(tmp_path, runs)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"is a file"):
            check_folder(folder, runs)
    (runs / "sweeps/killed/code").mkdir(parents=True)  # left by a command that was killed
    check_folder(runs / "sweeps/killed", runs)
    check_folder(new_sweep(tmp_path / "elsewhere").folder, runs)


def test_a_sweep_is_not_made_of_the_folder_that_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "empty" / "too"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for folder in (here, here.parent):
        with pytest.raises(UsageError, match=r"hydra\.sweep\.dir="):
            check_folder(folder, tmp_path / "runs")


def test_a_refused_command_removes_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    others = tmp_path / "there" / "code" / "mine.py"
    others.parent.mkdir(parents=True)
    others.touch()
    for folder in (tmp_path / "there", tmp_path / "new" / "sweep"):
        sweep = Sweep(folder, tmp_path / "lock")
        with sweep.locked():
            assert (sweep.copy({"relloc/a.py": b"a"}) / "relloc/a.py").read_bytes() == b"a"
        sweep.leave_nothing()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "lock",
        "there",
        "there/code",
        "there/code/mine.py",
    ]
    kept = new_sweep(tmp_path / "kept")
    kept.copy({"a": b"a"})
    kept.leave_nothing()
    assert (kept.folder / "code/0/a").exists()


def test_a_sweep_is_found_by_name_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELLOC_RUNS", raising=False)
    gaps = new_sweep(tmp_path / "runs/sweeps/gaps").folder
    for word in ("gaps", "sweep=gaps", "runs/sweeps/gaps", "sweep=runs/sweeps/gaps/", str(gaps)):
        assert find_sweep(word).folder == gaps
    assert word_of(gaps) == "gaps"
    elsewhere = new_sweep(tmp_path / "out/b").folder
    assert word_of(elsewhere) == "out/b"
    assert find_sweep("out/b").folder == elsewhere
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path / "none"))
    assert find_sweep(word_of(gaps)).folder == gaps
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path / "runs"))
    for word in ("sweep=", "other", "./other"):
        with pytest.raises(UsageError, match=r"no sweep .*gaps|not the folder"):
            find_sweep(word)
    monkeypatch.chdir(gaps)
    assert find_sweep(".").folder == gaps


def test_of_folders_of_configs_only_what_hydra_reads_is_copied(tmp_path: Path) -> None:
    for name in ("data/mine.yaml", "data/image.jpg", ".git/config.yaml", "top.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path, tmp_path / "data" / "loop")
    os.symlink(tmp_path / "data", tmp_path / "same")
    assert content_of(tmp_path, suffix=".yaml") == {
        "data/mine.yaml": b"data/mine.yaml",
        "same/mine.yaml": b"data/mine.yaml",
        "top.yaml": b"top.yaml",
    }


def test_what_a_cancelled_sweep_began_no_more_is_cancelled(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path / "s")
    point = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "run")
    found = [PointStatus(point=point, status=status) for status in (Status.MISSING, Status.DONE)]
    assert sweep.with_cancelled(found) == found
    sweep.cancel()
    os.utime(sweep.folder / "sweep.json", (1, 1))
    assert [now.status for now in sweep.with_cancelled(found)] == [Status.CANCELLED, Status.DONE]


def test_points_are_found_where_the_folder_of_runs_was_moved(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made = point(tmp_path)
    made.folder.mkdir(parents=True)
    sweep = Sweep(runs / "sweeps" / "gaps")
    with sweep.locked():
        sweep.add([made], [])
    assert sweep.points() == [made]
    moved = tmp_path / "laptop"
    runs.rename(moved)
    [found] = Sweep(moved / "sweeps" / "gaps").points()
    assert found == dataclasses.replace(made, folder=moved / made.folder.name)
    # A point whose folder is nowhere stays where it was said to be.
    (moved / made.folder.name).rmdir()
    assert Sweep(moved / "sweeps" / "gaps").points() == [made]
