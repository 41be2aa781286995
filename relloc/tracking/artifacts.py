"""artifacts.json: the files of a run folder that a tracker should hold a copy of."""

from pathlib import Path

from relloc.errors import DamagedFile
from relloc.files import write_json
from relloc.tracking.record import read_json

ARTIFACTS_FILE = "artifacts.json"
_LIST_LOST = "Remove it; the run's command, started again with the same hydra.run.dir, writes it anew"


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
    """The marked files that exist now, in the order in which they were marked."""
    return [name for name in _listed(run_dir) if (run_dir / name).is_file()]


def _listed(run_dir: Path) -> list[str]:
    path = run_dir / ARTIFACTS_FILE
    try:
        names = read_json(path, "a list of files", _LIST_LOST)
    except FileNotFoundError:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise DamagedFile(f"{path} is not a list of files. {_LIST_LOST}")
    return names
