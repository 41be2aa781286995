"""The folder of a run while it runs: its lock, its record, its MLflow mirror, its closing lines.

A command first takes the folder for itself (`lock_folder`), then checks what a previous start left
there (`check_files`), and then writes into it (`open_folder`).
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

from relloc import ranks
from relloc.checkpoints.paths import BACKBONE_FILE, TRAINING_FOLDER, saved_trainings
from relloc.errors import UsageError
from relloc.files import remove_all_unfinished, write_whole
from relloc.pretext.stopping import Stopped
from relloc.results import RESULTS_FILE, read_results
from relloc.runs import console
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.invocation import Invocation
from relloc.runs.refusing import HYDRA_FOLDER, STATES, FolderSnapshot
from relloc.runs.saving import TRAINING_FILE
from relloc.status import Status
from relloc.sweeps.points import POINT_FILE
from relloc.terminal import quantity
from relloc.tracking import (
    Mirror,
    RunRecord,
    StoreError,
    add_artifact,
    forget,
    list_artifacts_to_send,
    read_journal,
    read_note,
    ui_command,
    ui_link,
    write_status,
)
from relloc.tracking.artifacts import ARTIFACTS_FILE
from relloc.tracking.journal import JOURNAL_FILE
from relloc.tracking.note import NOTE_FILE
from relloc.tracking.record import RUN_FILE, STATUS_FILE
from relloc.tracking.run_lock import LOCK_FILE, locked_run_folder

UNREADABLE_FILE = "unreadable.txt"
_MAX_NAMED = 5  # unreadable images in a message that is not about them
# A folder with any of these is that of a run.
_RUN_FILES = {
    RUN_FILE,
    POINT_FILE,
    LOCK_FILE,
    STATES,
    TRAINING_FILE,
    JOURNAL_FILE,
    RESULTS_FILE,
    BACKBONE_FILE,
    HYDRA_FOLDER,
    STATUS_FILE,
    TRAINING_FOLDER,
    ARTIFACTS_FILE,
    NOTE_FILE,
}
# A command's own output may be written into its folder before it starts.
_LOG_SUFFIXES = {".log", ".out", ".err", ".txt"}


@dataclasses.dataclass
class RunFolder:
    """The folder of a run while it runs.

    Attributes:
        path: The folder.
        uri: The MLflow store that mirrors the run, or None.
        status: How the run ended, known at its end.
        ended_by_mistake: True if the command itself was wrong, so that repeating it fails again.
        mirrored_files: The names of the files that MLflow gets copies of.
        unreadable: The images that could not be used, with the reasons.
    """

    path: Path
    uri: str | None
    status: Status = Status.FAILED
    ended_by_mistake: bool = False
    mirrored_files: set[str] = dataclasses.field(default_factory=set)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

    def mirror_file(self, name: str) -> None:
        """Has MLflow get a copy of a file of this folder, `name` being its path below it."""
        add_artifact(self.path, name)
        self.mirrored_files.add(name)

    def summarize(self, fingerprints: Collection[str] | None = None) -> None:
        """Marks the run as done and prints its results: the rows with `fingerprints`, or all."""
        self.status = Status.DONE
        rows = read_results(self.path)
        if fingerprints is not None:
            rows = [row for row in rows if row.fingerprint in fingerprints]
        evaluated = [row for row in rows if row.kind != "pretext"]
        for row in rows:
            if row.kind == "pretext":
                console.print_message(console.pretext_line(row))
        if evaluated:
            console.show_results(evaluated)
        if rows:
            self.mirror_file(RESULTS_FILE)

    def report_unreadable(self) -> None:
        """Writes and prints which images could not be used, now or in earlier starts of the run."""
        lines = self.write_unreadable()
        if lines:
            self.mirror_file(UNREADABLE_FILE)
            console.print_message(
                f"{quantity(len(lines), 'image')} could not be used, such as "
                f"{min(lines)}; all are named in {self.path / UNREADABLE_FILE}"
            )

    def write_unreadable(self) -> set[str]:
        """Writes which images could not be used, now or in earlier starts; returns the lines.

        Other runs reuse no results of a folder that has this file.
        """
        if not self.unreadable:
            return set()
        lines = {f"{name}: {reason}" for name, reason in self.unreadable.items()}
        file = self.path / UNREADABLE_FILE
        if file.exists():
            # Names of files need not be UTF-8; surrogates carry their bytes as they are.
            earlier = file.read_text(encoding="utf-8", errors="surrogateescape")
            lines.update(earlier.splitlines())
        content = "".join(f"{line}\n" for line in sorted(lines))
        write_whole(file, content.encode("utf-8", "surrogateescape"))
        return lines


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[Path]:
    """Locks the folder of a run for the length of the block. Gives all ranks rank 0's folder.

    No other command may have the folder at the same time, so nothing is to be read or written there
    outside of the block.

    Raises:
        FolderIsTaken: another run has the folder.
        UsageError: the folder holds files of something other than a run.
    """
    # The default folder has the time in its name: each rank may have computed another name.
    run_dir = Path(ranks.from_first(str(folder)))
    with contextlib.ExitStack() as at_end:
        refusal = None
        try:
            if ranks.rank() == 0:
                _refuse_foreign_files(run_dir)
                at_end.enter_context(locked_run_folder(run_dir))
        except UsageError as error:
            refusal = error
        # All ranks leave together; one that stayed would wait for the others forever. The message
        # is rank 0's, and is printed once.
        if ranks.from_first(refusal is not None):
            raise refusal or SystemExit(UsageError.exit_code)
        yield run_dir


def _refuse_foreign_files(run_dir: Path) -> None:
    """Raises `UsageError` if the folder has files, and none of them is of a run."""
    names = set()
    if run_dir.is_dir():
        names = {path.name for path in run_dir.iterdir()}
    foreign = [
        name
        for name in sorted(names)
        if not name.startswith(".") and Path(name).suffix not in _LOG_SUFFIXES
    ]
    if foreign and names.isdisjoint(_RUN_FILES):
        example = foreign[0]
        if len(foreign) > 1:
            example += " and more"
        raise UsageError(
            f"hydra.run.dir={run_dir} holds {example}, but nothing of a run: give a folder that "
            "is new, or that of a run"
        )


def check_files(path: Path) -> None:
    """Reads the files that a run resumes from, to find damage before anything is changed.

    Raises:
        DamagedFile: one of them can't be read.
    """
    if ranks.rank() > 0:
        return
    with contextlib.suppress(FileNotFoundError):
        RunRecord.read(path)
    list_artifacts_to_send(path)
    read_journal(path)
    read_results(path)


@contextlib.contextmanager
def open_folder(invocation: Invocation, record: RunRecord, path: Path) -> Iterator[RunFolder]:
    """Starts the run in its folder and in MLflow, and closes both when the block ends.

    At the end the console says how the run ended and where everything is. A mistake in the command,
    found before anything was trained or measured, leaves the folder as it was, and no run in
    MLflow.
    """
    folder = RunFolder(path, invocation.settings["tracking"]["uri"])
    console.print_message(f"run     {path}")
    before = FolderSnapshot.of(path)
    # A run that was killed may have left files half written. The note on MLflow is not removed:
    # relloc.sync, which needs no lock on the folder, may be writing it at this moment.
    for written_folder in (path, path / HYDRA_FOLDER):
        remove_all_unfinished(written_folder, but=NOTE_FILE)
    # Write the files first and tell MLflow then: the folder is the truth, MLflow its mirror.
    record.write(path)
    for name, text in invocation.files.items():
        write_whole(path / name, text.encode("utf-8", "surrogateescape"))
    folder.mirror_file(CONFIG_FILE)
    mirror = Mirror(path, folder.uri, warn=console.print_message) if folder.uri else None
    try:
        write_status(path, Status.RUNNING)
        if mirror:
            mirror.start()
        yield folder
    except (KeyboardInterrupt, Stopped):
        folder.status = Status.STOPPED
        remains = "nothing had been saved yet"
        if _has_results(path):
            remains = "what was saved and evaluated before stays"
        console.print_message(f"interrupted; {remains}")
        raise
    except UsageError as error:
        # Some errors of this type, such as images that do not come, may be gone another time: they
        # have exit codes of their own.
        folder.ended_by_mistake = error.exit_code == UsageError.exit_code
        raise
    finally:
        if folder.ended_by_mistake and before.has_same_results():
            _restore_folder(folder, mirror, before)
        else:
            _close(folder, mirror, command_names_folder=invocation.names_folder)


def _close(folder: RunFolder, mirror: Mirror | None, *, command_names_folder: bool) -> None:
    """Writes how the run ended, sends MLflow the rest, and prints where everything is.

    `command_names_folder` says whether the command gives hydra.run.dir, so that repeating it as it
    is resumes the run.
    """
    path = folder.path
    # Everything is written into the folder before MLflow, which copies it.
    try:
        folder.report_unreadable()
        write_status(path, folder.status)
    except OSError as error:
        # Such as a full disk, which has then ended the run too.
        console.print_message(f"{error.filename or path} can't be written ({error.strerror})")
    if mirror:
        problem = mirror.close(folder.status)
        _print_mlflow_links(folder, problem)
    console.print_message(f"run     {path}: {folder.status.word}")
    if folder.status is not Status.DONE and not folder.ended_by_mistake:
        purpose = "to resume" if _has_results(path) else "to start anew"
        addition = "" if command_names_folder else f" with hydra.run.dir={path}"
        console.print_message(f"        repeat the command{addition} {purpose}")


def _has_results(path: Path) -> bool:
    """Returns True if the folder has anything trained or measured, from which a run resumes."""
    has_states = (path / STATES).exists()
    has_results = (path / RESULTS_FILE).exists()
    return bool(saved_trainings(path)) or has_states or has_results


def _restore_folder(folder: RunFolder, mirror: Mirror | None, before: FolderSnapshot) -> None:
    """Ends a run after a mistake in its command, as if it had never begun."""
    # First MLflow: the folder's note on it is what tells which run to delete there.
    if mirror:
        mirror.close(before.status or Status.FAILED)
        if before.is_new:
            # A store that can't be reached either has no such run, or has to keep it.
            with contextlib.suppress(StoreError):
                forget(folder.path)
    try:
        before.restore(folder.mirrored_files)
    except OSError as error:
        # The user still has to read of the mistake itself, which is raised after this.
        console.print_message(
            f"{error.filename or folder.path} can't be written ({error.strerror}): the folder is "
            "not as it was"
        )
    # The file that names all unreadable images would have been in the folder.
    if folder.unreadable:
        first = ", ".join(sorted(folder.unreadable)[:_MAX_NAMED])
        console.print_message(
            f"images that could not be used include {first}; python -m relloc.prepare names all "
            "of a data set"
        )


def _print_mlflow_links(folder: RunFolder, problem: str | None) -> None:
    """Prints how to open the run in MLflow, and `problem`, what MLflow could not be told."""
    if problem:
        console.print_message(problem)
    note = read_note(folder.path)
    if note and folder.uri:
        link = ui_link(folder.uri, note.experiment_id)
        console.print_message("compare runs in MLflow:", f"  {ui_command(folder.uri)}", f"  {link}")
