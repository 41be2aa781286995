"""Remembers what of a run folder was sent to which MLflow store. The file is mlflow.json."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from relloc.files import write_json

NOTE_FILE = "mlflow.json"
_SEAL = "seal"  # the key of the hash of all other fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """What was sent, and to which run of which store.

    Attributes:
        uri: the address of the store.
        uid: the run's own uid. A folder that was copied for another run has the note of the first.
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
        unsure: points may have arrived that the note does not count (see relloc.tracking.mlflow).
        record: a hash of the run.json that was sent.
        lines: how many lines of journal.jsonl were sent.
        system: how many lines of system.jsonl were sent.
        watched: how many lines of watched.jsonl were sent.
        results: how many result rows were sent.
        results_digest: a hash of those rows.
        artifacts: size in bytes and modification time in ns of each file when it was sent.
        status: the fields of the `RunStatus` that was sent.
    """

    uri: str
    uid: str
    experiment_id: str
    run_id: str
    unsure: bool = False
    record: str = ""
    lines: int = 0
    system: int = 0
    watched: int = 0
    results: int = 0
    results_digest: str = ""
    artifacts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    status: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_note(run_dir: Path) -> Note | None:
    """Return the note of a run folder, or None if there is none or it was changed by others.

    Without a note nothing is lost but time, since the store is then asked what it has. A note with
    a wrong count, however, would make points go missing; hence the hash.
    """
    try:
        fields = json.loads((run_dir / NOTE_FILE).read_bytes())
        seal = fields.pop(_SEAL)
        # Someone may have edited the file, or a disk may have lost a part of it.
        if seal != _seal(fields):
            return None
        return Note(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_note(run_dir: Path, note: Note) -> None:
    """Replace the note of a run folder, atomically.

    Raises:
        OSError: the file can't be written.
    """
    fields = dataclasses.asdict(note)
    # Few trainings are watched. Without the field, earlier versions of relloc read the note, too.
    if not note.watched:
        del fields["watched"]
    write_json(run_dir / NOTE_FILE, fields | {_SEAL: _seal(fields)})


def _seal(fields: dict[str, Any]) -> str:
    """Return a hash of all other fields, by which a damaged note is noticed."""
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
