"""Addresses of MLflow stores: which ones are understood, and what to give instead of those that are not.

Only the text of an address is looked at here: nothing is opened, and mlflow is not imported, so that a mistake is told
before anything is run.
"""

import importlib.metadata
import os
import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from relloc.errors import UsageError

SQLITE = "sqlite:///"
_SERVERS = ("http", "https")
_DATABASES = ("postgresql", "mysql", "mssql")
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
_SCHEME = re.compile(
    r"([a-z][a-z0-9+.-]*):(?!\d+(/|$))", re.IGNORECASE
)  # a number behind the colon is a port
_FILE = "sqlite:////ABSOLUTE/PATH/mlflow.db for a file"
_GIVE = f"http://HOST:PORT for an MLflow server, or {_FILE}"


def absolute_uri(uri: str) -> str:
    """The same address wherever it is used: a relative sqlite path is taken from the current folder.

    Raises:
        UsageError: it is no address of an MLflow store; the message says which one may be meant.
    """
    if not isinstance(uri, str) or not uri.strip():
        raise UsageError(f"{uri!r} is no address: give {_GIVE}")
    uri = uri.strip()
    found = _SCHEME.match(uri)
    scheme = found[1].lower() if found else ""
    rest = uri[len(scheme) + 1 :] if scheme else uri
    kind = scheme.partition("+")[0]  # behind a plus stands the driver of a database
    if scheme in _SERVERS:
        return _server(uri, scheme, rest)
    if kind == "sqlite":
        return _sqlite(uri, rest)
    if kind in _DATABASES:
        return _database(uri, scheme, rest)
    if scheme == "file" or (
        not scheme and (rest.startswith(("/", ".", "~")) or os.path.isdir(rest))
    ):
        return _folder(uri, rest)
    plugins = importlib.metadata.entry_points(group="mlflow.tracking_store")
    if uri == "databricks" or scheme in ("databricks", *plugins.names):
        return uri
    if scheme:
        raise UsageError(f"{uri!r} is no address that is known, for {scheme}: give {_GIVE}")
    host = re.sub("^https?//", "", uri)
    raise UsageError(
        f"{uri!r} does not say what it is: give http://{host} or https://{host} for a server, or {_FILE}"
    )


def is_server(uri: str) -> bool:
    """Whether the address is that of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def is_database(uri: str) -> bool:
    """Whether the address is that of a database, which MLflow opens through SQLAlchemy."""
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", *_DATABASES)


def sqlite_path(uri: str) -> Path:
    """The file of an absolute sqlite address."""
    return Path(uri.removeprefix(SQLITE))


def _server(uri: str, scheme: str, rest: str) -> str:
    try:
        parts = urlsplit(f"{scheme}://{rest.lstrip('/')}")
    except ValueError as error:
        raise UsageError(
            f"{uri!r} has a host that can't be read: give {scheme}://HOST:PORT, or {scheme}://[ADDRESS]:PORT for an "
            "address of IPv6"
        ) from error
    try:
        has_sound_port = parts.port != 0
    except ValueError:  # it is no number, or too large
        has_sound_port = False
    if not has_sound_port:
        raise UsageError(
            f"{uri!r} has a port that is no number from 1 to 65535: give {scheme}://HOST:PORT"
        )
    if not parts.hostname or re.search(r"[\s\\<>\"^`{|}]", rest):
        raise UsageError(f"{uri!r} names no server: give {scheme}://HOST:PORT")
    name, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
    if parts.username is not None:
        _refuse_password(
            name, "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if parts.query or parts.fragment:
        raise UsageError(
            f"{uri!r} is the address of a page: give that of its server, {scheme}://{name}{path}"
        )
    if not re.match("//[^/]", rest):
        raise UsageError(
            f"{uri!r} does not begin with {scheme}:// and a host: give {scheme}://{name}{path}"
        )
    return f"{scheme}://{name}{path}"


def _sqlite(uri: str, rest: str) -> str:
    path = rest.removeprefix("///")
    if not uri.lower().startswith(SQLITE) or path in ("", ":memory:"):
        meant = re.sub("^//+|^:memory:$", "", path) or "/PATH/mlflow.db"
        raise UsageError(
            f"{uri!r} names no file: give {SQLITE}{meant} (three slashes and a path, which may begin with a fourth)"
        )
    if odd := re.search("[?]|%[0-9a-f]{2}", path, re.IGNORECASE):
        # SQLAlchemy takes what follows a question mark for options, and MLflow takes %20 for a blank.
        raise UsageError(
            f"{uri!r} has {odd[0]!r} in it, which would name another file: give another path"
        )
    whole = os.path.abspath(os.path.expanduser(path))
    if path.endswith("/") or os.path.isdir(whole):
        raise UsageError(f"{uri!r} is a folder: give {SQLITE}{whole}/mlflow.db")
    return SQLITE + whole


def _database(uri: str, scheme: str, rest: str) -> str:
    try:
        parts = urlsplit(f"{scheme}:{rest}")
    except ValueError:  # brackets that do not close
        parts = urlsplit("")
    if not rest.startswith("//") or not parts.scheme:
        raise UsageError(f"{uri!r} is no address of a database: give {scheme}://USER@HOST/DATABASE")
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        _refuse_password(
            host, "leave it out, and keep it where the database's client looks, such as ~/.pgpass"
        )
    return f"{scheme}:{rest}"


def _refuse_password(host: str, instead: str) -> NoReturn:
    raise UsageError(
        f"the address of {host} has a name or a password before it, which would be written into the run folder "
        f"and shown in MLflow: {instead}"
    )


def _folder(uri: str, rest: str) -> str:
    if os.environ.get(_FILE_STORE, "").lower() in ("true", "1"):
        path = unquote(urlsplit(uri).path) if uri.lower().startswith("file:") else rest
        return Path(os.path.abspath(os.path.expanduser(path))).as_uri()
    folder = os.path.abspath(os.path.expanduser(re.sub("^//(localhost)?(?=/)", "", rest)))
    raise UsageError(
        f"{uri!r} is a folder, and MLflow no longer keeps runs in folders of files: give {SQLITE}{folder}/mlflow.db"
    )
