"""Checks the addresses of MLflow stores, and suggests what to write instead of a wrong one.

Only the text of an address is checked here. Nothing is opened and mlflow is not imported, so that a
mistake is reported before a run starts.
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
# The scheme before a colon. "localhost:5000" has none: a number after the colon is a port.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(?!\d+(/|$))", re.IGNORECASE)
_FILE = "sqlite:////ABSOLUTE/PATH/mlflow.db for a file"
_GIVE = f"http://HOST:PORT for an MLflow server, or {_FILE}"


def absolute_uri(uri: str) -> str:
    """Check the address of an MLflow store, and return it in its one standard form.

    A relative SQLite path is made absolute from the current folder, since the address is also used
    by processes in other folders.

    Example: `absolute_uri("sqlite:///mlflow.db")` in /data is "sqlite:////data/mlflow.db".

    Raises:
        UsageError: it is no address of an MLflow store; the message suggests one that may be meant.
    """
    if not isinstance(uri, str) or not uri.strip():
        raise UsageError(f"{uri!r} is not an address: give {_GIVE}")
    uri = uri.strip()
    match = _SCHEME.match(uri)
    scheme = match[1].lower() if match else ""
    rest = uri[len(scheme) + 1 :] if scheme else uri
    # SQLAlchemy's addresses name the driver after a plus, as in postgresql+psycopg.
    kind = scheme.partition("+")[0]
    if scheme in _SERVERS:
        return _server(uri, scheme, rest)
    if kind == "sqlite":
        return _sqlite(uri, rest)
    if kind in _DATABASES:
        return _database(uri, scheme, rest)
    looks_like_path = rest.startswith(("/", ".", "~"))
    if scheme == "file" or (not scheme and (looks_like_path or os.path.isdir(rest))):
        return _folder(uri, rest)
    # MLflow finds stores of other packages by this entry point, and knows their schemes.
    plugins = importlib.metadata.entry_points(group="mlflow.tracking_store")
    if uri == "databricks" or scheme in ("databricks", *plugins.names):
        return uri
    if scheme:
        raise UsageError(f"{uri!r} has the unknown scheme {scheme}: give {_GIVE}")
    host = re.sub("^https?//", "", uri)  # a colon may have been forgotten
    raise UsageError(
        f"{uri!r} does not say what kind of store it is: "
        f"give http://{host} or https://{host} for a server, or {_FILE}"
    )


def is_server(uri: str) -> bool:
    """Return whether an address is that of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def is_database(uri: str) -> bool:
    """Return whether an address is that of a database, which MLflow opens through SQLAlchemy."""
    scheme = uri.partition(":")[0]
    return scheme.partition("+")[0] in ("sqlite", *_DATABASES)


def sqlite_path(uri: str) -> Path:
    """Return the file of a SQLite address that `absolute_uri` returned."""
    return Path(uri.removeprefix(SQLITE))


def _server(uri: str, scheme: str, rest: str) -> str:
    """Return the standard form of a server's address. `rest` is what follows the scheme's colon."""
    # Two slashes are put where none or one was written, so that a suggestion can be made below.
    try:
        parts = urlsplit(f"{scheme}://{rest.lstrip('/')}")
    except ValueError as error:
        raise UsageError(
            f"{uri!r} has a malformed host: give {scheme}://HOST:PORT, "
            f"or {scheme}://[ADDRESS]:PORT for an IPv6 address"
        ) from error
    try:
        has_sound_port = parts.port != 0
    except ValueError:  # not a number, or too large
        has_sound_port = False
    if not has_sound_port:
        raise UsageError(
            f"{uri!r} has a port that is not a number from 1 to 65535: give {scheme}://HOST:PORT"
        )
    # These characters are in no address; they come from quotes or brackets that were pasted along.
    if not parts.hostname or re.search(r"[\s\\<>\"^`{|}]", rest):
        raise UsageError(f"{uri!r} names no server: give {scheme}://HOST:PORT")
    name = parts.netloc.rpartition("@")[2]
    path = parts.path.rstrip("/")
    if parts.username is not None:
        _refuse_password(
            name, "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if parts.query or parts.fragment:
        raise UsageError(
            f"{uri!r} is the address of a page: give that of the server, {scheme}://{name}{path}"
        )
    if not re.match("//[^/]", rest):
        raise UsageError(
            f"{uri!r} does not begin with {scheme}:// and a host: give {scheme}://{name}{path}"
        )
    return f"{scheme}://{name}{path}"


def _sqlite(uri: str, rest: str) -> str:
    """Return the standard form of a SQLite file's address. `rest` follows the scheme's colon."""
    path = rest.removeprefix("///")
    if not uri.lower().startswith(SQLITE) or path in ("", ":memory:"):
        meant = re.sub("^//+|^:memory:$", "", path) or "/PATH/mlflow.db"
        raise UsageError(
            f"{uri!r} names no file: give {SQLITE}{meant} "
            "(three slashes and a path; an absolute path begins with a fourth slash)"
        )
    # SQLAlchemy reads what follows a question mark as options, and MLflow reads %20 as a blank.
    misread = re.search("[?]|%[0-9a-f]{2}", path, re.IGNORECASE)
    if misread:
        raise UsageError(
            f"{uri!r} contains {misread[0]!r}, which would name another file: give another path"
        )
    absolute = os.path.abspath(os.path.expanduser(path))
    if path.endswith("/") or os.path.isdir(absolute):
        raise UsageError(f"{uri!r} is a folder: give {SQLITE}{absolute}/mlflow.db")
    return SQLITE + absolute


def _database(uri: str, scheme: str, rest: str) -> str:
    """Return the standard form of a database's address. `rest` follows the scheme's colon."""
    try:
        parts = urlsplit(f"{scheme}:{rest}")
    except ValueError:  # a bracket that is not closed
        parts = urlsplit("")
    if not rest.startswith("//") or not parts.scheme:
        raise UsageError(
            f"{uri!r} is not the address of a database: give {scheme}://USER@HOST/DATABASE"
        )
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        _refuse_password(
            host, "leave it out, and keep it where the database's client looks, such as ~/.pgpass"
        )
    return f"{scheme}:{rest}"


def _refuse_password(host: str, instead: str) -> NoReturn:
    """Raise the error for an address with a password, without repeating the password."""
    raise UsageError(
        f"the address of {host} contains a user name or a password, which would be written into "
        f"the run folder and shown in MLflow: {instead}"
    )


def _folder(uri: str, rest: str) -> str:
    """Refuse a folder, with MLflow; return its address only if MLflow's own variable allows it."""
    if os.environ.get(_FILE_STORE, "").lower() in ("true", "1"):
        path = unquote(urlsplit(uri).path) if uri.lower().startswith("file:") else rest
        return Path(os.path.abspath(os.path.expanduser(path))).as_uri()
    path = re.sub("^//(localhost)?(?=/)", "", rest)  # of file://localhost/data
    folder = os.path.abspath(os.path.expanduser(path))
    raise UsageError(
        f"{uri!r} is a folder, and MLflow no longer keeps runs in folders of files: "
        f"give {SQLITE}{folder}/mlflow.db"
    )
