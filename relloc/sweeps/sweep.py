"""A sweep's folder: which points it has, the code and configs as they were, and its logs."""

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
from relloc.sweeps.points import Point
from relloc.sweeps.standing import Standing
from relloc.tracking.record import COMMIT_FILE, commit_of

SWEEP_FILE = "sweep.json"
CODE = "code"
LOGS = "logs"
CANCELLED = "cancelled"
_LOCK = ".lock"
_VERSION = 2  # of how points are told apart by their settings: 1 counted device, and the recipe as part of the data
_SWEEPS = "sweeps"  # in the folder of runs
_WORD = "sweep="
_NOTE_LOST = "Remove it, and start the sweep's command again, which finds its points"
_MOST_BYTES = 200  # of a name: file systems take 255, and logs and jobs put something beside it
# What separates folders, here or elsewhere, entries of PYTHONPATH, or points; and what sbatch replaces in names of logs
_NOT_IN_A_NAME = frozenset("/\\:,%")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Note:
    """What sweep.json holds that is read again."""

    points: list[Point]
    version: int = 1


class Sweep:
    """The folder of a sweep, which any number of commands of the same name share.

    `lock` is the file that commands lock which may run the same points, by default one beside the folder.
    """

    def __init__(self, folder: Path, lock: Path | None = None) -> None:
        self.folder = folder
        self._lock = lock or folder.parent / _LOCK
        self._made = contextlib.ExitStack()  # removes what this command made

    @property
    def name(self) -> str:
        return self.folder.name

    def points(self) -> list[Point]:
        """All points that commands of this sweep had. Raises `UsageError` where there is no sweep, or none to read."""
        if not (self.folder / SWEEP_FILE).exists():
            raise UsageError(f"{self.folder} is not the folder of a sweep: {SWEEP_FILE} is missing")
        return self._note().points

    def _note(self) -> _Note:
        """Without points where no command has noted any yet. Raises `UsageError` for a note that can't be read."""
        try:
            return read_json(self.folder / SWEEP_FILE, _Note, "the note of a sweep", _NOTE_LOST)
        except FileNotFoundError:
            return _Note(points=[], version=_VERSION)

    def check_version(self) -> None:
        """Raises `UsageError` where an earlier version noted points, which would not be found again but run twice."""
        if self._note().version != _VERSION:
            raise UsageError(
                f"{self.folder} was begun by another version of relloc, which tells points apart by other settings: "
                "finish it with that version, or give another name, sweep=NAME. What it measured stays, and is reported"
            )

    def add(self, points: Sequence[Point], command: Sequence[str]) -> None:
        """Note points, those already there once; the caller has it `locked`."""
        of_identity = {point.identity: point for point in (*self._note().points, *points)}
        noted = {
            "version": _VERSION,
            "command": list(command),
            "points": [point.to_json() for point in of_identity.values()],
        }
        write_json(self.folder / SWEEP_FILE, noted)

    def copy(self, content: Mapping[str, bytes]) -> Path:
        """Write a copy of code and configs, from which jobs run whenever they start; the folder to import from.

        A second command of a sweep shares the copy of the first where nothing has changed.
        """
        place = self.place_of(content)
        if place.exists():
            return place
        self._make_folder(place.parent)
        new = self.folder / f".{CODE}.{os.getpid()}"
        try:
            for name, data in content.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(data)
            os.replace(new, place)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._made.callback(shutil.rmtree, place, ignore_errors=True)
        return place

    def place_of(self, content: Mapping[str, bytes]) -> Path:
        """Where `copy` would put that; nothing is written."""
        places = (self.folder / CODE / str(number) for number in itertools.count())
        return next(place for place in places if not place.exists() or content_of(place) == content)

    def leave_nothing(self) -> None:
        """Remove what this command made here, and nothing else, unless points were noted."""
        if not (self.folder / SWEEP_FILE).exists():
            self._made.close()

    def cancel(self) -> None:
        """Tell commands that run this sweep's points on their own machine to start no more."""
        (self.folder / CANCELLED).touch()

    def is_cancelled(self, since_s: float | None = None) -> bool:
        """Whether that was told after a time in seconds since 1970, by default after any command added points."""
        try:
            since_s = (self.folder / SWEEP_FILE).stat().st_mtime if since_s is None else since_s
            return (self.folder / CANCELLED).stat().st_mtime > since_s
        except FileNotFoundError:
            return False

    def with_cancelled(self, found: Sequence[Standing]) -> list[Standing]:
        """The standings of points, where those that no command began any more are cancelled, not missing."""
        if not self.is_cancelled():
            return list(found)
        return [
            dataclasses.replace(now, status=Status.CANCELLED)
            if now.status is Status.MISSING
            else now
            for now in found
        ]

    def log(self, point: Point) -> Path:
        """Where the point's output goes that no scheduler keeps."""
        return self.folder / LOGS / f"{point.folder.name}.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time looks what is to be run, and says what it runs."""
        self._make_folder(self._lock.parent)
        self._make_folder(self.folder)
        with locked(self._lock):
            yield

    def _make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(missing):
            # Another command's files stay, and so the folder
            self._made.enter_context(contextlib.suppress(OSError))
            self._made.callback(path.rmdir)


