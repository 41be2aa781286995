"""Defines the points of a sweep: each is one run, recognized by a hash of its settings.

A point has the same run folder in every sweep and for every launcher. The folder also holds a note,
point.json, on the job that runs the point.
"""

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
# Settings that name files: of `data`, also within evaluations; `checkpoint` and `watch` at the top
_PATHS = ("root", "shards", "checkpoint", "watch")
_NO_PATHS = ("random", "torchvision", "person")  # values of `checkpoint` that are no files
_IDENTITY_DIGITS = 12
_LONGEST_NAME = 80  # characters of a point's name in that of its folder
_HOW_TO_REPAIR = "Remove it if no job or process has the point"
# What Hydra takes as a value without quotes
_PLAIN = re.compile(r"[\w./+:@%-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep.

    Attributes:
        kind: The command that runs it, train or evaluate.
        name: The values of the swept settings, such as `gap_px=48 jitter_px=7`.
        overrides: All words that compose its config.
        identity: A hash of its settings.
        folder: Its run folder, the same for every sweep that has this point.
        options: Hydra's options that stand before the overrides, such as --config-dir.
        cwd: The folder from which relative paths count.
        resend: The words after `python` that send the point to the cluster again; empty where the
            sweep's command ran the point itself.
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
        """The words after `python` that run the point: module, options, overrides and folder."""
        folder = str(self.folder)
        if not _PLAIN.fullmatch(folder):
            # In quotes, as Hydra's grammar has it
            escaped = folder.replace("\\", "\\\\").replace("'", "\\'")
            folder = f"'{escaped}'"
        return [
            "-m",
            f"relloc.{self.kind}",
            *self.options,
            *self.overrides,
            f"hydra.run.dir={folder}",
        ]

    @property
    def again(self) -> str:
        """A shell command that runs this point alone once more, as its sweep ran it."""
        words = self.resend or self.arguments
        line = shlex.join(["python", *words])
        # Relative paths count from where the sweep was started
        if self.cwd in ("", os.getcwd()):
            return line
        return f"cd {shlex.quote(self.cwd)} && {line}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON can hold them."""
        fields = dataclasses.asdict(self)
        fields["folder"] = str(self.folder)
        return fields


def identity_of(config: Mapping[str, Any]) -> str:
    """Returns the identity of a point: a hash of its settings, in 12 hexadecimal digits.

    Settings that must not change results (launcher, tracking, workers, ...) are left out, as
    `relloc.neutral` lists them. Where images and checkpoints lie counts, since other files may hold
    something else. Relative paths count from the current folder.

    Args:
        config: The resolved config.
    """
    settings = neutral.settings_of_run(config)
    settings = _with_absolute_paths(settings)
    # Sorted, as the order in which settings were composed means nothing
    text = json.dumps(
        settings,
        sort_keys=True,
        ensure_ascii=False,
        default=str,
    )
    # Names of files may have bytes that are no UTF-8
    data = text.encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(data).hexdigest()
    return digest[:_IDENTITY_DIGITS]


def _with_absolute_paths(value: Any, name: str = "") -> Any:
    """Returns the value of a setting with the relative paths in it made absolute.

    Paths are the settings of `_PATHS`, at any depth and also in lists. An absolute path stays as it
    is written, so that points of earlier sweeps are found again.
    """
    if isinstance(value, Mapping):
        settings = {}
        for key, inner in value.items():
            settings[key] = _with_absolute_paths(inner, key)
        return settings
    if name not in _PATHS:
        return value
    # Several files, or the folders of several data sets
    if isinstance(value, list):
        return [_with_absolute_paths(item, name) for item in value]
    # null, an empty text, and models without a file
    if not isinstance(value, str) or value in ("", *_NO_PATHS):
        return value
    if os.path.isabs(value):
        return value
    return os.path.abspath(value)


def folder_of(runs: Path, kind: str, name: str, identity: str) -> Path:
    """Returns the run folder of a point.

    It is the one that an earlier sweep gave the point, else `runs`/KIND_NAME_IDENTITY.

    Args:
        runs: The folder of runs.
        kind: The command that runs the point, train or evaluate.
        name: The name of the point, of which the folder's name has the readable part.
        identity: The identity of the point, as `identity_of` returns it.
    """
    # Long names are cut: the identity tells their points from others
    readable = re.sub(r"[^\w.+-]+", "_", name)
    readable = readable.strip("_")
    readable = readable[:_LONGEST_NAME]
    # Another sweep may have named the same point by other settings
    existing = runs.glob(f"{kind}_*{identity}")
    for folder in sorted(existing):
        if folder.is_dir():
            return folder
    # A name of nothing but other characters leaves no readable part
    words = filter(None, (kind, readable, identity))
    return runs / "_".join(words)


def name_of(overrides: Sequence[str], swept: Sequence[str], seed: int) -> str:
    """Returns the name of a point: its values of the swept settings, or its seed if there are none.

    Example:
        >>> name_of(["model=small", "grid.gap_px=48"], ["grid.gap_px"], seed=0)
        'gap_px=48'
    """
    words = []
    for override in overrides:
        # Hydra's + adds a setting, and ~ removes one
        word = override.lstrip("+~")
        key, _, value = word.partition("=")
        if key in swept:
            _, _, last_part = key.rpartition(".")
            words.append(f"{last_part}={value}")
    return " ".join(words) or f"seed={seed}"


def note_job(point: Point, job: Mapping[str, Any]) -> None:
    """Writes to point.json which job runs the point; readers see the old or the new note, whole.

    Args:
        point: The point, whose folder is made if it does not exist.
        job: The scheduler's name and number, such as {"slurm": "7_2"}, or the process that runs the
            point, as `process_identity` identifies it.
    """
    point.folder.mkdir(parents=True, exist_ok=True)
    note = point.to_json()
    note["job"] = dict(job)
    note["time_ms"] = now_ms()
    write_json(point.folder / POINT_FILE, note)


def note_ending(folder: Path, how: Status) -> None:
    """Notes that the job of a point was asked to end, so that its status is CANCELLED or STOPPED.

    A run that had not begun can't say so itself. The next job's note replaces this one. Where no
    job was noted, nothing is written.
    """
    note = read_note(folder)
    # Cancelling goes first: the process that then ends says that it was stopped
    is_cancelled = note.get("ended") == Status.CANCELLED.word
    if note and not is_cancelled:
        note["ended"] = how.word
        write_json(folder / POINT_FILE, note)


def read_note(folder: Path) -> dict[str, Any]:
    """Returns what `note_job` and `note_ending` wrote last, or an empty dict if they wrote nothing.

    Raises:
        DamagedFile: The file is no such note.
    """
    path = folder / POINT_FILE
    try:
        note: dict[str, Any] = read_json(
            path,
            dict[str, Any],
            "the note of a point",
            _HOW_TO_REPAIR,
        )
    except FileNotFoundError:
        return {}
    if not _is_job(note.get("job")):
        raise DamagedFile(f"{path} does not say which job has the point. {_HOW_TO_REPAIR}")
    return note


def _is_job(job: Any) -> bool:
    """Returns whether a value of a note names a job of a scheduler, or a process."""
    if not isinstance(job, dict):
        return False
    # A process is known by its host and start too, as its number may have passed to another
    if "pid" in job:
        return {"host", "born"} <= job.keys()
    return True


def read_job(folder: Path) -> dict[str, Any]:
    """Returns the job that was noted last, or an empty dict if none was.

    Raises:
        DamagedFile: The note can't be read.
    """
    note = read_note(folder)
    return note.get("job", {})
