"""The MLflow store behind an address: opening it safely, its UI, and its runs as plain dicts."""

import contextlib
import json
import os
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relloc.files import locked
from relloc.tracking.addresses import SQLITE, absolute_uri, is_server, sqlite_path
from relloc.tracking.imports import load_mlflow
from relloc.tracking.mounts import shared_file_system
from relloc.tracking.relocation import ARTIFACTS, follow_move

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROBE_S = 4.0
UI_PORT = 5000
ANYWHERE = "RELLOC_SQLITE_ANYWHERE"


class StoreError(RuntimeError):
    """The store cannot be reached, read or written, or refuses what is sent; the text says why."""


def open_store(uri: str) -> "MlflowClient":
    """A client of the store; a sqlite file and its schema are made if they are missing (about 5 s).

    Raises:
        StoreError: a server that does not answer within seconds, a file that is no database of this
            MLflow, a folder that cannot be written.
    """
    uri = absolute_uri(uri)
    with store_errors(uri):
        mlflow = load_mlflow()
        if is_server(uri):
            _probe(uri)
        if not uri.startswith(SQLITE):
            return mlflow.MlflowClient(uri, registry_uri=uri)
        path = sqlite_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_shared(path)
        with locked(path.with_name(path.name + ".lock")):
            _make_schema(path)
            return mlflow.MlflowClient(uri, registry_uri=uri)


def _refuse_shared(path: Path) -> None:
    kind = shared_file_system(path.parent)
    if kind and os.environ.get(ANYWHERE) != "1":
        raise StoreError(
            f"{path.parent} is a network folder ({kind}), where SQLite loses data when several machines write: take "
            f"tracking=server, or tracking.uri=sqlite:////LOCAL/mlflow.db; {ANYWHERE}=1 if only one machine ever does"
        )


def _probe(uri: str) -> None:
    """Raise `StoreError` where no server answers within seconds, or another program or a login page does."""
    import requests

    # The settings by which MLflow's client knows the server's certificate, and shows its own
    unchecked = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    known = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    own = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    try:
        with requests.get(
            f"{uri}/health", timeout=PROBE_S, stream=True, verify=not unchecked and known, cert=own
        ) as answer:
            is_page = answer.ok and "html" in answer.headers.get("Content-Type", "")
    except requests.exceptions.SSLError as error:
        raise StoreError(
            f"no answer from {uri} (SSLError): it speaks no HTTPS, or has a certificate that is not known here, which "
            "MLFLOW_TRACKING_SERVER_CERT_PATH may name"
        ) from error
    except requests.RequestException as error:
        raise StoreError(f"no answer from {uri} ({type(error).__name__})") from error
    if is_page:
        raise StoreError(
            f"{uri} answers with a web page where MLflow would not: a page to log in at, or another program"
        )


def _make_schema(path: Path) -> None:
    """Build a missing database aside and move it into place: MLflow's migrations neither bear company
    nor being killed half-way."""
    if path.exists() and path.stat().st_size:
        _check_is_database(path)
        follow_move(path)
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left_by_killed in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(left_by_killed, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        SqlAlchemyStore(f"{SQLITE}{new}", (path.parent / ARTIFACTS).as_uri()).engine.dispose()
        os.replace(new, path)


def _check_is_database(path: Path) -> None:
    # MLflow itself retries for 101 s, and tells of each, before it says that it cannot open the file.
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT name FROM sqlite_master").fetchone()


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow and its layers raise into a `StoreError` with one short line."""
    mlflow = load_mlflow()
    import alembic.util
    import sqlalchemy.exc
    from google.protobuf.json_format import ParseError

    try:
        yield
    except (
        mlflow.MlflowException,
        sqlalchemy.exc.SQLAlchemyError,
        alembic.util.CommandError,
        sqlite3.Error,
        json.JSONDecodeError,
        ParseError,  # JSON of another shape than that of MLflow's answers
        OSError,  # requests' exceptions are OSErrors too
        ImportError,  # of a database's driver
    ) as error:
        lines = str(error).splitlines() or [""]
        # What a server answers may have anything in it, and is shown on a terminal.
        line = "".join(letter if letter.isprintable() else "?" for letter in lines[0][:500])
        raise StoreError(f"{uri}: {line or type(error).__name__}") from error


def ui_command(uri: str, port: int = UI_PORT) -> str:
    """The shell line that opens the UI of a store; for a server, which has one, its address."""
    uri = absolute_uri(uri)
    if is_server(uri):
        return uri
    quiet = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    return f"{quiet} mlflow server --workers 1 --port {port} --backend-store-uri {shlex.quote(uri)}"


def ui_link(uri: str, experiment_id: str, port: int = UI_PORT) -> str:
    """The address of an experiment's charts, on the server itself or where `ui_command` serves."""
    uri = absolute_uri(uri)
    server = uri if is_server(uri) else f"http://127.0.0.1:{port}"
    return f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"


def search(uri: str, experiment: str) -> list[dict[str, Any]]:
    """An experiment's runs, newest first, each as {"name", "status", "run_id", "run_dir", "params",
    "metrics", "tags"}; params that read as numbers or booleans are such, metrics are the latest ones.

    Raises:
        StoreError: the store cannot be read.
        ValueError: it has no such experiment, or the sqlite file does not exist.
    """
    uri = absolute_uri(uri)
    if uri.startswith(SQLITE) and not sqlite_path(uri).exists():
        raise ValueError(f"{uri}: there is no such file")
    client = open_store(uri)
    with store_errors(uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise ValueError(f"{uri} has no experiment {experiment!r}")
        runs = list(page := client.search_runs([found.experiment_id]))
        while page.token:
            runs += (page := client.search_runs([found.experiment_id], page_token=page.token))
    return [_plain_run(run) for run in runs]


def _plain_run(run: Any) -> dict[str, Any]:
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "run_id": run.info.run_id,
        "run_dir": run.data.tags.get("relloc.run_dir"),
        "params": {name: _plain(text) for name, text in run.data.params.items()},
        "metrics": dict(run.data.metrics),
        "tags": dict(run.data.tags),
    }


def _plain(text: str) -> str | int | float | bool:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, (int, float)) else text
