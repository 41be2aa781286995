"""Leaving a run folder as it was, where a mistake is told before anything was trained or measured."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.checkpoints.states import training_folder
from relloc.errors import DamagedFile
from relloc.files import write_whole
from relloc.results import RESULTS_FILE
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.saving import TRAINING_FILE
from relloc.status import Status
from relloc.tracking.artifacts import ARTIFACTS_FILE
from relloc.tracking.journal import JOURNAL_FILE, SYSTEM_FILE
from relloc.tracking.mlflow import NOTE_FILE
from relloc.tracking.record import RUN_FILE, STATUS_FILE, read_status

STATES = "evaluations"  # of those that were stopped: what they go on from
HYDRA_FOLDER = ".hydra"
HYDRA_FILES = tuple(f"{HYDRA_FOLDER}/{name}.yaml" for name in ("config", "hydra", "overrides"))
# What every start of a run writes anew, and what it only adds to
_REWRITTEN = (RUN_FILE, STATUS_FILE, CONFIG_FILE, ARTIFACTS_FILE, TRAINING_FILE, *HYDRA_FILES)
_ADDED_TO = (SYSTEM_FILE, NOTE_FILE, f"{NOTE_FILE}.lock")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderBefore:
    """What a run folder held when a run began: marks of its work, and the content of files that are written anew."""

    path: Path
    work: dict[Path, tuple[int, int]]
    rewritten: dict[str, bytes]
    names: set[str]
    status: Status | None

    @classmethod
    def of(cls, path: Path) -> "FolderBefore":
        files = [*path.glob("*"), *(path / HYDRA_FOLDER).glob("*")]
        names = {str(file.relative_to(path)) for file in files}
        rewritten = {name: (path / name).read_bytes() for name in names.intersection(_REWRITTEN)}
        status = None
        with contextlib.suppress(DamagedFile):  # it is written anew
            status = read_status(path)
        return cls(
            path=path,
            work=_work(path),
            rewritten=rewritten,
            names=names,
            status=status.status if status else None,
        )

    @property
    def is_new(self) -> bool:
        """Whether no run had the folder before."""
        return RUN_FILE not in self.names

    def has_no_new_work(self) -> bool:
        """Whether nothing was trained or measured since."""
        return self.work == _work(self.path)

    def restore(self, made: Iterable[str]) -> None:
        """Remove what is new of the usual files and of those that the run `made`, and put back what was replaced."""
        for name in {*_REWRITTEN, *_ADDED_TO, *made} - self.names:
            (self.path / name).unlink(missing_ok=True)
        for name, content in self.rewritten.items():
            write_whole(self.path / name, content)
        with contextlib.suppress(OSError):  # it is not there, or not empty
            (self.path / HYDRA_FOLDER).rmdir()


def _work(path: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of all files that hold what was trained or measured."""
    files = [path / name for name in (JOURNAL_FILE, RESULTS_FILE, BACKBONE_FILE)]
    files += [*training_folder(path).glob("*"), *(path / STATES).glob("*")]
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # it was never there, or was removed just now
            about = file.stat()
            found[file] = (about.st_size, about.st_mtime_ns)
    return found
