"""Restores a run folder after a command that was refused before it trained or measured anything.

A typing mistake should not leave a half-made run behind, nor change the record of a finished one.
"""

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

STATES = "evaluations"  # the folder of states from which stopped evaluations resume
HYDRA_FOLDER = ".hydra"
HYDRA_FILES = tuple(f"{HYDRA_FOLDER}/{name}.yaml" for name in ("config", "hydra", "overrides"))
# What every start of a run writes anew, and what it only adds to.
_REWRITTEN = (RUN_FILE, STATUS_FILE, CONFIG_FILE, ARTIFACTS_FILE, TRAINING_FILE, *HYDRA_FILES)
_ADDED_TO = (SYSTEM_FILE, NOTE_FILE, f"{NOTE_FILE}.lock")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSnapshot:
    """What a run folder held before a run began.

    Args:
        results: size (bytes) and time (ns) of the files that hold trained or measured results.
        rewritten: content of the files that every start of a run writes anew.
        names: all files there, by their paths below the folder.
        status: how the previous run in the folder ended, or None if there was none.
    """

    path: Path
    results: dict[Path, tuple[int, int]]
    rewritten: dict[str, bytes]
    names: set[str]
    status: Status | None

    @classmethod
    def of(cls, path: Path) -> "FolderSnapshot":
        """Reads what a folder holds now; a folder that does not exist holds nothing."""
        files = [*path.glob("*"), *(path / HYDRA_FOLDER).glob("*")]
        names = {str(file.relative_to(path)) for file in files}
        rewritten = {name: (path / name).read_bytes() for name in names.intersection(_REWRITTEN)}
        status = None
        # A damaged status says nothing, and every start of a run writes it anew.
        with contextlib.suppress(DamagedFile):
            status = read_status(path)
        return cls(
            path=path,
            results=_signatures_of_results(path),
            rewritten=rewritten,
            names=names,
            status=status.status if status else None,
        )

    @property
    def is_new(self) -> bool:
        """True if no run had the folder before."""
        return RUN_FILE not in self.names

    def has_same_results(self) -> bool:
        """Returns True if nothing was trained or measured since."""
        return self.results == _signatures_of_results(self.path)

    def restore(self, made: Iterable[str]) -> None:
        """Removes the files that the run added and puts back those that it replaced.

        `made` names files that the run wrote beside those that every run writes.
        """
        # Only files that this run may have written are removed: others may be the user's.
        for name in {*_REWRITTEN, *_ADDED_TO, *made} - self.names:
            (self.path / name).unlink(missing_ok=True)
        for name, content in self.rewritten.items():
            write_whole(self.path / name, content)
        # This fails, rightly, where the folder is not there or not empty.
        with contextlib.suppress(OSError):
            (self.path / HYDRA_FOLDER).rmdir()


def _signatures_of_results(path: Path) -> dict[Path, tuple[int, int]]:
    """Returns size (bytes) and time (ns) of the files that hold trained or measured results."""
    files = [path / name for name in (JOURNAL_FILE, RESULTS_FILE, BACKBONE_FILE)]
    files += [*training_folder(path).glob("*"), *(path / STATES).glob("*")]
    signatures = {}
    for file in files:
        # A file may not be there, or be removed between listing and this.
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            signatures[file] = (status.st_size, status.st_mtime_ns)
    return signatures
