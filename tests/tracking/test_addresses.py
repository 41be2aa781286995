import os
from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.tracking import absolute_uri, import_driver


def test_addresses_do_not_depend_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute_uri("sqlite:///a/../b.db") == f"sqlite:///{tmp_path}/b.db"
    assert absolute_uri("SQLite:////x/b.db") == "sqlite:////x/b.db"
    assert absolute_uri("sqlite:///~/b.db") == "sqlite:////home/somebody/b.db"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://login1:5000/", "http://login1:5000"),
        ("HTTP://login1:5000//", "http://login1:5000"),
        ("https://tracking.lab.org/mlflow/", "https://tracking.lab.org/mlflow"),
        (" http://[::1]:5000 ", "http://[::1]:5000"),
        ("databricks://profile", "databricks://profile"),
        ("postgresql+psycopg://me@host/runs", "postgresql+psycopg://me@host/runs"),
    ],
)
def test_addresses_of_servers_and_databases_are_taken(given: str, kept: str) -> None:
    assert absolute_uri(given) == kept


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("localhost:5000", "http://localhost:5000"),
        ("login1:5000/mlflow", "http://login1:5000/mlflow"),
        ("login1", "http://login1"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("http:/login1:5000", "http://login1:5000"),
        ("http:login1", "http://login1"),
        ("https//login1", "https://login1"),
        ("http://login1:5000/#/experiments/3", "http://login1:5000"),
        ("http://login1:port", "http://HOST:PORT"),
        ("http://login1:70000", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("htp://login1", "http://HOST:PORT"),
        ("sqllite:///mlflow.db", "sqlite:///"),
        ("sqlite:mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:/data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite://mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite://", "sqlite:///"),
        ("sqlite:///", "sqlite:///"),
        ("sqlite:///:memory:", "sqlite:///"),
        ("sqlite:///store/", f"sqlite:///{os.getcwd()}/store/mlflow.db"),
        ("sqlite:////tmp", "sqlite:////tmp/mlflow.db"),
        ("sqlite:///a?b.db", "another path"),
        ("sqlite:///a%20b.db", "another path"),
        ("file:///data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("/data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("./mlruns", "sqlite:///"),
        ("postgresql:runs", "postgresql://USER@HOST/DATABASE"),
        ("", "http://HOST:PORT"),
        ("  ", "http://HOST:PORT"),
    ],
)
def test_what_is_no_address_is_refused_with_one_that_is(
    given: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(UsageError) as caught:
        absolute_uri(given)
    assert instead in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("http://h:99999", ("port", "from 1 to 65535", "http://HOST:PORT")),
        ("http://h:0", ("port", "from 1 to 65535", "http://HOST:PORT")),
        ("http://[::1", ("host", "http://HOST:PORT", "http://[ADDRESS]:PORT")),
        ("http://h/#/experiments/3", ("page", "server, http://h")),
        ("http:/h", ("http:// and a host", "give http://h")),
        ("host:5000", ("http://host:5000 or https://host:5000 for a server", "sqlite:")),
    ],
)
def test_what_is_wrong_with_an_address_of_a_server_is_told(
    given: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        absolute_uri(given)
    message = str(caught.value)
    assert message.startswith(repr(given))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "given", ["http://me:secret@login1:5000", "http://secret@login1", "mysql://me:secret@host/runs"]
)
def test_passwords_in_an_address_are_refused_and_not_shown(given: str) -> None:
    with pytest.raises(UsageError) as caught:
        absolute_uri(given)
    assert "secret" not in str(caught.value)


def test_a_database_whose_driver_is_missing_is_refused() -> None:
    with pytest.raises(UsageError, match="no_such_driver"):
        import_driver("postgresql+no_such_driver://host/runs")
    with pytest.raises(UsageError, match="pyodbc"):
        import_driver("mssql+pyodbc://host/runs")
    import_driver("http://login1:5000")
    import_driver("sqlite:////data/mlflow.db")


def test_folders_of_files_are_taken_where_mlflow_was_told_to_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert absolute_uri("file:///data/ml%20runs") == "file:///data/ml%20runs"
    assert absolute_uri("./mlruns") == f"file://{os.getcwd()}/mlruns"
