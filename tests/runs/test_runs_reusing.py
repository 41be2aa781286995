"""Rows that are there already, and states that evaluations go on from."""

import dataclasses
from pathlib import Path

import pytest
import torch

from relloc.evals.contract import Subject
from relloc.models.small import SmallBackbone
from relloc.results import Result, append_results, read_results
from relloc.runs.folder import UNREADABLE_FILE
from relloc.runs.reusing import KeptState, KnownRows, state_file


@pytest.fixture(scope="module")
def subject() -> Subject:
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
    return Subject(backbone=backbone, checkpoint="/here/backbone.safetensors", model="small", weights="w")


def row(**changes: object) -> Result:
    about = {
        "eval": "knn",
        "dataset": "colors",
        "split": "val",
        "layer": "avgpool",
        "metric": "top1_k10",
        "value": 40.0,
    }
    who = {"n": 18, "seed": 0, "protocol": "3.7", "checkpoint": "/old/backbone.safetensors", "model": "small"}
    return Result(**{**about, **who, "fingerprint": "mark", **changes})  # type: ignore[arg-type]


def folder(runs: Path, name: str, *rows: Result) -> Path:
    (runs / name).mkdir(parents=True, exist_ok=True)
    append_results(runs / name, rows)
    return runs / name


def test_rows_of_the_same_weights_are_copied_once_and_say_where_they_were_measured(
    tmp_path: Path, subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    old = folder(tmp_path, "sweep/0", row(), row(metric="top1_k20", value=41.0), row(fingerprint="another"))
    new = folder(tmp_path, "new")
    known = KnownRows(new, tmp_path)
    assert known.has(subject, "knn", "as_trained", "mark")
    assert known.has(subject, "knn", "as_trained", "mark")
    copied = read_results(new)
    assert [(found.metric, found.value) for found in copied] == [("top1_k10", 40.0), ("top1_k20", 41.0)]
    assert {(found.checkpoint, found.measured_in) for found in copied} == {(subject.checkpoint, str(old))}
    assert capsys.readouterr().out.count("of the same weights in") == 1
    newest = folder(tmp_path, "newest")
    assert KnownRows(newest, tmp_path).has(subject, "knn", "as_trained", "mark")
    assert {found.measured_in for found in read_results(newest)} == {str(old)}  # not the folder that copied them


def test_what_is_not_the_same_is_measured(tmp_path: Path, subject: Subject) -> None:
    folder(tmp_path, "old", row())
    new = folder(tmp_path, "new")
    known = KnownRows(new, tmp_path)
    assert not known.has(subject, "knn", "as_trained", "other mark")
    assert not known.has(subject, "knn", "recalibrated", "mark")
    assert not known.has(subject, "linear", "as_trained", "mark")
    assert not KnownRows(new, None).has(subject, "knn", "as_trained", "mark")  # reuse=false
    assert read_results(new) == []


def test_runs_with_broken_images_or_rows_are_not_trusted(tmp_path: Path, subject: Subject) -> None:
    (folder(tmp_path, "broken images", row()) / UNREADABLE_FILE).write_text("3.jpg: broken\n")
    (folder(tmp_path, "broken rows", row()) / "results.jsonl").write_text("{}\n")
    new = folder(tmp_path, "new")
    assert not KnownRows(new, tmp_path).has(subject, "knn", "as_trained", "mark")


def test_the_same_weights_by_two_paths_are_measured_once_in_a_run(tmp_path: Path, subject: Subject) -> None:
    run = folder(tmp_path, "run", row(checkpoint="random"))
    assert KnownRows(run, None).has(subject, "knn", "as_trained", "mark")
    assert [found.checkpoint for found in read_results(run)] == ["random", subject.checkpoint]
    assert [found.checkpoint for found in KnownRows(run, None).of(subject)] == [subject.checkpoint]


def test_a_state_comes_back_as_it_was_and_is_not_written_all_the_time(tmp_path: Path) -> None:
    path = state_file(tmp_path, "mark")
    assert KeptState(path, 0).load() is None
    KeptState(path, 3600).save({"epoch": 1})
    assert not path.exists()
    kept = KeptState(path, 0)
    kept.save({"epoch": 2, "weight": torch.arange(3.0)})
    found = KeptState(path, 0).load()
    assert found is not None
    assert found["epoch"] == 2
    assert torch.equal(found["weight"], torch.arange(3.0))


def test_a_damaged_state_is_told_and_started_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = state_file(tmp_path, "mark")
    KeptState(path, 0).save({"epoch": 2})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert KeptState(path, 0).load() is None
    assert "This evaluation starts anew" in capsys.readouterr().out


def test_a_full_disk_ends_no_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    KeptState(tmp_path / "file" / "x.pt", 0).save({"epoch": 1})  # no folder can be made there
    assert "The evaluation itself goes on" in capsys.readouterr().out


def test_results_of_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match="not a number to report"):
        dataclasses.replace(row(), value=float("nan"))
