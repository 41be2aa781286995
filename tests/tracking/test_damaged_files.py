"""Files of a run folder that are not as relloc writes them: one error that names the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from relloc.errors import DamagedFile
from relloc.sweeps.point_status import status_of
from relloc.tracking import (
    Journal,
    RunRecord,
    add_artifact,
    list_artifacts_to_send,
    read_journal,
    read_status,
    sync,
    write_status,
)
from relloc.tracking.journal import SYSTEM_FILE

READ: dict[str, Callable[[Path], object]] = {
    "run.json": RunRecord.read,
    "status.json": read_status,
    "artifacts.json": list_artifacts_to_send,
    "journal.jsonl": read_journal,
    SYSTEM_FILE: lambda run_dir: read_journal(run_dir, file=SYSTEM_FILE),
}
# Of each file: values of another kind
VALUES: dict[str, tuple[object, ...]] = {
    "run.json": ([], 3, None, "run", {}, {"name": 3, "experiment": "e"}),
    "status.json": (
        [],
        3,
        None,
        "RUNNING",
        {},
        {"status": "RUNNING"},
        {"status": "WALKING", "time_ms": 1},
    ),
    "artifacts.json": ({}, 3, None, "config.yaml", [3], [None], ["a\0b"]),
    "journal.jsonl": ([], 3, None, "x", {}, {"time_ms": 1, "step": 1, "metrics": []}),
}
FIELDS = {
    "run.json": (
        "name",
        "experiment",
        "tracking_uri",
        "tags",
        "params",
        "datasets",
        "uid",
        "started_ms",
    ),
    "status.json": ("status", "time_ms"),
    "journal.jsonl": ("time_ms", "step", "metrics"),
}
CASES = [(name, value) for name, values in VALUES.items() for value in values]


@pytest.fixture
def run_dir(new_run: Callable[..., Path]) -> Path:
    path = new_run(tags={"a": "b"})
    write_status(path, "RUNNING")
    (path / "config.yaml").touch()
    add_artifact(path, "config.yaml")
    Journal(path, SYSTEM_FILE).log({"system/cpu": 1.0}, 1)
    return path


@pytest.mark.parametrize("name", READ)
def test_bytes_that_are_no_json_are_named(run_dir: Path, name: str) -> None:
    READ[name](run_dir)
    for content in (b"\xff\xfe\n", b"{\n", b"[" * 100_000 + b"\n", b"\0" * 50 + b"\n"):
        (run_dir / name).write_bytes(content)
        with pytest.raises(DamagedFile, match=name):
            READ[name](run_dir)
    (run_dir / name).unlink()
    (run_dir / name).mkdir()
    with pytest.raises(DamagedFile, match=name):
        READ[name](run_dir)


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name} {value}" for name, value in CASES])
def test_json_of_another_kind_is_named(run_dir: Path, name: str, value: object) -> None:
    (run_dir / name).write_text(json.dumps(value) + "\n")
    with pytest.raises(DamagedFile, match=name):
        READ[name](run_dir)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in FIELDS.items() for field in fields]
)
def test_a_field_of_another_kind_is_named(run_dir: Path, name: str, field: str) -> None:
    whole = json.loads(
        (run_dir / name).read_text().splitlines()[0]
        if "jsonl" in name
        else (run_dir / name).read_text()
    )
    for value in (None, [1], {"a": {"b": 1}}, [[1]]):
        (run_dir / name).write_text(json.dumps({**whole, field: value}) + "\n")
        with pytest.raises(DamagedFile, match=name):
            READ[name](run_dir)


def test_a_damaged_line_in_the_middle_is_named_by_its_number(run_dir: Path) -> None:
    lines = (run_dir / "journal.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "journal.jsonl").write_text("".join([lines[0], lines[1][:20] + "\n", *lines[2:]]))
    with pytest.raises(DamagedFile, match=r"journal\.jsonl line 2 "):
        read_journal(run_dir)
    with pytest.raises(DamagedFile, match=r"journal\.jsonl line 2 "):
        Journal(run_dir)
    assert len(read_journal(run_dir, first_line=2)) == len(lines) - 2


@pytest.mark.parametrize("name", [*READ, "results.jsonl"])
def test_sync_names_the_file(run_dir: Path, uri: str, name: str) -> None:
    (run_dir / name).write_bytes(b"\xff{\n")
    with pytest.raises(DamagedFile, match=name):
        sync(run_dir, uri)


def test_a_status_that_can_not_be_read_is_written_anew(run_dir: Path) -> None:
    (run_dir / "status.json").write_bytes(b"\xff")
    assert status_of(run_dir) == "FAILED"
    write_status(run_dir, "FINISHED")
    assert status_of(run_dir) == "FINISHED"