def check_name(name: object) -> None:
    """Raises `UsageError` for what can't name a folder of its own in runs/sweeps, and a sweep on a command line."""
    told = "" if name is None else str(name)
    whole = told.strip() == told and told.isprintable() and 0 < len(told.encode()) <= _MOST_BYTES
    if not whole or told[0] in ".-" or _NOT_IN_A_NAME & set(told):
        raise UsageError(
            f"sweep={told or 'null'} names no sweep: it is to be the name of one folder in runs/sweeps, of letters, "
            "digits and signs such as _ and -, the first of them neither . nor - (hydra.sweep.dir=FOLDER puts the "
            "folder elsewhere)"
        )


def check_folder(folder: Path, runs: Path) -> None:
    """Raises `UsageError` for a folder that holds other things than a sweep, or can't be one.

    In `runs`/sweeps any folder may be, as that is where a command that was killed left one.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"hydra.sweep.dir={folder} can't be a folder: {there} is a file")
    if folder != there or folder.parent == runs / _SWEEPS or (folder / SWEEP_FILE).exists():
        return
    if Path.cwd().is_relative_to(folder):
        raise UsageError(
            f"hydra.sweep.dir={folder} holds the folder that this command runs in: name a folder below it"
        )
    if any(folder.iterdir()):
        raise UsageError(
            f"hydra.sweep.dir={folder} holds files that are no sweep's: name a folder that is new, or that of a sweep"
        )


def runs_folder() -> Path:
    """The folder of runs that commands share which compose no config."""
    return Path(os.environ.get("RELLOC_RUNS") or "runs")


def lock_of(runs: Path) -> Path:
    """The lock of all sweeps whose points lie in a folder of runs."""
    return runs / _SWEEPS / _LOCK


def find_sweep(word: str) -> Sweep:
    """The sweep that a word names: its name, sweep=NAME, or its folder. Raises `UsageError` where there is none."""
    name = word.removeprefix(_WORD)
    sweeps = runs_folder() / _SWEEPS
    places = [Path(name)] if "/" in name else [sweeps / name, Path(name)]
    for folder in places if name else ():
        if (folder / SWEEP_FILE).exists():
            return Sweep(Path(os.path.abspath(folder)))
    if "/" in name:
        raise UsageError(
            f"{Path(name).absolute()} is not the folder of a sweep: {SWEEP_FILE} is missing"
        )
    there = ", ".join(sorted(file.parent.name for file in sweeps.glob(f"*/{SWEEP_FILE}")))
    known = (
        f"name one of {there}" if there else "it has none; RELLOC_RUNS names another folder of runs"
    )
    raise UsageError(f"{name or word} is no sweep of {sweeps}: {known}")


def is_named(word: str) -> bool:
    """Whether runs/sweeps has a sweep of that name."""
    return "/" not in word and word != "" and (runs_folder() / _SWEEPS / word / SWEEP_FILE).exists()


def word_of(folder: Path) -> str:
    """How a sweep is named to relloc.report and relloc.sweep from where one stands: its name, or else its folder."""
    if folder == Path(os.path.abspath(runs_folder() / _SWEEPS / folder.name)):
        return folder.name
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def code_and_configs(
    *, package: Path, conf: Path, plugins: Path, own: Mapping[str, Path]
) -> dict[str, bytes]:
    """The code, its commit and configs of now, by their names in the copy.

    Of the user's folders of configs (`own`, by the name of the copy) only what Hydra can read is taken, as other
    things may lie beside it.
    """
    content = {"relloc": content_of(package), f"hydra_plugins/{plugins.name}": content_of(plugins)}
    if commit := commit_of(package / "__init__.py"):
        content["relloc"][COMMIT_FILE] = f"{commit}\n".encode()
    if not (package / "conf").is_dir():
        content["conf"] = content_of(conf)
    for copied, folder in own.items():
        content[copied] = content_of(folder, suffix=".yaml")
    return {
        f"{copied}/{name}": data
        for copied, files in content.items()
        for name, data in files.items()
    }


def content_of(folder: Path, *, suffix: str = "") -> dict[str, bytes]:
    """The files below a folder, by their names from there; what Python compiled is left out."""
    found = {}
    for path, folders, files in os.walk(folder, followlinks=True):
        above = Path(os.path.realpath(os.path.dirname(path)))
        if path != str(folder) and above.is_relative_to(
            os.path.realpath(path)
        ):  # a link to a folder above
            folders.clear()
            continue
        folders[:] = [
            name
            for name in folders
            if name != "__pycache__" and not (suffix and name.startswith("."))
        ]
        for name in files:
            file = Path(path, name)
            if name.endswith(suffix) and not name.endswith(".pyc") and file.is_file():
                found[str(file.relative_to(folder))] = file.read_bytes()
    return found
