"""Lists the files of a run folder that MLflow should get a copy of. The list is artifacts.json."""

import os
from pathlib import Path

from relloc.errors import DamagedFile
from relloc.files import read_json, write_json

ARTIFACTS_FILE = "artifacts.json"
_LIST_LOST = (
    "Remove it; the run's command, started again with the same hydra.run.dir, writes it anew"
)


def add_artifact(run_dir: Path, name: str) -> None:
    """Add a file to the list of those to send. It is sent again whenever it has changed.

    Args:
        run_dir: the run folder.
        name: the path of the file relative to the run folder, such as "figures/loss.png".

    Raises:
        ValueError: the name leads out of the run folder.
        FileNotFoundError: there is no such file.
    """
    # Resolved, since a name such as ../key or a link may lead elsewhere.
    path = (run_dir / name).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise ValueError(
            f"The artifact {name!r} lies outside of {run_dir}, and only files in it can be sent."
        )
    if not path.is_file():
        raise FileNotFoundError(f"The artifact {name!r} is not a file in {run_dir}.")
    names = _listed_names(run_dir)
    if name not in names:
        write_json(run_dir / ARTIFACTS_FILE, [*names, name])


def list_artifacts_to_send(run_dir: Path) -> list[str]:
    """Return the listed files that exist and may be sent, in the order in which they were added."""
    return sort_artifacts(run_dir)[0]


def sort_artifacts(run_dir: Path) -> tuple[list[str], list[str]]:
    """Sort the listed files into those that can be sent and those that can't or must not be.

    artifacts.json may come from a stranger or be edited. A name in it, or a link in the folder, may
    lead to a file outside, such as a private key. So each name is resolved each time, with links.

    Returns:
        The names of the files to send, relative to the run folder, and a sentence for each file
        that exists and is refused. Names without a file are in neither.
    """
    sendable: list[str] = []
    refused: list[str] = []
    root = os.path.realpath(run_dir)
    for listed_name in _listed_names(run_dir):
        # Two spellings of one path, such as a/../b and b, are one file.
        spelled_out = os.path.normpath(os.path.join(root, listed_name))
        name = os.path.relpath(spelled_out, root)
        target = os.path.realpath(os.path.join(root, name))
        if not Path(target).is_relative_to(root):
            refused.append(
                f"{listed_name!r} was not sent: it leads out of the run folder, to {target}"
            )
        elif not os.path.isfile(target):
            continue
        elif not os.access(target, os.R_OK):
            refused.append(f"{listed_name!r} was not sent: it can't be read")
        elif name not in sendable:
            sendable.append(name)
    return sendable, refused


def _listed_names(run_dir: Path) -> list[str]:
    path = run_dir / ARTIFACTS_FILE
    try:
        names: list[str] = read_json(path, list[str], "a list of files", _LIST_LOST)
    except FileNotFoundError:
        return []
    # No path can have a zero byte in it, and the functions of os.path raise ValueError at one.
    if any("\0" in name for name in names):
        raise DamagedFile(f"{path} is not a list of files. {_LIST_LOST}")
    return names
