"""artifacts.json: the files of a run folder that a tracker should hold a copy of."""

import os
from pathlib import Path

from relloc.errors import DamagedFile
from relloc.files import read_json, write_json

ARTIFACTS_FILE = "artifacts.json"
_LIST_LOST = (
    "Remove it; the run's command, started again with the same hydra.run.dir, writes it anew"
)


def add_artifact(run_dir: Path, name: str) -> None:
    """Mark a file, named relative to the run folder, to be sent; again whenever it changed.

    Raises:
        ValueError: the name leads out of the run folder.
        FileNotFoundError: there is no such file.
    """
    path = (run_dir / name).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise ValueError(f"artifact {name!r} lies outside of {run_dir}")
    if not path.is_file():
        raise FileNotFoundError(f"artifact {name!r} is not a file in {run_dir}")
    names = _listed(run_dir)
    if name not in names:
        write_json(run_dir / ARTIFACTS_FILE, [*names, name])


def list_artifacts_to_send(run_dir: Path) -> list[str]:
    """The marked files that exist now, in the order in which they were marked; none that lies outside of the folder."""
    return sort_artifacts(run_dir)[0]


def sort_artifacts(run_dir: Path) -> tuple[list[str], list[str]]:
    """The marked files that can be sent, by name, and a line for each that exists but must not or can't be.

    The list is a file like others, which may come from a stranger or be edited: a name in it, or a link in the folder,
    may lead to files outside, such as keys. So the place that a name leads to is looked at each time, links followed.
    """
    inside, refused = [], []
    root = os.path.realpath(run_dir)
    for listed in _listed(run_dir):
        name = os.path.relpath(os.path.normpath(os.path.join(root, listed)), root)
        path = os.path.realpath(os.path.join(root, name))
        if not Path(path).is_relative_to(root):
            refused.append(f"{listed!r} was not sent: it leads out of the run folder, to {path}")
        elif os.path.isfile(path) and not os.access(path, os.R_OK):
            refused.append(f"{listed!r} was not sent: it can't be read")
        elif os.path.isfile(path) and name not in inside:
            inside.append(name)
    return inside, refused


def _listed(run_dir: Path) -> list[str]:
    path = run_dir / ARTIFACTS_FILE
    try:
        names: list[str] = read_json(path, list[str], "a list of files", _LIST_LOST)
    except FileNotFoundError:
        return []
    if any("\0" in name for name in names):
        raise DamagedFile(f"{path} is not a list of files. {_LIST_LOST}")
    return names
