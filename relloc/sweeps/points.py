"""The points of a sweep: what each is, so that it is recognized again, and where it runs."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.errors import UsageError
from relloc.files import write_json
from relloc.tracking.living import is_alive as is_alive
from relloc.tracking.living import is_elsewhere as is_elsewhere
from relloc.tracking.living import process_mark as process_mark
from relloc.tracking.record import now_ms

POINT_FILE = "point.json"
# Which machine, how many processes, what is followed and kept where: a point is the same with others of these.
_NOT_OF_A_POINT = ("launcher", "tracking", "sweep", "runs", "workers", "bank_gib", "save_every_s", "reuse")
_IDENTITY_DIGITS = 12
_PLAIN = re.compile(r"[\w./+:@%-]*")  # what Hydra takes as a value without quotes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep.

    `kind` is the command that runs it, train or evaluate; `name` says what is swept; `overrides` are
    all words that compose it; `identity` hashes the config; and `folder` is the run's, the same for
    every sweep that has this point.
    """

    kind: str
    name: str
    overrides: tuple[str, ...]
    identity: str
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """What Python is to run: the module, and the words that compose the run and name its folder."""
        folder = str(self.folder)
        quoted = folder if _PLAIN.fullmatch(folder) else "'" + folder.replace("\\", "\\\\").replace("'", "\\'") + "'"
        return ["-m", f"relloc.{self.kind}", *self.overrides, f"hydra.run.dir={quoted}"]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Point":
        return cls(
            kind=fields["kind"],
            name=fields["name"],
            overrides=tuple(fields["overrides"]),
            identity=fields["identity"],
            folder=Path(fields["folder"]),
        )


def identity(config: Mapping[str, Any]) -> str:
    """Short hash of a resolved config, without settings that don't belong to a point."""
    kept = {name: value for name, value in config.items() if name not in _NOT_OF_A_POINT and name != "hydra"}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:_IDENTITY_DIGITS]


def folder_of(runs: Path, kind: str, name: str, mark: str) -> Path:
    """The run folder of a point: the one that an earlier sweep gave it, else `runs`/KIND_NAME_IDENTITY."""
    for there in sorted(runs.glob(f"{kind}_*{mark}")):
        if there.is_dir():
            return there
    readable = re.sub(r"[^\w.+-]+", "_", name).strip("_")[:80]
    return runs / "_".join(part for part in (kind, readable, mark) if part)


def name_of(overrides: Sequence[str], swept: Sequence[str], seed: int) -> str:
    """What is swept, shortly: `gap_px=48 jitter_px=7`; the seed where nothing is."""
    words = (word.lstrip("+~").partition("=") for word in overrides)
    told = [f"{key.rpartition('.')[2]}={value}" for key, _, value in words if key in swept]
    return " ".join(told) or f"seed={seed}"


def note_job(point: Point, job: Mapping[str, Any]) -> None:
    """Write into the run folder which job runs the point, such as {"slurm": "7_2"}, atomically."""
    point.folder.mkdir(parents=True, exist_ok=True)
    write_json(point.folder / POINT_FILE, point.to_json() | {"job": dict(job), "time_ms": now_ms()})


def read_job(folder: Path) -> dict[str, Any] | None:
    """The job that was last noted; None if none was. Raises `UsageError` where the note can't be read."""
    path = folder / POINT_FILE
    try:
        job = json.loads(path.read_text(encoding="utf-8"))["job"]
        if not isinstance(job, dict):
            raise TypeError(f"job is {job}")
        return job
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error}): remove it if no job or process has the point") from error
