import shlex
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relloc.tracking import StoreError, open_store, search, store, sync, ui_command, ui_link


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_server_is_known_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(
        StoreError, match=r"no answer from http://127\.0\.0\.1:9 \(ConnectionError\)"
    ):
        open_store("http://127.0.0.1:9")
    assert time.monotonic() - start < 60  # MLflow's own client takes minutes


def test_a_silent_server_is_given_up(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.PROBE_S < 5
    monkeypatch.setattr(store, "PROBE_S", 0.3)
    with pytest.raises(StoreError, match=r"\(ReadTimeout\)"):
        open_store(silent_server)


def test_a_file_that_is_no_database_is_told_at_once_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("my notes\n" * 100)
    start = time.monotonic()
    with pytest.raises(StoreError, match="file is not a database"):
        open_store(f"sqlite:///{path}")
    assert time.monotonic() - start < 60  # MLflow itself takes 101 s
    assert path.read_text() == "my notes\n" * 100


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        open_store(f"sqlite:///{tmp_path}/file/deeper/mlflow.db")


def test_making_a_store_leaves_only_the_store_and_sweeps_away_what_a_killed_process_left(
    empty_database: Path,
) -> None:
    assert sorted(path.name for path in empty_database.parent.iterdir()) == [
        "mlflow.db",
        "mlflow.db.lock",
    ]


def test_the_ui_is_opened_on_the_charts_of_the_experiment() -> None:
    words = shlex.split(ui_command("sqlite:////my runs/mlflow.db"))
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in words[: words.index("mlflow")]
    assert words[words.index("mlflow") + 1] == "server"
    assert words[-2:] == ["--backend-store-uri", "sqlite:////my runs/mlflow.db"]
    chart = "/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART"
    assert ui_link("sqlite:////a.db", "7") == "http://127.0.0.1:5000" + chart
    assert ui_link("HTTP://login1:8080/", "7") == "http://login1:8080" + chart
    assert ui_command("http://login1:8080/") == "http://login1:8080"


def test_search_gives_plain_values(uri: str, new_run: Callable[..., Path]) -> None:
    first, second = new_run("first"), new_run("second", tags={"relloc.sweep": "s1"})
    sync(first, uri)
    sync(second, uri)
    runs = {run["name"]: run for run in search(uri, "relloc")}
    assert set(runs) == {"first", "second"}
    assert runs["second"]["run_dir"] == str(second)
    assert runs["second"]["tags"]["relloc.sweep"] == "s1"
    assert runs["first"]["status"] == "RUNNING"
    assert runs["first"]["metrics"] == {"train/loss": 2.0, "train/top1": 32.5}
    params = runs["first"]["params"]
    expected = {
        "model.name": "resnet50",
        "optimizer.lr": 1e-05,
        "optimizer.epochs": 70,
        "optimizer.nesterov": True,
    }
    assert params == expected
    assert [type(params[name]) for name in sorted(params)] == [str, int, float, bool]


def test_search_reads_every_page(
    uri: str, new_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    for name in ("a", "b", "c"):
        sync(new_run(name), uri)
    whole = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *a, **k: whole(*a, **{**k, "max_results": 1})
    )
    assert [run["name"] for run in search(uri, "relloc")] == ["c", "b", "a"]


def test_search_does_not_hide_a_misspelt_name(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no experiment 'reloc'"):
        search(uri, "reloc")
    with pytest.raises(ValueError, match="no such file"):
        search(f"sqlite:///{tmp_path}/misspelt.db", "relloc")
    assert not (tmp_path / "misspelt.db").exists()
