"""A run's folder while the run lives: its record, its mirror in MLflow, and the words at the end."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

from relloc import ranks
from relloc.checkpoints.places import BACKBONE_FILE, TRAINING_FOLDER, saved_trainings
from relloc.errors import UsageError
from relloc.files import remove_all_unfinished, write_whole
from relloc.pretext.stopping import Stopped
from relloc.results import RESULTS_FILE, read_results
from relloc.runs import console
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.invocation import Invocation
from relloc.runs.refusing import HYDRA_FOLDER, STATES, FolderBefore
from relloc.runs.saving import TRAINING_FILE
from relloc.status import Status
from relloc.sweeps.points import POINT_FILE
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
from relloc.tracking.holding import LOCK_FILE, held
from relloc.tracking.journal import JOURNAL_FILE
from relloc.tracking.note import NOTE_FILE
from relloc.tracking.record import RUN_FILE, STATUS_FILE

UNREADABLE_FILE = "unreadable.txt"
_NAMED = 5
# What tells that a run had a folder; a command's log may be written there before it begins
_OF_A_RUN = {
    RUN_FILE,
    POINT_FILE,
    LOCK_FILE,
    STATES,
    TRAINING_FILE,
    JOURNAL_FILE,
    RESULTS_FILE,
    BACKBONE_FILE,
}
_OF_A_RUN |= {HYDRA_FOLDER, STATUS_FILE, TRAINING_FOLDER, ARTIFACTS_FILE, NOTE_FILE}
_LOGS = {".log", ".out", ".err", ".txt"}


@dataclasses.dataclass
class RunFolder:
    """The folder of a run while it lives.

    `uri` is the MLflow store that follows it. `is_mistake` says that a mistake ended it, so that the same command
    would end alike. `kept` names the files that the tracker copies, `unreadable` has the images that could not be
    used, and why.
    """

    path: Path
    uri: str | None
    status: Status = Status.FAILED
    is_mistake: bool = False
    kept: set[str] = dataclasses.field(default_factory=set)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

    def keep(self, name: str) -> None:
        """Have the tracker hold a copy of a file of this folder."""
        add_artifact(self.path, name)
        self.kept.add(name)

    def summarize(self, fingerprints: Collection[str] | None = None) -> None:
        """The run is finished: say what came out, and where it is. `fingerprints` are of the rows to show."""
        self.status = Status.DONE
        rows = [
            row
            for row in read_results(self.path)
            if fingerprints is None or row.fingerprint in fingerprints
        ]
        evaluated = [row for row in rows if row.kind != "pretext"]
        console.say(*(console.pretext_line(row) for row in rows if row not in evaluated))
        if evaluated:
            console.show_results(evaluated)
        if rows:
            self.keep(RESULTS_FILE)

    def tell_unreadable(self) -> None:
        """Name the images that could not be used, together with those of earlier parts of the run."""
        if not self.unreadable:
            return
        lines = {f"{name}: {reason}" for name, reason in self.unreadable.items()}
        known = self.path / UNREADABLE_FILE
        if known.exists():
            lines.update(known.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
        content = "".join(f"{line}\n" for line in sorted(lines))
        write_whole(known, content.encode("utf-8", "surrogateescape"))
        self.keep(UNREADABLE_FILE)
        console.say(
            f"{len(lines)} images could not be used, such as {min(lines)}; all are named in {known}"
        )


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """The folder that rank 0 gives, for all ranks: no other command has it until the block ends.

    Nothing may be read or written there outside of the block.

    Raises:
        FolderIsTaken: another run has it.
        UsageError: it holds files of something else.
    """
    run_dir = Path(ranks.from_first(str(folder)))
    with contextlib.ExitStack() as at_end:
        refusal = None
        try:
            if ranks.rank() == 0:
                _refuse_others_files(run_dir)
                at_end.enter_context(held(run_dir))
        except UsageError as error:
            refusal = error
        if ranks.from_first(refusal is not None):
            raise refusal or SystemExit(UsageError.exit_code)  # rank 0 says it for all
        yield run_dir


def _refuse_others_files(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    others = sorted(
        name for name in names if not name.startswith(".") and Path(name).suffix not in _LOGS
    )
    if others and names.isdisjoint(_OF_A_RUN):
        raise UsageError(
            f"hydra.run.dir={run_dir} holds {others[0]}{' and more' if others[1:] else ''}, but nothing of a run: give "
            "a folder that is new, or that of a run"
        )


def check_files(path: Path) -> None:
    """Whether what a run goes on from can be read, before anything is changed. Raises `DamagedFile` where it can't."""
    if ranks.rank() > 0:
        return
    with contextlib.suppress(FileNotFoundError):
        RunRecord.read(path)
    list_artifacts_to_send(path)
    read_journal(path)
    read_results(path)


