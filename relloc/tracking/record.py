"""What a run is (run.json, written before anything is measured) and how it stands (status.json)."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from relloc.files import read_json, write_json
from relloc.status import Status
from relloc.tracking.addresses import absolute_uri

RUN_FILE = "run.json"
STATUS_FILE = "status.json"
COMMIT_FILE = "COMMIT"  # in a copy of the package, which is no checkout: what was copied
CONTEXTS = ("train", "eval")
DISTRIBUTIONS = ("torch", "torchvision", "hydra-core", "mlflow")
GIT_TIMEOUT_S = 10
_RECORD_LOST = (
    "Put back a copy, or remove it and start the run's command again with the same hydra.run.dir, which writes it anew "
    "(MLflow then shows another run)"
)
_STATUS_LOST = (
    "Remove it, or start the run's command again with the same hydra.run.dir, which writes it anew"
)

Scalar = str | int | float | bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """A data set that a run used: `context` is "train" or "eval", `source` a path or address."""

    name: str
    context: str
    digest: str
    source: str
    n_images: int

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS:
            raise ValueError(f"context is {self.context!r}, not one of {', '.join(CONTEXTS)}")
        if self.n_images < 0:
            raise ValueError(f"n_images is {self.n_images}: a number of images is not negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, fully described, so that a tracker can be fed later from the folder alone.

    `name` is short and begins with what matters most (MLflow's table cuts at about 20 characters).
    `params` is the flattened composed config; numbers stay numbers. `tracking_uri` is the store
    that `python -m relloc.sync` uses by default, "" for none. `uid` names the run for ever, and
    `started_ms` is the Unix time of its first start in milliseconds.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    experiment: str
    tracking_uri: str = ""
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    params: dict[str, Scalar] = dataclasses.field(default_factory=dict)
    datasets: tuple[DatasetRecord, ...] = ()
    uid: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    started_ms: int = dataclasses.field(default_factory=lambda: now_ms())

    def __post_init__(self) -> None:
        for field in ("name", "experiment", "uid"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field} is empty: a run needs one")

    def write(self, run_dir: Path) -> None:
        """Write run.json atomically; a run.json already there keeps its uid and its first start."""
        first = RunRecord.read(run_dir) if (run_dir / RUN_FILE).exists() else self
        kept = dataclasses.replace(
            self,
            uid=first.uid,
            started_ms=first.started_ms,
            tracking_uri=absolute_uri(self.tracking_uri) if self.tracking_uri else "",
        )
        write_json(
            run_dir / RUN_FILE, dataclasses.asdict(kept), errors="replace"
        )  # it only describes

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Read run.json.

        Raises:
            FileNotFoundError: the folder has no run.json.
            DamagedFile: run.json is not a record of this version.
        """
        record: RunRecord = read_json(run_dir / RUN_FILE, cls, "a run record", _RECORD_LOST)
        return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How a run stands, and since when (Unix ms)."""

    status: Status
    time_ms: int


def write_status(run_dir: Path, status: str) -> None:
    """Write how the run stands, and when, to status.json, atomically. Raises `ValueError`: that is no status."""
    write_json(run_dir / STATUS_FILE, {"status": Status(status), "time_ms": now_ms()})


def read_status(run_dir: Path) -> RunStatus | None:
    """How the run stands; None if it never said so. Raises `DamagedFile`."""
    try:
        return read_json(run_dir / STATUS_FILE, RunStatus, "the status of a run", _STATUS_LOST)
    except FileNotFoundError:
        return None


def flatten(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """Flatten a plain nested config to dotted keys, in its order.

    None and empty mappings are left out, lists become their JSON text, numbers and booleans stay,
    nan and the infinities (which JSON does not have) and everything else become text.
    """
    flat: dict[str, Scalar] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": scalar for inner, scalar in flatten(value).items()})
        elif value is not None:
            flat[str(key)] = _scalar(value)
    return flat


def _scalar(value: object) -> Scalar:
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def environment_tags(device_names: Sequence[str] = ()) -> dict[str, str]:
    """Tags that say what code ran where: commit, versions, host and the given devices.

    What cannot be found out is absent: a package that is not installed, a commit outside of a
    checkout and of a sweep's copy of one. A commit ends in "-dirty" if tracked files were changed.
    """
    package = Path(__file__).parents[1]
    copied = package / COMMIT_FILE
    commit = commit_of(Path(__file__)) or (
        copied.read_text(encoding="utf-8").strip() if copied.is_file() else None
    )
    tags = {
        "host": socket.gethostname(),
        "version.python": platform.python_version(),
        "relloc.code": str(package),
        "devices": ", ".join(device_names),
        "relloc.commit": commit,
        "relloc.version": _version("relloc"),
        **{f"version.{name}": _version(name) for name in DISTRIBUTIONS},
    }
    return {name: text for name, text in tags.items() if text}


def commit_of(file: Path) -> str | None:
    """The checked-out commit of the git repository that tracks `file`, or None if none does."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S
    )
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def legal_name(name: str) -> str:
    """The nearest name that MLflow takes: letters, digits, `_ - . : /` and space, 250 at most."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:250].rstrip("/") or "_"


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
