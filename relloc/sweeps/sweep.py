"""Manages the folder of a sweep: its list of points, a copy of code and configs, and logs.

sweep.json lists the points of all commands that were started with this sweep's name. code/ holds
the code that its jobs run, so that editing the repository does not change what waits in a queue.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from relloc.errors import UsageError
from relloc.files import locked, read_json, write_json
from relloc.status import Status
from relloc.sweeps.point_status import PointStatus
from relloc.sweeps.points import Point
from relloc.tracking.record import COMMIT_FILE, commit_of

SWEEP_FILE = "sweep.json"
CODE = "code"
LOGS = "logs"
CANCELLED = "cancelled"
_LOCK = ".lock"
# Version of how points are identified by their settings. 1 counted the device, and had the recipe
# as a part of the data
_VERSION = 2
_SWEEPS = "sweeps"  # in the folder of runs
_PREFIX = "sweep="
_HOW_TO_REPAIR = "Remove it, and start the sweep's command again, which finds its points"
# The longest name. File systems take 255 bytes, and names of logs and jobs add something
_MOST_BYTES = 200
# Signs that separate folders (here or on Windows), entries of PYTHONPATH, or points; and the one
# that sbatch replaces in names of logs
_NOT_IN_A_NAME = frozenset("/\\:,%")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Note:
    """The fields of sweep.json that are read again."""

    points: list[Point]
    version: int = 1


class Sweep:
    """The folder of a sweep, which any number of commands share by its name.

    Args:
        folder: The folder, which need not exist yet.
        lock: The file that commands lock while they choose the points to run; by default one beside
            the folder. Sweeps that may have the same points are to have the same lock.
    """

    def __init__(self, folder: Path, lock: Path | None = None) -> None:
        self.folder = folder
        self._lock = lock or folder.parent / _LOCK
        # Removes what this command made, the last thing first, if it is closed
        self._made = contextlib.ExitStack()

    @property
    def name(self) -> str:
        """The name of the sweep, which is that of its folder."""
        return self.folder.name

    def points(self) -> list[Point]:
        """Returns all points of the sweep, of whichever command.

        If the folder of runs was moved or copied, the points are looked for where it is now.

        Raises:
            UsageError: The folder is not that of a sweep, or its list of points can't be read.
        """
        if not (self.folder / SWEEP_FILE).exists():
            raise UsageError(f"{self.folder} is not the folder of a sweep: {SWEEP_FILE} is missing")
        runs = self.folder.parent.parent
        points = []
        for point in self._note().points:
            moved = runs / point.folder.name
            if not point.folder.exists() and moved.exists():
                point = dataclasses.replace(point, folder=moved)
            points.append(point)
        return points

    def _note(self) -> _Note:
        """Returns the content of sweep.json, which is empty before the first command adds points.

        Raises:
            UsageError: The file can't be read.
        """
        try:
            return read_json(self.folder / SWEEP_FILE, _Note, "the note of a sweep", _HOW_TO_REPAIR)
        except FileNotFoundError:
            return _Note(points=[], version=_VERSION)

    def check_version(self) -> None:
        """Checks that the sweep was begun by a version that identifies points as this one does.

        Otherwise its points would not be found again, but be run twice.

        Raises:
            UsageError: It was begun by another version.
        """
        if self._note().version != _VERSION:
            raise UsageError(
                f"{self.folder} was begun by another version of relloc, which identifies points "
                "by other settings: finish it with that version, or give another name, sweep=NAME. "
                "What it measured stays, and is reported"
            )

    def add(self, points: Sequence[Point], command: Sequence[str]) -> None:
        """Adds points to the sweep. The caller must hold its lock, `locked`.

        Args:
            points: The points; one that the sweep has already is replaced.
            command: The words of the command that adds them, for the record.
        """
        by_identity = {point.identity: point for point in self._note().points}
        by_identity |= {point.identity: point for point in points}
        content = {
            "version": _VERSION,
            "command": list(command),
            "points": [point.to_json() for point in by_identity.values()],
        }
        write_json(self.folder / SWEEP_FILE, content)

    def copy(self, content: Mapping[str, bytes]) -> Path:
        """Writes a copy of code and configs, and returns the folder that Python imports it from.

        Jobs run the copy, whenever they start. A second command of the sweep shares the copy of the
        first where nothing has changed.

        Args:
            content: The files by their names in the copy, as `code_and_configs` returns them.
        """
        target = self.copy_folder(content)
        if target.exists():
            return target
        self._make_folder(target.parent)
        # Written under another name and renamed when whole, so that a killed command leaves no part
        # of the code where jobs would import it
        new = self.folder / f".{CODE}.{os.getpid()}"
        try:
            for name, data in content.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(data)
            os.replace(new, target)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._made.callback(shutil.rmtree, target, ignore_errors=True)
        return target

    def copy_folder(self, content: Mapping[str, bytes]) -> Path:
        """Returns the folder where `copy` puts that content, and writes nothing.

        It is the first of code/0, code/1, ... that has the same content or does not exist.
        """
        folders = (self.folder / CODE / str(number) for number in itertools.count())
        return next(
            folder for folder in folders if not folder.exists() or content_of(folder) == content
        )

    def leave_nothing(self) -> None:
        """Removes what this command made in the folder, unless points were added."""
        if not (self.folder / SWEEP_FILE).exists():
            self._made.close()

    def cancel(self) -> None:
        """Makes commands that run the sweep's points on their own machine start no more of them."""
        (self.folder / CANCELLED).touch()

    def is_cancelled(self, since_s: float | None = None) -> bool:
        """Returns whether `cancel` was called after a time.

        Args:
            since_s: The time in seconds since 1970, by default that of the last added points: a
                command that adds points goes on with a sweep that was cancelled.
        """
        try:
            if since_s is None:
                since_s = (self.folder / SWEEP_FILE).stat().st_mtime
            return (self.folder / CANCELLED).stat().st_mtime > since_s
        except FileNotFoundError:
            return False

    def with_cancelled(self, found: Sequence[PointStatus]) -> list[PointStatus]:
        """Returns the status of points; if the sweep was cancelled, missing ones are CANCELLED."""
        if not self.is_cancelled():
            return list(found)
        # Points that had not begun have no folder that could say so
        corrected = []
        for one in found:
            if one.status is Status.MISSING:
                one = dataclasses.replace(one, status=Status.CANCELLED)
            corrected.append(one)
        return corrected

    def log(self, point: Point) -> Path:
        """Returns the file that has the output of a point that no scheduler runs."""
        return self.folder / LOGS / f"{point.folder.name}.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the sweep's lock, making its folder.

        One command at a time finds out which points are to be run and notes that it runs them, so
        that no point is run twice.
        """
        self._make_folder(self._lock.parent)
        self._make_folder(self.folder)
        with locked(self._lock):
            yield

    def _make_folder(self, folder: Path) -> None:
        """Makes a folder, and notes for `leave_nothing` which folders did not exist before."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(missing):
            # A folder in which another command has put files can't be removed, and stays
            self._made.enter_context(contextlib.suppress(OSError))
            self._made.callback(path.rmdir)


