"""Importing mlflow, and all that sending to a store imports later: before a thread sends, never in it.

While one thread imports a module, others see it half made. matplotlib, for one, looks whether IPython was imported and
uses what it finds, and a worker that is forked meanwhile may wait for ever for the rest of it.
"""

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import warnings
from collections.abc import Iterable
from types import ModuleType

from relloc.errors import UsageError
from relloc.tracking.addresses import is_database, is_server

# Retries are left to the next sending: the default of 7 blocks each call to a dead server for 246 s.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
# What MLflow 3.17 imports when it is first asked for something; modules that a later one lacks are passed over.
_BY_SERVERS = ("netrc", "http.cookiejar", "requests", "mlflow.store.artifact.mlflow_artifacts_repo")
_BY_DATABASES = (
    "alembic.command",
    "alembic.config",
    "mlflow.store.artifact.local_artifact_repo",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.store.workspace.utils",
    "mlflow.store.workspace_aware_mixin",
)
_BY_FOLDERS = ("mlflow.store.tracking.file_store", "mlflow.store.artifact.local_artifact_repo")


@functools.cache
def load_mlflow() -> ModuleType:
    """Import mlflow and what its sqlite store needs (about 3 s), quiet and without telemetry.

    Settings of the caller's environment win over ours.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        # mlflow 3.17 maps its tables with a strategy that SQLAlchemy 2.1 deprecates.
        warnings.filterwarnings("ignore", message=".*noload", category=DeprecationWarning)
        import alembic.command  # noqa: F401
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store
    # It writes a traceback of pages for what we tell in a line, such as a full disk.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def import_for(uri: str) -> ModuleType:
    """Import mlflow and whatever opening the store at `uri`, and sending a run there, will import.

    Raises:
        UsageError: the store needs a package that is not installed.
    """
    mlflow = load_mlflow()
    if is_server(uri):
        _import_there_are(_BY_SERVERS)
        from mlflow.tracking.request_header.registry import resolve_request_headers

        resolve_request_headers()  # it asks IPython, which it imports, whether this is a notebook of Databricks
    elif is_database(uri):
        import_driver(uri)
        import mlflow.store.db

        _import_there_are(_BY_DATABASES)
        _import_there_are(
            f"mlflow.store.db.{module.name}"
            for module in pkgutil.iter_modules(mlflow.store.db.__path__)
        )
    elif uri.startswith("file:"):
        _import_there_are(_BY_FOLDERS)
    return mlflow


def import_driver(uri: str) -> None:
    """Import what SQLAlchemy needs for the database at `uri`; other addresses need nothing.

    Raises:
        UsageError: it is not installed.
    """
    if not is_database(uri):
        return
    import sqlalchemy.exc
    from sqlalchemy.engine import make_url

    try:
        make_url(uri).get_dialect().import_dbapi()
    except sqlalchemy.exc.ArgumentError as error:  # also: no such dialect, no such driver
        raise UsageError(f"{uri!r} can't be used by SQLAlchemy: {error}") from error
    except ImportError as error:
        raise UsageError(
            f"{uri!r} needs the Python package {error.name}, which is not installed: install it, name another driver "
            "(such as postgresql+psycopg://), or take a server that stands before the database (tracking=server)"
        ) from error


def _import_there_are(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
