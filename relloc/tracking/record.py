"""What a run is (run.json, written before anything is measured) and how it stands (status.json)."""

import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.errors import DamagedFile, reason
from relloc.files import write_json
from relloc.tracking.store import absolute_uri

RUN_FILE = "run.json"
STATUS_FILE = "status.json"
COMMIT_FILE = "COMMIT"  # in a copy of the package, which is no checkout: what was copied
STATUSES = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")
CONTEXTS = ("train", "eval")
DISTRIBUTIONS = ("torch", "torchvision", "hydra-core", "mlflow")
GIT_TIMEOUT_S = 10
_RECORD_LOST = (
    "Put back a copy, or remove it and start the run's command again with the same hydra.run.dir, which writes it anew "
    "(MLflow then shows another run)"
)
_STATUS_LOST = "Remove it, or start the run's command again with the same hydra.run.dir, which writes it anew"

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
        write_json(run_dir / RUN_FILE, dataclasses.asdict(kept))

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Read run.json.

        Raises:
            FileNotFoundError: the folder has no run.json.
            DamagedFile: run.json is not a record of this version.
        """
        path = run_dir / RUN_FILE
        fields = read_json(path, "a run record", _RECORD_LOST)
        try:
            if not isinstance(fields, dict):
                raise TypeError("it has no named values")
            datasets = tuple(DatasetRecord(**dataset) for dataset in fields.pop("datasets", ()))
            record = cls(**fields, datasets=datasets)
            _check_types(record)
            return record
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{path} is not a run record: {reason(error)}. {_RECORD_LOST}") from error


def read_json(path: Path, what: str, advice: str) -> Any:
    """The value of a JSON file of a run folder, which is `what`; `advice` says what to do about a damaged one.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it is not JSON, or no file.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as error:
        raise DamagedFile(f"{path} can't be read ({error.strerror}). {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not {what}: {reason(error)}. {advice}") from error


def _check_types(record: RunRecord) -> None:
    """Raises `TypeError` for a field of another kind, which JSON may hold and a dataclass takes."""
    texts = {field: getattr(record, field) for field in ("name", "experiment", "tracking_uri", "uid")}
    texts |= {f"tags.{name}": tag for name, tag in record.tags.items()}
    for number, dataset in enumerate(record.datasets):
        texts |= {f"datasets {number}": dataset.name, f"digest {number}": dataset.digest, f"{number}": dataset.source}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r}, not text")
    for name, value in record.params.items():
        if not isinstance(value, Scalar):
            raise TypeError(f"params.{name} is {value!r}, neither text nor a number")
    if not isinstance(record.started_ms, int):
        raise TypeError(f"started_ms is {record.started_ms!r}, not a number of milliseconds")


def write_status(run_dir: Path, status: str) -> None:
    """Write how the run stands, one of `STATUSES`, and when, to status.json, atomically."""
    if status not in STATUSES:
        raise ValueError(f"status is {status!r}, not one of {', '.join(STATUSES)}")
    write_json(run_dir / STATUS_FILE, {"status": status, "time_ms": now_ms()})


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Read {"status": ..., "time_ms": ...}; None if the run never said how it stands. Raises `DamagedFile`."""
    path = run_dir / STATUS_FILE
    try:
        found = read_json(path, "the status of a run", _STATUS_LOST)
    except FileNotFoundError:
        return None
    is_dict = isinstance(found, dict)
    if not is_dict or found.get("status") not in STATUSES or not isinstance(found.get("time_ms"), int):
        raise DamagedFile(f"{path} is not the status of a run: {str(found)[:100]}. {_STATUS_LOST}")
    return found


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
    tags = {"host": socket.gethostname(), "version.python": platform.python_version()}
    tags["relloc.code"] = str(Path(__file__).parents[1])
    if device_names:
        tags["devices"] = ", ".join(device_names)
    if commit := commit_of(Path(__file__)) or _copied_commit(Path(__file__).parents[1]):
        tags["relloc.commit"] = commit
    if version := _version("relloc"):
        tags["relloc.version"] = version
    return tags | {f"version.{name}": found for name in DISTRIBUTIONS if (found := _version(name))}


def commit_of(file: Path) -> str | None:
    """The checked-out commit of the git repository that tracks `file`, or None if none does."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _copied_commit(package: Path) -> str | None:
    noted = package / COMMIT_FILE
    return noted.read_text(encoding="utf-8").strip() if noted.is_file() else None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
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
