"""A sweep's folder: which points it has, the code and configs as they were, and its logs."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from relloc.errors import UsageError
from relloc.files import locked, write_json
from relloc.sweeps.points import Point
from relloc.tracking.record import COMMIT_FILE, commit_of

SWEEP_FILE = "sweep.json"
CODE = "code"
OWN_CONF = "own_conf"
LOGS = "logs"
CANCELLED = "cancelled"


class Sweep:
    """The folder of a sweep, which any number of commands of the same name share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    def points(self) -> list[Point]:
        """All points that commands of this sweep had. Raises `UsageError` where there is no sweep, or none to read."""
        try:
            noted = json.loads((self.folder / SWEEP_FILE).read_text(encoding="utf-8"))
            return [Point.from_json(fields) for fields in noted["points"]]
        except FileNotFoundError:
            raise UsageError(f"{self.folder} is not the folder of a sweep: {SWEEP_FILE} is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.folder / SWEEP_FILE} is damaged ({error}): remove it, and start the sweep's command again, "
                "which finds its points"
            ) from error

    def add(self, points: Sequence[Point], command: Sequence[str]) -> None:
        """Note points, those already there once; the caller has it `locked`."""
        there = self.points() if (self.folder / SWEEP_FILE).exists() else []
        of_identity = {point.identity: point for point in (*there, *points)}
        noted = {"command": list(command), "points": [point.to_json() for point in of_identity.values()]}
        write_json(self.folder / SWEEP_FILE, noted)

    def leave_nothing(self) -> None:
        """Remove what a command made here that was refused, unless there are points."""
        if (self.folder / SWEEP_FILE).exists():
            return
        shutil.rmtree(self.folder / CODE, ignore_errors=True)
        (self.folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's
        with contextlib.suppress(OSError):  # others' files stay
            self.folder.rmdir()

    def cancel(self) -> None:
        """Tell commands that run this sweep's points on their own machine to start no more."""
        (self.folder / CANCELLED).touch()

    def is_cancelled(self, since_s: float) -> bool:
        """Whether that was told after a time, in seconds since 1970."""
        try:
            return (self.folder / CANCELLED).stat().st_mtime > since_s
        except FileNotFoundError:
            return False

    def log(self, point: Point) -> Path:
        """Where the point's output goes that no scheduler keeps."""
        return self.folder / LOGS / f"{point.folder.name}.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time looks what is to be run, and says what it runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.parent / ".lock"):
            yield


def snapshot(folder: Path, *, package: Path, conf: Path, plugins: Path, own: Path | None = None) -> Path:
    """Copy the code, its commit and configs of now, from which jobs run whenever they start; the folder to import from.

    `own` are the user's configs, copied to `OWN_CONF`. A second command of a sweep shares the copy of the first
    where nothing has changed.
    """
    target = folder / CODE
    new = folder / f".{CODE}.{os.getpid()}"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(package, new / "relloc", ignore=ignored)
    if commit := commit_of(package / "__init__.py"):
        (new / "relloc" / COMMIT_FILE).write_text(f"{commit}\n", encoding="utf-8")
    if not (new / "relloc" / "conf").is_dir():
        shutil.copytree(conf, new / "conf", ignore=ignored)
    if own and own.is_dir():
        shutil.copytree(own, new / OWN_CONF, ignore=ignored)
    shutil.copytree(plugins, new / "hydra_plugins" / plugins.name, ignore=ignored)
    for number in range(1000):
        place = target / str(number)
        if not place.exists():
            target.mkdir(exist_ok=True)
            os.replace(new, place)
            return place
        if _same(new, place):
            shutil.rmtree(new)
            return place
    raise UsageError(f"{target} holds a thousand versions of the code: give the sweep another name (sweep=)")


def _same(one: Path, other: Path) -> bool:
    return _content(one) == _content(other)


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
