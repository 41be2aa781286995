import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relloc.sync import main
from relloc.tracking import search

NewRun = Callable[..., Path]


def test_each_run_gets_one_line_with_counts(uri: str, new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = new_run("first", tracking_uri=uri), new_run("second", tracking_uri=uri)
    assert main([str(first), str(second)]) == 0
    counts = "4 params, 6 points, 0 artifacts"
    assert capsys.readouterr() == (f"{first}: {counts} -> {uri}\n{second}: {counts} -> {uri}\n", "")
    assert main([str(first)]) == 0
    assert capsys.readouterr().out == f"{first}: nothing new -> {uri}\n"
    assert {run["name"] for run in search(uri, "relloc")} == {"first", "second"}


def test_a_wrong_folder_is_told_and_the_others_are_sent(
    uri: str, new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty, nameless = new_run("good"), tmp_path / "empty", tmp_path / "none"
    empty.mkdir()
    assert main([str(empty), str(nameless), str(good), "--uri", uri]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: 4 params")
    assert err.splitlines() == [
        f"{empty}: not a run folder: {empty}/run.json is missing",
        f"{nameless}: not a run folder: {nameless}/run.json is missing",
    ]


def test_a_dead_server_is_one_message(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = new_run(tracking_uri="http://127.0.0.1:9")
    assert main([str(run_dir)]) == 1
    assert capsys.readouterr().err == f"{run_dir}: no answer from http://127.0.0.1:9 (ConnectionError)\n"


def test_a_run_that_names_no_store_asks_for_one(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = new_run()
    assert main([str(run_dir)]) == 1
    assert capsys.readouterr().err == f"{run_dir}: run.json names no store: give one with --uri\n"
    assert main([str(run_dir), "--uri", "sqlite:///"]) == 1
    assert "names no file" in capsys.readouterr().err


def test_two_processes_start_on_a_fresh_file_and_both_arrive_whole(new_run: NewRun, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/deep/er/mlflow.db"
    runs = [new_run("first"), new_run("second")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "relloc.sync", str(run_dir), "--uri", uri],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for run_dir in runs
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    lines = [f"{run_dir}: 4 params, 6 points, 0 artifacts -> {uri}\n" for run_dir in runs]
    assert said == lines, "and nothing else is printed: no migrations, no tracebacks"
    assert [process.returncode for process in processes] == [0, 0]
    found = {run["name"]: run for run in search(uri, "relloc")}
    assert {name: run["metrics"]["train/loss"] for name, run in found.items()} == {
        "first": 2.0,
        "second": 2.0,
    }
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == ["mlflow.db", "mlflow.db.lock"]


def test_a_run_folder_may_move(uri: str, new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = new_run(tracking_uri=uri)
    main([str(run_dir)])
    shutil.move(run_dir, tmp_path / "moved")
    assert main([str(tmp_path / "moved")]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert len(search(uri, "relloc")) == 1