def check_name(name: object) -> None:
    """Checks that a value of sweep= can name a folder in runs/sweeps, and a word of a command line.

    Raises:
        UsageError: It can't.
    """
    text = "" if name is None else str(name)
    is_plain = text.strip() == text and text.isprintable()
    # Only what is printable can be encoded
    is_word = is_plain and 0 < len(text.encode()) <= _MOST_BYTES
    # A dot would hide the folder, and a dash begins an option
    if not is_word or text[0] in ".-" or _NOT_IN_A_NAME & set(text):
        raise UsageError(
            f"sweep={text or 'null'} names no sweep: it is to be the name of one folder in "
            "runs/sweeps, of letters, digits and signs such as _ and -, the first of them neither "
            ". nor - (hydra.sweep.dir=FOLDER puts the folder elsewhere)"
        )


def check_folder(folder: Path, runs: Path) -> None:
    """Checks that a folder can be that of a sweep: new, empty, or a sweep's already.

    In `runs`/sweeps any folder can, as a command that was killed may have left one there.

    Raises:
        UsageError: It can't.
    """
    # The folder, or the lowest of the folders above it that exists
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"hydra.sweep.dir={folder} can't be a folder: {existing} is a file")
    is_new = folder != existing
    is_in_sweeps = folder.parent == runs / _SWEEPS
    if is_new or is_in_sweeps or (folder / SWEEP_FILE).exists():
        return
    # A sweep's folder may be removed as a whole, which is not to take anything else along
    if Path.cwd().is_relative_to(folder):
        raise UsageError(
            f"hydra.sweep.dir={folder} holds the folder that this command runs in: "
            "name a folder below it"
        )
    if any(folder.iterdir()):
        raise UsageError(
            f"hydra.sweep.dir={folder} holds files that are no sweep's: "
            "name a folder that is new, or that of a sweep"
        )


