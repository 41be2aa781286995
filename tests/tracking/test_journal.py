import json
import math
from pathlib import Path

import pytest

from relloc.tracking import Journal, read_journal


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_what_is_logged_is_on_disk_at_once_and_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log({"train/loss": 2.079}, step=0)
    journal.log({"train/loss": 1.5, "knn/top1": 30}, step=50)
    entries = read_journal(tmp_path)
    assert [(entry.step, entry.metrics) for entry in entries] == [
        (0, {"train/loss": 2.079}),
        (50, {"train/loss": 1.5, "knn/top1": 30.0}),
    ]
    assert 1.6e12 < entries[0].time_ms <= entries[1].time_ms
    assert read_journal(tmp_path, first_line=1) == entries[1:]


def test_a_folder_without_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []


def test_nan_and_infinities_survive_as_valid_json(tmp_path: Path) -> None:
    Journal(tmp_path).log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)
    line = json.loads((tmp_path / "journal.jsonl").read_text(), parse_constant=refuse)
    assert line["metrics"] == {"a": "nan", "b": "inf", "c": "-inf"}
    (entry,) = read_journal(tmp_path)
    assert math.isnan(entry.metrics["a"])
    assert (entry.metrics["b"], entry.metrics["c"]) == (math.inf, -math.inf)


def test_a_half_written_line_is_not_read_and_is_cut_off_on_resuming(tmp_path: Path) -> None:
    Journal(tmp_path).log({"loss": 2.0}, step=0)
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + whole[:20])
    assert [entry.step for entry in read_journal(tmp_path)] == [0]
    Journal(tmp_path).log({"loss": 1.0}, step=1)
    assert [(entry.step, entry.metrics["loss"]) for entry in read_journal(tmp_path)] == [
        (0, 2.0),
        (1, 1.0),
    ]


def test_a_journal_of_only_half_a_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"time_ms": 1')
    Journal(tmp_path).log({"loss": 1.0}, step=0)
    assert len(read_journal(tmp_path)) == 1


def test_a_resumed_run_writes_no_point_twice(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    for step in range(4):
        first.log({"loss": float(step)}, step)
    first.log({"knn/top1": 30.0}, 2)
    resumed = Journal(tmp_path)
    for step in range(2, 6):
        resumed.log({"loss": 100.0 + step, "knn/top1": 50.0}, step)
    points = [(name, e.step, v) for e in read_journal(tmp_path) for name, v in e.metrics.items()]
    assert points == [
        *(("loss", step, float(step)) for step in range(4)),
        ("knn/top1", 2, 30.0),
        ("knn/top1", 3, 50.0),
        ("loss", 4, 104.0),
        ("knn/top1", 4, 50.0),
        ("loss", 5, 105.0),
        ("knn/top1", 5, 50.0),
    ]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    Journal(tmp_path).log({"loss": 1.0}, step=0)
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"step": 1}\n')
    with pytest.raises(ValueError, match="line 2 .*journal entry"):
        read_journal(tmp_path)
    with pytest.raises(ValueError, match="line 2 .*journal entry"):
        read_journal(tmp_path, first_line=1)


@pytest.mark.parametrize("name", ["acc@5", "k=5", "/loss", "a//b", "loss[0]", ""])
def test_names_that_mlflow_refuses_are_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="only letters, digits"):
        Journal(tmp_path).log({name: 1.0}, step=0)
    assert read_journal(tmp_path) == []
