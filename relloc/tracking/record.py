"""Describes a run in its folder: run.json says what it is, status.json whether it is still running.

run.json is written before anything is measured. It holds all that a tracker needs, so that MLflow
can be fed from the folder alone, at any later time.
"""

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
# A sweep's copy of the package is no git checkout; this file in it holds the commit of the
# original.
COMMIT_FILE = "COMMIT"
CONTEXTS = ("train", "eval")
DISTRIBUTIONS = ("torch", "torchvision", "hydra-core", "mlflow")
GIT_TIMEOUT_S = 10
# What to do about a damaged file; appended to the error message.
_RECORD_LOST = (
    "Put back a copy, or remove it and start the run's command again with the same hydra.run.dir, "
    "which writes it anew (MLflow then shows another run)"
)
_STATUS_LOST = (
    "Remove it, or start the run's command again with the same hydra.run.dir, which writes it anew"
)

Scalar = str | int | float | bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """A data set that a run used.

    Attributes:
        name: what the data set is called, such as "in1k".
        context: "train" or "eval".
        digest: a hash of its contents.
        source: a path or an address.
        n_images: how many images the run used of it.
    """

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
    """The full description of a run, as run.json holds it.

    Attributes:
        name: short, with what matters most first (MLflow's table shows about 20 characters).
        experiment: the MLflow experiment that the run belongs to.
        tracking_uri: the store that `python -m relloc.sync` uses by default; "" for none.
        tags: what MLflow shows as tags, such as the commit and the host.
        params: the composed config, flattened to dotted keys; numbers stay numbers.
        datasets: the data sets that the run uses.
        uid: identifies the run forever, also after its folder was moved or it was resumed.
        started_ms: Unix time of the first start in milliseconds.
    """

    # run.json is checked by pydantic when it is read; a field that is unknown makes it an error.
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
                raise ValueError(f"{field} is empty: every run needs one")

    def write(self, run_dir: Path) -> None:
        """Write run.json atomically. If there is one already, its uid and first start are kept."""
        # A resumed run stays the same run in MLflow, which is why its identity is not made anew.
        first = RunRecord.read(run_dir) if (run_dir / RUN_FILE).exists() else self
        record = dataclasses.replace(
            self,
            uid=first.uid,
            started_ms=first.started_ms,
            tracking_uri=absolute_uri(self.tracking_uri) if self.tracking_uri else "",
        )
        # Text that is not valid Unicode is replaced: the record is a description and must not fail.
        write_json(run_dir / RUN_FILE, dataclasses.asdict(record), errors="replace")

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
    """The status of a run, such as RUNNING, and when it was written (Unix ms)."""

    status: Status
    time_ms: int


def write_status(run_dir: Path, status: str) -> None:
    """Write a status and the current time to status.json, atomically.

    Raises:
        ValueError: `status` is not one of `Status`.
    """
    write_json(run_dir / STATUS_FILE, {"status": Status(status), "time_ms": now_ms()})


def read_status(run_dir: Path) -> RunStatus | None:
    """Return the status of a run, or None if none was written.

    Raises:
        DamagedFile: status.json is there and can't be read.
    """
    try:
        return read_json(run_dir / STATUS_FILE, RunStatus, "the status of a run", _STATUS_LOST)
    except FileNotFoundError:
        return None


def flatten(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """Flatten a nested config of plain values to dotted keys, in the same order.

    None and empty mappings are left out. Numbers and booleans stay; lists become JSON text; nan,
    the infinities (which JSON does not have) and everything else become text.

    Example: `flatten({"optimizer": {"lr": 0.1}})` is `{"optimizer.lr": 0.1}`.
    """
    # MLflow's params are flat, and its table filters by their names.
    flat: dict[str, Scalar] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            for inner_key, scalar in flatten(value).items():
                flat[f"{key}.{inner_key}"] = scalar
        elif value is not None:
            flat[str(key)] = _scalar(value)
    return flat


def _scalar(value: object) -> Scalar:
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)


def environment_tags(device_names: Sequence[str] = ()) -> dict[str, str]:
    """Return tags that say which code ran on which machine: commit, versions, host and devices.

    A tag is absent if its value can't be found, such as the version of a package that is not
    installed. A commit ends in "-dirty" if tracked files were changed.
    """
    package = Path(__file__).parents[1]
    commit = commit_of(Path(__file__))
    # The package of a sweep is a copy, whose commit was written into a file.
    copied_commit = package / COMMIT_FILE
    if not commit and copied_commit.is_file():
        commit = copied_commit.read_text(encoding="utf-8").strip()
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
    """Return the checked-out commit of the git repository that tracks `file`, or None."""
    try:
        # Installed packages may lie inside some other repository, which does not track them.
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
    """Return the closest name that MLflow accepts for a param, metric or tag.

    MLflow takes letters, digits, `_ - . : /` and space, at most 250 characters, and only normalized
    paths (mlflow.utils.validation).
    """
    legal = re.sub(r"[^\w\-. :/]", "_", name)
    parts = [part for part in legal.split("/") if part not in ("", ".", "..")]
    shortened = "/".join(parts)[:250].rstrip("/")
    return shortened or "_"


def now_ms() -> int:
    """Return the Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
