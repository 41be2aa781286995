"""Imports mlflow, and everything that sending to a store needs, before a thread starts to send.

While one thread imports a module, other threads see it half-made. matplotlib, for example, uses
IPython if it finds it imported. A data worker that is forked during an import may wait forever for
the import's lock. mlflow imports many modules only when it first needs them; hence the lists here.
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

# Environment variables of MLflow. There are no retries, since the next sending is one: with
# MLflow's default of 7 retries each call to a dead server would block for 246 s.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
# Modules that MLflow 3.17 imports when it first needs them. Those that a later version lacks are
# skipped.
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
    """Import mlflow and what its SQLite store needs (about 3 s), without messages or telemetry.

    Variables that are already set in the environment are kept.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        # mlflow 3.17 maps its tables with a strategy that SQLAlchemy 2.1 deprecates.
        warnings.filterwarnings("ignore", message=".*noload", category=DeprecationWarning)
        import alembic.command  # noqa: F401
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store
    # Its logger writes pages of traceback for errors that relloc reports in one line (a full disk).
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def import_for(uri: str) -> ModuleType:
    """Import mlflow and all modules that opening the store at `uri` and sending a run will need.

    Raises:
        UsageError: the store needs a package that is not installed.
    """
    mlflow = load_mlflow()
    if is_server(uri):
        _import_existing(_BY_SERVERS)
        from mlflow.tracking.request_header.registry import resolve_request_headers

        # This imports IPython to find out whether it runs in a notebook of Databricks.
        resolve_request_headers()
    elif is_database(uri):
        import_driver(uri)
        import mlflow.store.db

        _import_existing(_BY_DATABASES)
        _import_existing(
            f"mlflow.store.db.{module.name}"
            for module in pkgutil.iter_modules(mlflow.store.db.__path__)
        )
    elif uri.startswith("file:"):
        _import_existing(_BY_FOLDERS)
    return mlflow


def import_driver(uri: str) -> None:
    """Import the database driver that SQLAlchemy needs for `uri`; other addresses need none.

    Raises:
        UsageError: the driver is unknown or not installed.
    """
    if not is_database(uri):
        return
    import sqlalchemy.exc
    from sqlalchemy.engine import make_url

    try:
        make_url(uri).get_dialect().import_dbapi()
    except sqlalchemy.exc.ArgumentError as error:  # also raised for an unknown dialect or driver
        raise UsageError(f"{uri!r} can't be used by SQLAlchemy: {error}") from error
    except ImportError as error:
        raise UsageError(
            f"{uri!r} needs the Python package {error.name}, which is not installed: install it, "
            "name another driver (such as postgresql+psycopg://), or use an MLflow server in front "
            "of the database (tracking=server)"
        ) from error


def _import_existing(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
