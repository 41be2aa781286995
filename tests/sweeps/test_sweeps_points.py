"""What makes a point the same one: its settings, with paths from wherever they are given."""

import json
from pathlib import Path
from typing import Any

import pytest

from relloc.errors import DamagedFile
from relloc.files import parse_json
from relloc.status import Status
from relloc.sweeps.points import POINT_FILE, Point, identity_of, note_ending, note_job, read_note
from relloc.sweeps.sweep import SWEEP_FILE, Sweep


def test_a_relative_path_is_another_one_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    settings = {
        "data.root": {"data": {"root": "set"}},
        "data.root of several": {"data": {"root": ["set", "other"]}},
        "data.source.root": {"data": {"source": {"root": "set"}}},
        "data.shards": {"data": {"shards": "set"}},
        "eval.knn_in1k.data.root": {"eval": {"knn_in1k": {"data": {"root": "set"}}}},
        "checkpoint": {"checkpoint": "set"},
        "checkpoint of several": {"checkpoint": ["set", "random"]},
    }
    for name, config in settings.items():
        monkeypatch.chdir(tmp_path / "a")
        here = identity_of(config)
        monkeypatch.chdir(tmp_path / "b")
        assert identity_of(config) != here, name
    same = ({"data": {"root": "../a/set"}}, {"data": {"root": f"{tmp_path}/a/set"}})
    assert identity_of(same[0]) == identity_of(same[1])


def test_what_is_no_relative_path_makes_the_identity_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [
        {"data": {"root": "/data/set/", "shards": None}, "seed": 0},
        {"checkpoint": "random"},
        {"checkpoint": ["torchvision", "/x/run"]},
        {"model": {"name": "small"}, "grid": {"gap_px": 4}},
    ]
    before = [identity_of(config) for config in configs]
    assert before == [
        "2ad8e5612091",
        "70dd7a9d7a27",
        "ccce9a1d3678",
        "74ebd3fa3a19",
    ]  # as sweeps have noted them
    monkeypatch.chdir(tmp_path)
    assert [identity_of(config) for config in configs] == before
    assert identity_of(configs[3] | {"objective": "knn/feature4/top1", "sweep": "s"}) == before[3]


def read_back(fields: dict[str, Any]) -> Point:
    return parse_json(json.dumps(fields).encode(), Point, "no point", "")


def test_the_command_of_a_point_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = Point(
        kind="train",
        name="a",
        overrides=("data.root=a b",),
        identity="a",
        folder=tmp_path / "run",
        options=("--config-dir=own",),
        cwd=str(tmp_path),
    )
    told = f"python -m relloc.train --config-dir=own 'data.root=a b' hydra.run.dir={tmp_path}/run"
    assert made.again == told
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert made.again == f"cd {tmp_path} && {told}"  # where its relative paths are what they were
    assert read_back(made.to_json()) == made
    sent = read_back(
        made.to_json() | {"resend": ["-m", "relloc.train", "launcher=slurm"], "cwd": ""}
    )
    assert sent.again == "python -m relloc.train launcher=slurm"


def test_a_note_of_an_earlier_version_is_read() -> None:
    fields = {
        "kind": "train",
        "name": "a",
        "overrides": ["seed=0"],
        "identity": "a",
        "folder": "/x",
    }
    assert read_back(fields).arguments == ["-m", "relloc.train", "seed=0", "hydra.run.dir=/x"]


def test_how_a_job_was_asked_to_end_stays_until_the_next_one(tmp_path: Path) -> None:
    made = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "run")
    note_ending(made.folder, Status.STOPPED)
    assert not made.folder.exists()  # no job, nothing to note
    note_job(made, {"slurm": "7"})
    assert "ended" not in read_note(made.folder)
    note_ending(made.folder, Status.CANCELLED)
    note_ending(made.folder, Status.STOPPED)  # as its process then ends
    assert read_note(made.folder)["ended"] == "cancelled"
    note_job(made, {"slurm": "8"})
    assert "ended" not in read_note(made.folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"job": 7}', '{"job": {"pid": 1}}', "\x00", "[" * 100_000]
)
def test_a_damaged_note_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "point.json").write_text(text)
    with pytest.raises(DamagedFile, match=r"point\.json"):
        read_note(tmp_path)


def test_a_folder_where_a_note_should_be_is_one_message(tmp_path: Path) -> None:
    for name in (POINT_FILE, SWEEP_FILE):
        (tmp_path / name).mkdir()
    with pytest.raises(DamagedFile, match=r"point\.json"):
        read_note(tmp_path)
    with pytest.raises(DamagedFile, match=r"sweep\.json"):
        Sweep(tmp_path).points()
