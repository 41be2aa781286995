"""mlflow.json: which parts of a run folder were sent to which store, so that each is sent once."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from relloc.files import write_json

NOTE_FILE = "mlflow.json"
_SEAL = "seal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """What was sent where.

    `uid` is that of the run: a folder that was copied to become another run has the note of the first. `unsure`:
    points that it does not tell of may have arrived (see relloc.tracking.mlflow). `lines`, `system` and `results` count
    the lines sent of the journals and of the result rows. `record` and `results_digest` are hashes of the run.json and
    of the rows that were sent. `artifacts` holds size in bytes and modification time in ns of each file when it was
    sent.
    """

    uri: str
    uid: str
    experiment_id: str
    run_id: str
    unsure: bool = False
    record: str = ""
    lines: int = 0
    system: int = 0
    results: int = 0
    results_digest: str = ""
    artifacts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    status: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_note(run_dir: Path) -> Note | None:
    """The run folder's note; None if there is none, or not as it was written.

    That costs only time, since the store is then asked what it has. A note with a wrong count would cost points.
    """
    try:
        fields = json.loads((run_dir / NOTE_FILE).read_bytes())
        return Note(**fields) if fields.pop(_SEAL) == _seal(fields) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_note(run_dir: Path, note: Note) -> None:
    """Replace the run folder's note. Raises `OSError`."""
    fields = dataclasses.asdict(note)
    write_json(run_dir / NOTE_FILE, fields | {_SEAL: _seal(fields)})


def _seal(fields: dict[str, Any]) -> str:
    """A hash of all other fields, by which a damaged note is known."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
