"""Where a SQLite store's files lie after it was moved or copied: beside it, as they did before.

MLflow notes the place of an experiment's files, and of each run's, as absolute addresses when these are made, and has
no call to change them. A store whose folder was moved would go on writing where the folder was, and its pages would
show no file of earlier runs.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"
_WAIT_S = 60.0  # for another process that writes
_LONGEST_NAME = (
    100  # of a folder, in characters: four bytes each stay within what file systems take
)


def artifact_folder(store: Path, experiment: str) -> Path:
    """The folder for the files of an experiment that is new in the SQLite file `store`."""
    name = experiment.replace("/", "_").replace("\\", "_")[:_LONGEST_NAME]
    return store.parent / ARTIFACTS / ("_" if name in (".", "..") else name)


def follow_move(store: Path) -> None:
    """Have the experiments and runs of a store that was moved keep their files beside it, in its `mlartifacts`.

    What lies elsewhere on purpose stays there: only folders that relloc made for a store in another folder are looked
    at. A run whose files were left behind, because only the database was copied, keeps them where they are.

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
            if here := _beside(store, location):
                with database:
                    database.execute(
                        "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                        (here.as_uri(), identity),
                    )
                    _move_runs(database, identity, location, here)


def _move_runs(database: sqlite3.Connection, experiment: int, old: str, here: Path) -> None:
    runs = database.execute(
        "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,)
    )
    for run, address in runs.fetchall():
        if address is None or not address.startswith(f"{old}/"):
            continue
        below = unquote(address.removeprefix(f"{old}/"))
        left_behind = _local(address)
        if (here / below).is_dir() or left_behind is None or not left_behind.is_dir():
            moved = (here / below).as_uri()
            database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (moved, run))


def _beside(store: Path, location: str | None) -> Path | None:
    """Where a folder of files that relloc made belongs, if it is noted for a store of another folder."""
    noted = _local(location)
    if noted is None or noted.parent.name != ARTIFACTS:
        return None
    here = store.parent / ARTIFACTS / noted.name
    # The same folder may have several names, through links.
    return None if os.path.realpath(noted.parent.parent) == os.path.realpath(store.parent) else here


def _local(location: str | None) -> Path | None:
    parts = urlsplit(location or "")
    if parts.scheme not in ("", "file") or not parts.path.startswith("/"):
        return None
    return Path(unquote(parts.path))
