import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relloc.sync import main
from relloc.tracking import search

NewRun = Callable[..., Path]


def test_each_run_gets_one_line_with_counts(
    uri: str, new_run: NewRun, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = new_run("first", tracking_uri=uri), new_run("second", tracking_uri=uri)
    assert main([str(first), str(second)]) == 0
    counts = "4 params, 6 points, 0 artifacts"
    output = capsys.readouterr()
    assert output.out.splitlines()[:-1] == [
        f"{first}: {counts} -> {uri}",
        f"{second}: {counts} -> {uri}",
    ]
    assert output.out.splitlines()[-1].startswith("next: ")
    assert uri in output.out.splitlines()[-1]
    assert output.err == ""
    assert main([str(first)]) == 0
    assert capsys.readouterr().out.startswith(f"{first}: nothing new -> {uri}\n")
    assert {run["name"] for run in search(uri, "relloc")} == {"first", "second"}


def test_a_wrong_folder_is_told_and_the_others_are_sent(
    uri: str, new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty, nameless = new_run("good"), tmp_path / "empty", tmp_path / "none"
    empty.mkdir()
    assert main([str(empty), str(nameless), str(good), "--uri", uri]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: 4 params")
    lines = err.splitlines()
    assert len(lines) == 2
    for line, folder in zip(lines, (empty, nameless), strict=True):
        assert line.startswith(f"{folder}: ")
        assert "run folder" in line
        assert f"{folder}/run.json is missing" in line


def test_a_folder_of_run_folders_stands_for_them(
    uri: str, new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    (runs / "sweeps").mkdir(parents=True)
    for name in ("b", "a"):
        new_run(name, tracking_uri=uri).rename(runs / name)
    assert main([str(runs), str(runs / "a")]) == 0
    out, err = capsys.readouterr()
    sent = [line.partition(":")[0] for line in out.splitlines()[:-1]]
    assert sent == [str(runs / "a"), str(runs / "b")]
    assert err == ""


def test_a_dead_server_is_one_message(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = new_run(tracking_uri="http://127.0.0.1:9")
    assert main([str(run_dir)]) == 1
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{run_dir}: no answer from http://127.0.0.1:9 (ConnectionError). ")
    assert "repeat this command" in message
    assert "--uri" in message


def test_a_run_that_names_no_store_asks_for_one(
    new_run: NewRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = new_run()
    assert main([str(run_dir)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"{run_dir}: run.json names no ")
    assert message.endswith("--uri\n")
    for wrong in (["--uri", "sqlite:///"], ["--uri", "127.0.0.1:5000"], ["--experiment", " "]):
        assert main([str(run_dir), *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_is_sent_to_the_experiment_that_is_named(
    uri: str, new_run: NewRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = new_run(tracking_uri=uri)
    assert main([str(run_dir)]) == 0
    assert main([str(run_dir), "--experiment", "other"]) == 0
    assert main([str(run_dir), "--experiment", "other"]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert len(search(uri, "relloc")) == len(search(uri, "other")) == 1


def test_a_name_of_a_file_outside_is_told_and_the_rest_is_sent(
    uri: str, new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = new_run(tracking_uri=uri)
    (tmp_path / "key").write_text("secret")
    (run_dir / "artifacts.json").write_text('["../key"]')
    assert main([str(run_dir)]) == 0
    out, err = capsys.readouterr()
    assert "6 points, 0 artifacts" in out
    assert "'../key' was not sent" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_fresh_process_on_a_fresh_file_prints_its_lines_and_nothing_else(
    new_run: NewRun, tmp_path: Path
) -> None:
    run_dir, uri = new_run(), f"sqlite:///{tmp_path}/deep/er/mlflow.db"
    command = [sys.executable, "-m", "relloc.sync", str(run_dir), "--uri", uri]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    sent, following = done.stdout.splitlines()
    assert sent == f"{run_dir}: 4 params, 6 points, 0 artifacts -> {uri}"
    assert following.startswith("next: ")
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == ["mlflow.db", "mlflow.db.lock"]


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """In memory, if possible: thousands of commits each wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="relloc_", dir=memory if memory.is_dir() else None
    ) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_sixteen_processes_on_a_fresh_file_lose_none_of_256_runs(
    new_run: NewRun, quick_folder: Path
) -> None:
    uri, sweep = f"sqlite:///{quick_folder}/mlflow.db", {"relloc.sweep": "gaps"}
    runs = [
        str(new_run(f"gap{number}", tags=sweep, params={"gap": number})) for number in range(256)
    ]
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(
        ["mlflow.store.tracking.sqlalchemy_store", "alembic.command"]
    )  # imported once
    processes = [
        started.Process(target=main, args=([*runs[first::16], "--uri", uri],))
        for first in range(16)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * 16
    found = search(uri, "relloc")
    assert sorted(run["params"]["gap"] for run in found) == list(range(256))
    assert all(run["metrics"] == {"train/loss": 2.0, "train/top1": 32.5} for run in found)
    assert all(run["tags"]["relloc.sweep"] == "gaps" for run in found)


def test_a_run_folder_may_move(
    uri: str, new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = new_run(tracking_uri=uri)
    main([str(run_dir)])
    shutil.move(run_dir, tmp_path / "moved")
    assert main([str(tmp_path / "moved")]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert len(search(uri, "relloc")) == 1
