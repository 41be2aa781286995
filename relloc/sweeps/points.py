"""The points of a sweep: what each is, so that it is recognized again, and where it runs."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc import neutral
from relloc.errors import DamagedFile
from relloc.files import read_json, write_json
from relloc.status import Status
from relloc.tracking.record import now_ms

POINT_FILE = "point.json"
_PATHS = (
    "root",
    "shards",
    "checkpoint",
)  # settings that name files, in `data`, in what evaluations bring, and alone
_NO_PATHS = ("random", "torchvision")  # what `checkpoint` takes besides
_IDENTITY_DIGITS = 12
_NOTE_LOST = "Remove it if no job or process has the point"
_PLAIN = re.compile(r"[\w./+:@%-]*")  # what Hydra takes as a value without quotes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep.

    `kind` is the command that runs it, train or evaluate; `name` says what is swept; `overrides` are
    all words that compose it; `identity` hashes the config; and `folder` is the run's, the same for
    every sweep that has this point. `options` are Hydra's options that stand before these words, such as
    --config-dir; `cwd` is the folder from which relative paths count; `resend` has the words after `python` that
    send the point to the cluster again where its sweep's command sent it, and none where that ran it itself.
    """

    kind: str
    name: str
    overrides: tuple[str, ...]
    identity: str
    folder: Path
    options: tuple[str, ...] = ()
    cwd: str = ""
    resend: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """What Python is to run: the module, and the words that compose the run and name its folder."""
        folder = str(self.folder)
        if not _PLAIN.fullmatch(folder):  # quoted as Hydra's grammar has it
            folder = "'" + folder.replace("\\", "\\\\").replace("'", "\\'") + "'"
        return [
            "-m",
            f"relloc.{self.kind}",
            *self.options,
            *self.overrides,
            f"hydra.run.dir={folder}",
        ]

    @property
    def again(self) -> str:
        """A line for a shell that runs this point alone once more, with the code of then, where the sweep ran it."""
        line = shlex.join(["python", *(self.resend or self.arguments)])
        return line if self.cwd in ("", os.getcwd()) else f"cd {shlex.quote(self.cwd)} && {line}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"folder": str(self.folder)}


def identity(config: Mapping[str, Any]) -> str:
    """Short hash of a resolved config, without settings that don't belong to a point.

    Relative paths count from the current folder: elsewhere they name other files.
    """
    kept = _with_whole_paths(neutral.settings_of_run(config))
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:_IDENTITY_DIGITS]


def _with_whole_paths(value: Any, name: str = "") -> Any:
    """A setting of that name; those of `_PATHS`, at any depth and also in lists, become absolute paths.

    An absolute path stays as it is written, so that points of earlier sweeps are found again.
    """
    if isinstance(value, Mapping):
        return {key: _with_whole_paths(inner, key) for key, inner in value.items()}
    if name not in _PATHS:
        return value
    if isinstance(value, list):
        return [_with_whole_paths(one, name) for one in value]
    is_relative = (
        isinstance(value, str) and value and value not in _NO_PATHS and not os.path.isabs(value)
    )
    return os.path.abspath(value) if is_relative else value


def folder_of(runs: Path, kind: str, name: str, mark: str) -> Path:
    """The run folder of a point: the one that an earlier sweep gave it, else `runs`/KIND_NAME_IDENTITY."""
    readable = re.sub(r"[^\w.+-]+", "_", name).strip("_")[:80]
    new = runs / "_".join(filter(None, (kind, readable, mark)))
    return next(filter(Path.is_dir, sorted(runs.glob(f"{kind}_*{mark}"))), new)


def name_of(overrides: Sequence[str], swept: Sequence[str], seed: int) -> str:
    """What is swept, shortly: `gap_px=48 jitter_px=7`; the seed where nothing is."""
    words = (word.lstrip("+~").partition("=") for word in overrides)
    told = [f"{key.rpartition('.')[2]}={value}" for key, _, value in words if key in swept]
    return " ".join(told) or f"seed={seed}"


def note_job(point: Point, job: Mapping[str, Any]) -> None:
    """Write into the run folder which job runs the point, such as {"slurm": "7_2"}, atomically."""
    point.folder.mkdir(parents=True, exist_ok=True)
    write_json(point.folder / POINT_FILE, point.to_json() | {"job": dict(job), "time_ms": now_ms()})


def note_ending(folder: Path, how: Status) -> None:
    """Note that the job which has the point was asked to end, so that it is CANCELLED or STOPPED.

    A run that had not begun can't say so itself. The note of the next job takes its place; where no job was noted,
    nothing is.
    """
    if (note := read_note(folder)) and note.get("ended") != Status.CANCELLED.word:
        write_json(folder / POINT_FILE, note | {"ended": how.word})


def read_note(folder: Path) -> dict[str, Any]:
    """What `note_job` and `note_ending` wrote last; empty where nothing was. Raises `DamagedFile`."""
    path = folder / POINT_FILE
    try:
        note: dict[str, Any] = read_json(path, dict[str, Any], "the note of a point", _NOTE_LOST)
    except FileNotFoundError:
        return {}
    job = note.get("job")
    if not isinstance(job, dict) or ("pid" in job and not {"host", "born"} <= job.keys()):
        raise DamagedFile(f"{path} does not say which job has the point. {_NOTE_LOST}")
    return note


def read_job(folder: Path) -> dict[str, Any]:
    """The job that was last noted; empty where none was. Raises `DamagedFile`."""
    return read_note(folder).get("job", {})
