"""mlflow.json: a note is what was written, or none."""

import dataclasses
import json
from pathlib import Path

import pytest

from relloc.tracking.note import NOTE_FILE, Note, read_note, write_note

NOTE = Note(
    uri="sqlite:///a.db",
    uid="u",
    experiment_id="1",
    run_id="r",
    unsure=True,
    lines=3,
    artifacts={"patches.png": [10, 20]},
    status={"status": "FINISHED"},
)


def test_a_note_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    write_note(tmp_path, NOTE)
    assert read_note(tmp_path) == NOTE
    write_note(tmp_path, dataclasses.replace(NOTE, lines=4))
    found = read_note(tmp_path)
    assert found is not None
    assert found.lines == 4


@pytest.mark.parametrize(
    "change",
    [
        {"lines": 4},
        {"seal": "0"},
        {"more": 1},
        {"status": {}},
        {"artifacts": {"patches.png": [10, 21]}},
    ],
)
def test_a_note_that_was_changed_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    """A wrong count would cost points; without a note the store is asked what it has."""
    write_note(tmp_path, NOTE)
    fields = json.loads((tmp_path / NOTE_FILE).read_text())
    (tmp_path / NOTE_FILE).write_text(json.dumps(fields | change))
    assert read_note(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000])
def test_what_is_no_note_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NOTE_FILE).write_bytes(content)
    assert read_note(tmp_path) is None
