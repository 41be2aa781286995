"""Lets a SQLite store of MLflow be moved or copied: its artifact files are looked for beside it.

MLflow records the folder of each experiment's and each run's files as an absolute address, and has
no call to change it. A store whose folder was moved would go on writing to the old folder, and its
pages would show no files of earlier runs. So the addresses are changed in the database.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"  # the folder of files beside a store
_WAIT_S = 60.0  # for another process that writes to the database
# Characters of a folder's name. At four bytes each it stays below the 255 bytes of file systems.
_LONGEST_NAME = 100


def artifact_folder(store: Path, experiment: str) -> Path:
    """Return the folder for the files of a new experiment of the SQLite file `store`."""
    name = experiment.replace("/", "_").replace("\\", "_")[:_LONGEST_NAME]
    if name in (".", ".."):
        name = "_"
    return store.parent / ARTIFACTS / name


def follow_move(store: Path) -> None:
    """Change the addresses in a store that was moved, so that its files are found beside it.

    Only folders that relloc made (`mlartifacts`) are changed; files that lie elsewhere on purpose
    stay there. If only the database was copied, runs keep pointing to the files that were left
    behind.

    Raises:
        sqlite3.Error: the database can't be read or written.
    """
    with contextlib.closing(sqlite3.connect(store, timeout=_WAIT_S)) as database:
        if not database.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'experiments'"
        ).fetchone():
            return  # a database that MLflow has not made its tables in yet
        experiments = database.execute(
            "SELECT experiment_id, artifact_location FROM experiments"
        ).fetchall()
        for identity, location in experiments:
            here = _beside(store, location)
            if here:
                # One transaction for an experiment and its runs: all addresses change or none.
                with database:
                    database.execute(
                        "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                        (here.as_uri(), identity),
                    )
                    _move_runs(database, identity, location, here)


def _move_runs(database: sqlite3.Connection, experiment: int, old: str, here: Path) -> None:
    """Change the addresses of an experiment's runs from the folder `old` (an address) to `here`."""
    runs = database.execute(
        "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,)
    )
    for run, address in runs.fetchall():
        if address is None or not address.startswith(f"{old}/"):
            continue
        below = unquote(address.removeprefix(f"{old}/"))
        # Files that exist in the old folder only were not moved along.
        old_folder = _local(address)
        if (here / below).is_dir() or old_folder is None or not old_folder.is_dir():
            moved = (here / below).as_uri()
            database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (moved, run))


def _beside(store: Path, location: str | None) -> Path | None:
    """Return where an experiment's folder belongs, if its address is beside another store.

    None means that the address is right, or that relloc did not make the folder.
    """
    recorded = _local(location)
    if recorded is None or recorded.parent.name != ARTIFACTS:
        return None
    # One folder may have several names through links, so the real paths are compared.
    recorded_store_folder = recorded.parent.parent
    if os.path.realpath(recorded_store_folder) == os.path.realpath(store.parent):
        return None
    return store.parent / ARTIFACTS / recorded.name


def _local(location: str | None) -> Path | None:
    """Return the path of a file: address, or None for addresses of other kinds."""
    parts = urlsplit(location or "")
    if parts.scheme not in ("", "file") or not parts.path.startswith("/"):
        return None
    return Path(unquote(parts.path))
