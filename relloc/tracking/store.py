"""Opens MLflow stores safely, builds links to their UI, and reads their runs as plain dicts."""

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

PROBE_S = 4.0  # how long a server may take to answer before it counts as unreachable
UI_PORT = 5000
# The environment variable that allows SQLite files in network folders, if it is 1.
ANYWHERE = "RELLOC_SQLITE_ANYWHERE"


class StoreError(RuntimeError):
    """An MLflow store can't be reached, read or written, or refuses what is sent."""


def open_store(uri: str) -> "MlflowClient":
    """Return a client of the store; a missing SQLite file is made with its schema (about 5 s).

    Raises:
        StoreError: a server does not answer within seconds, a file is no database of this version
            of MLflow, or a folder can't be written.
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
        # Runs of a sweep start at the same time, and only one of them may make the schema.
        with locked(path.with_name(path.name + ".lock")):
            _make_schema(path)
            return mlflow.MlflowClient(uri, registry_uri=uri)


def _refuse_shared(path: Path) -> None:
    """Raise `StoreError` for a SQLite file in a network folder, where locks are unreliable."""
    kind = shared_file_system(path.parent)
    if kind and os.environ.get(ANYWHERE) != "1":
        raise StoreError(
            f"{path.parent} is a network folder ({kind}), where SQLite loses data when several "
            "machines write. Use tracking=server, or tracking.uri=sqlite:////LOCAL/mlflow.db; "
            f"or set {ANYWHERE}=1 if only one machine ever writes there"
        )


def _probe(uri: str) -> None:
    """Raise `StoreError` unless an MLflow server answers within `PROBE_S` seconds.

    MLflow's own client would wait and retry for minutes, and would show a login page as an error of
    JSON.
    """
    import requests

    # The same certificate settings as MLflow's own client has (mlflow.environment_variables).
    unchecked = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    authorities = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    verify = not unchecked and authorities
    client_certificate = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    try:
        # Streamed, so that a large page is not downloaded.
        with requests.get(
            f"{uri}/health", timeout=PROBE_S, stream=True, verify=verify, cert=client_certificate
        ) as answer:
            is_page = answer.ok and "html" in answer.headers.get("Content-Type", "")
    except requests.exceptions.SSLError as error:
        raise StoreError(
            f"no answer from {uri} (SSLError): it does not speak HTTPS, or has a certificate that "
            "is not known here, which MLFLOW_TRACKING_SERVER_CERT_PATH may name"
        ) from error
    except requests.RequestException as error:
        raise StoreError(f"no answer from {uri} ({type(error).__name__})") from error
    if is_page:
        raise StoreError(
            f"{uri} answers with a web page, which MLflow would not do here: "
            "it is a login page or another program"
        )


def _make_schema(path: Path) -> None:
    """Make the database if it is missing, or check it and follow it if its folder was moved.

    A new database is built under another name and then moved into place, because MLflow's
    migrations break if two processes run them at once or if one is killed half-way.
    """
    if path.exists() and path.stat().st_size:
        _check_is_database(path)
        follow_move(path)
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # Processes that were killed in the middle leave their folders behind.
    for leftover in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        artifacts = (path.parent / ARTIFACTS).as_uri()
        # Opening a store makes its schema; the file must be closed before it is moved.
        store = SqlAlchemyStore(f"{SQLITE}{new}", artifacts)
        store.engine.dispose()
        os.replace(new, path)


def _check_is_database(path: Path) -> None:
    """Raise `sqlite3.Error` if the file is no SQLite database."""
    # MLflow itself would retry for 101 s, with a message each time, before it reports this.
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT name FROM sqlite_master").fetchone()


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow and its libraries in the block into a `StoreError` of one line."""
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
        # The text may come from a server, and must not be able to control the terminal.
        printable = [char if char.isprintable() else "?" for char in lines[0][:500]]
        reason = "".join(printable) or type(error).__name__
        raise StoreError(f"{uri}: {reason}") from error


def ui_command(uri: str, port: int = UI_PORT) -> str:
    """Return the shell command that serves the UI of a store; for a server, its address."""
    uri = absolute_uri(uri)
    if is_server(uri):
        return uri
    # One worker, and none for MLflow's own jobs, is enough for one user.
    quiet = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    return f"{quiet} mlflow server --workers 1 --port {port} --backend-store-uri {shlex.quote(uri)}"


def ui_link(uri: str, experiment_id: str, port: int = UI_PORT) -> str:
    """Return the address of an experiment's charts, on the server or where `ui_command` serves."""
    uri = absolute_uri(uri)
    server = uri if is_server(uri) else f"http://127.0.0.1:{port}"
    # The page of an experiment as MLflow 3 has it, showing charts instead of a table.
    view = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"{server}/#/experiments/{experiment_id}/runs?{view}"


def search(uri: str, experiment: str) -> list[dict[str, Any]]:
    """Return the runs of an experiment, newest first.

    Example: `search("sqlite:////data/mlflow.db", "relloc")[0]["metrics"]["train/loss"]`

    Returns:
        For each run a dict with the keys name, status, run_id, run_dir, params, metrics and tags.
        Params that are written like numbers or booleans are converted; metrics are the latest
        values.

    Raises:
        StoreError: the store can't be read.
        ValueError: the store has no such experiment, or the SQLite file does not exist.
    """
    uri = absolute_uri(uri)
    # Opening it would make an empty store under a misspelt name.
    if uri.startswith(SQLITE) and not sqlite_path(uri).exists():
        raise ValueError(f"{uri} can't be read: there is no such file")
    client = open_store(uri)
    with store_errors(uri):
        wanted = client.get_experiment_by_name(experiment)
        if wanted is None:
            raise ValueError(f"{uri} has no experiment {experiment!r}")
        # A store returns 1000 runs at most, and a token to ask for the next ones.
        page = client.search_runs([wanted.experiment_id])
        runs = list(page)
        while page.token:
            page = client.search_runs([wanted.experiment_id], page_token=page.token)
            runs += page
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
    """Return the number or boolean that a param's text stands for, or else the text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, (int, float)) else text