@contextlib.contextmanager
def open_folder(invocation: Invocation, record: RunRecord, path: Path) -> Iterator[RunFolder]:
    """Write the record and config, follow the run in MLflow, and say at the end where everything is.

    A mistake that is told before anything was trained or measured leaves the folder as it was, and no run in MLflow.
    """
    folder = RunFolder(path, invocation.settings["tracking"]["uri"])
    console.say(f"run     {path}")
    before = FolderBefore.of(path)
    # Of a run that was killed while it wrote. The note on MLflow is relloc.sync's as well, which may be writing it now.
    for place in (path, path / HYDRA_FOLDER):
        remove_all_unfinished(place, but=NOTE_FILE)
    record.write(path)
    for name, text in invocation.files.items():
        write_whole(path / name, text.encode("utf-8", "surrogateescape"))
    folder.keep(CONFIG_FILE)
    mirror = Mirror(path, folder.uri, warn=console.say) if folder.uri else None
    try:
        write_status(path, Status.RUNNING)
        if mirror:
            mirror.start()
        yield folder
    except (KeyboardInterrupt, Stopped):
        folder.status = Status.STOPPED
        kept = (
            "what was saved and evaluated before stays"
            if _has_work(path)
            else "nothing had been saved yet"
        )
        console.say(f"interrupted; {kept}")
        raise
    except UsageError as error:
        folder.is_mistake = error.exit_code == UsageError.exit_code
        raise
    finally:
        if folder.is_mistake and before.has_no_new_work():
            _leave_as_before(folder, mirror, before)
        else:
            _close(folder, mirror, named=invocation.names_folder)


def _close(folder: RunFolder, mirror: Mirror | None, *, named: bool) -> None:
    """Note how the run ended, send MLflow the rest, and say where everything is.

    `named` says whether the command names its folder.
    """
    try:
        folder.tell_unreadable()
        write_status(folder.path, folder.status)
    except OSError as error:  # such as a full disk, which then has ended the run too
        console.say(f"{error.filename or folder.path} can't be written ({error.strerror})")
    if mirror:
        _say_where(folder, mirror.close(folder.status))
    console.say(f"run     {folder.path}: {folder.status.word}")
    path = folder.path
    if folder.status is not Status.DONE and not folder.is_mistake:
        does = "goes on from there" if _has_work(path) else "starts it anew"
        console.say(
            f"        the same command {'' if named else f'with hydra.run.dir={path} '}{does}"
        )


def _has_work(path: Path) -> bool:
    """Whether the folder has anything that a run goes on from."""
    return bool(saved_trainings(path)) or (path / STATES).exists() or (path / RESULTS_FILE).exists()


def _leave_as_before(folder: RunFolder, mirror: Mirror | None, before: FolderBefore) -> None:
    """End a run because of a mistake as if it had never begun."""
    if mirror:
        mirror.close(before.status or Status.FAILED)
        if before.is_new:
            with contextlib.suppress(
                StoreError
            ):  # it can't be reached: then it has no run to forget, or keeps it
                forget(folder.path)
    try:
        before.restore(folder.kept)
    except OSError as error:  # the mistake itself is told all the same
        console.say(
            f"{error.filename or folder.path} can't be written ({error.strerror}): the folder is not as it was"
        )
    if folder.unreadable:  # the file with all of them would be in the folder
        first = ", ".join(sorted(folder.unreadable)[:_NAMED])
        console.say(
            f"could not be used: {first} and others, if any; python -m relloc.prepare names all of a data set"
        )


def _say_where(folder: RunFolder, trouble: str | None) -> None:
    if trouble:
        console.say(trouble)
    note = read_note(folder.path)
    if note and folder.uri:
        link = ui_link(folder.uri, note.experiment_id)
        console.say("compare runs in MLflow:", f"  {ui_command(folder.uri)}", f"  {link}")