def runs_folder() -> Path:
    """Returns the folder of runs for commands that compose no config: RELLOC_RUNS, or runs/."""
    return Path(os.environ.get("RELLOC_RUNS") or "runs")


def lock_of(runs: Path) -> Path:
    """Returns the lock of all sweeps whose points lie in a folder of runs, and may be the same."""
    return runs / _SWEEPS / _LOCK


def find_sweep(word: str) -> Sweep:
    """Returns the sweep that a word of a command line names: NAME, sweep=NAME, or its folder.

    Raises:
        UsageError: There is no such sweep.
    """
    name = word.removeprefix(_PREFIX)
    sweeps = runs_folder() / _SWEEPS
    # A slash makes it a folder. A name without one is looked for in runs/sweeps first, then here
    folders = [Path(name)] if "/" in name else [sweeps / name, Path(name)]
    for folder in folders if name else ():
        if (folder / SWEEP_FILE).exists():
            return Sweep(Path(os.path.abspath(folder)))
    if "/" in name:
        raise UsageError(
            f"{Path(name).absolute()} is not the folder of a sweep: {SWEEP_FILE} is missing"
        )
    files = sweeps.glob(f"*/{SWEEP_FILE}")
    existing = sorted(file.parent.name for file in files)
    if existing:
        what_to_do = f"name one of {', '.join(existing)}"
    else:
        what_to_do = "it has none; RELLOC_RUNS names another folder of runs"
    raise UsageError(f"{name or word} is no sweep of {sweeps}: {what_to_do}")


def is_named(word: str) -> bool:
    """Returns whether runs/sweeps has a sweep of that name."""
    if "/" in word or word == "":
        return False
    return (runs_folder() / _SWEEPS / word / SWEEP_FILE).exists()


def word_of(folder: Path) -> str:
    """Returns the word by which commands find a sweep from here: its name, or else its folder."""
    by_name = os.path.abspath(runs_folder() / _SWEEPS / folder.name)
    if folder == Path(by_name):
        return folder.name
    # Shorter where it lies below the current folder
    if folder.is_relative_to(Path.cwd()):
        return os.path.relpath(folder)
    return str(folder)


def code_and_configs(
    *,
    package: Path,
    conf: Path,
    plugins: Path,
    own: Mapping[str, Path],
) -> dict[str, bytes]:
    """Returns the current files of code and configs by their names in a sweep's copy of them.

    Args:
        package: The folder of the package relloc.
        conf: The folder of relloc's configs.
        plugins: The folder of the launchers.
        own: The user's folders of configs by their names in the copy. Only YAML files of them are
            taken, as other things may lie beside them.
    """
    content = {
        "relloc": content_of(package),
        f"hydra_plugins/{plugins.name}": content_of(plugins),
    }
    # The copy is no git repository, so it is told its commit
    commit = commit_of(package / "__init__.py")
    if commit:
        content["relloc"][COMMIT_FILE] = f"{commit}\n".encode()
    # An installed package has the configs inside
    if not (package / "conf").is_dir():
        content["conf"] = content_of(conf)
    for copied, folder in own.items():
        content[copied] = content_of(folder, suffix=".yaml")
    files_by_name = {}
    for copied, files in content.items():
        for name, data in files.items():
            files_by_name[f"{copied}/{name}"] = data
    return files_by_name


def content_of(folder: Path, *, suffix: str = "") -> dict[str, bytes]:
    """Returns the content of all files below a folder, by their paths relative to it.

    Compiled Python files are left out. With a `suffix` only files that end so are taken, and hidden
    folders are left out.
    """
    content = {}
    for path, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above it would be walked for ever
        target = os.path.realpath(path)
        above = Path(os.path.realpath(os.path.dirname(path)))
        is_loop = above.is_relative_to(target)
        if path != str(folder) and is_loop:
            folders.clear()
            continue
        # os.walk descends into what is left in this list
        for name in list(folders):
            is_hidden = bool(suffix) and name.startswith(".")
            if name == "__pycache__" or is_hidden:
                folders.remove(name)
        for name in files:
            file = Path(path, name)
            is_wanted = name.endswith(suffix) and not name.endswith(".pyc")
            # Not what is no file, such as a broken link or a socket
            if is_wanted and file.is_file():
                content[str(file.relative_to(folder))] = file.read_bytes()
    return content
