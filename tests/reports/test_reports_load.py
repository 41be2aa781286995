import dataclasses
import shutil
from pathlib import Path

import pytest

from relloc.errors import DataError
from relloc.reports.load import UNKNOWN_COMMIT, find_measured, newest
from relloc.results import RESULTS_FILE, append_results
from relloc.tracking import RunRecord
from relloc.tracking.record import DatasetRecord


def test_runs_are_found_at_and_below_paths_once_and_oldest_first(
    new_run, result, tmp_path: Path
) -> None:
    older = new_run("z", result("knn", "avgpool", "top1_k20", 1.0))
    new_run("a/b", result("knn", "avgpool", "top1_k20", 2.0), commit=None)
    found = find_measured([older, tmp_path / "runs", older])
    assert [(each.run.name, each.result.value) for each in found] == [("z", 1.0), ("a/b", 2.0)]
    assert found[0].run.commit.startswith("6a6cf28a")
    assert found[1].run.commit == UNKNOWN_COMMIT


def test_the_copy_of_a_tracker_is_no_run(new_run, result, tmp_path: Path) -> None:
    run = new_run("a", result("knn", "avgpool", "top1_k20", 1.0))
    copy = tmp_path / "runs" / "mlartifacts"
    copy.mkdir()
    shutil.copy(run / RESULTS_FILE, copy)
    assert len(find_measured([tmp_path / "runs"])) == 1


def test_nothing_to_report_on_is_told(new_run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none does not exist"):
        find_measured([tmp_path / "none"])
    new_run("without_results")
    with pytest.raises(DataError, match=r"no run folder .*/runs: .*python -m relloc\.evaluate"):
        find_measured([tmp_path / "runs"])


def test_broken_files_are_told_with_their_place(new_run, result, tmp_path: Path) -> None:
    run = new_run("a", result("knn", "avgpool", "top1_k20", 1.0))
    with open(run / RESULTS_FILE, "a", encoding="utf-8") as file:
        file.write('{"eval": \n')
    with pytest.raises(DataError, match=r"results.jsonl line 2 .*remove it"):
        find_measured([tmp_path])
    (run / "run.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json .*run record"):
        find_measured([tmp_path])


def test_the_newest_answer_stands_and_remembers_the_others(new_run, result, tmp_path: Path) -> None:
    new_run(
        "first",
        result("knn", "avgpool", "top1_k20", 1.0),
        result("knn", "avgpool", "top1_k10", 5.0),
    )
    new_run(
        "second",
        result("knn", "avgpool", "top1_k20", 2.0),
        result("knn", "avgpool", "top1_k20", 3.0, seed=1),
    )
    new_run("third", result("knn", "avgpool", "top1_k20", 4.0))
    kept = {
        (each.result.metric, each.result.seed): each for each in newest(find_measured([tmp_path]))
    }
    assert {key: each.result.value for key, each in kept.items()} == {
        ("top1_k20", 0): 4.0,
        ("top1_k10", 0): 5.0,
        ("top1_k20", 1): 3.0,
    }
    assert [each.run.name for each in kept["top1_k20", 0].older] == ["first", "second"]


def test_a_best_layer_replaces_another_best_layer(new_run, result, tmp_path: Path) -> None:
    new_run("first", result("voc07_svm", "feature3", "map_best", 50.0, dataset="voc2007"))
    new_run("second", result("voc07_svm", "feature4", "map_best", 60.0, dataset="voc2007"))
    assert [each.result.layer for each in newest(find_measured([tmp_path]))] == ["feature4"]


def test_a_copied_row_is_of_the_run_that_measured_it(new_run, result, tmp_path: Path) -> None:
    row = result("knn", "avgpool", "top1_k20", 1.0)
    first = new_run("first", row)
    second = new_run("second", dataclasses.replace(row, measured_in=str(first)), row, commit=None)
    copied, own = find_measured([second])
    assert (copied.run.name, copied.run.folder, copied.run.commit[:8]) == (
        "first",
        first,
        "6a6cf28a",
    )
    assert (own.run.name, own.run.commit) == ("second", UNKNOWN_COMMIT)


def test_a_copied_row_replaces_no_copy_of_itself_but_other_measurements(
    new_run, result, tmp_path: Path
) -> None:
    other = new_run("other", result("knn", "avgpool", "top1_k20", 2.0))
    row = result("knn", "avgpool", "top1_k20", 1.0)
    first = new_run("first", row)
    new_run("second", dataclasses.replace(row, measured_in=str(first)))
    (kept,) = newest(find_measured([tmp_path]))
    assert (kept.run.name, kept.result.value, [each.run.folder for each in kept.older]) == (
        "first",
        1.0,
        [other],
    )


def test_a_measuring_run_is_found_where_both_were_moved(new_run, result, tmp_path: Path) -> None:
    row = result("knn", "avgpool", "top1_k20", 1.0)
    first = new_run("first", row)
    new_run("second", dataclasses.replace(row, measured_in="/on/the/cluster/runs/first"))
    (copied,) = find_measured([tmp_path / "runs" / "second"])
    assert (copied.run.name, copied.run.folder, copied.run.commit[:8]) == (
        "first",
        first,
        "6a6cf28a",
    )


def test_of_a_measuring_run_that_is_gone_the_folder_is_told(
    new_run, result, tmp_path: Path
) -> None:
    row = result("knn", "avgpool", "top1_k20", 1.0)
    new_run("second", dataclasses.replace(row, measured_in=str(tmp_path / "gone" / "first")))
    (found,) = find_measured([tmp_path])
    assert (found.run.name, found.run.folder) == ("first", tmp_path / "gone" / "first")
    assert found.run.commit == UNKNOWN_COMMIT


def test_the_digest_of_the_images_is_that_of_the_record_where_it_has_one(
    new_run, result, tmp_path: Path
) -> None:
    rows = [
        result("knn", "avgpool", "top1_k20", 1.0, dataset=dataset)
        for dataset in ("in1k", "twice", "gone")
    ]
    run = new_run("a", *rows)
    datasets = tuple(
        DatasetRecord(name=name, context="eval", digest=digest, source="/data", n_images=9)
        for name, digest in (
            ("in1k-train", "0"),
            ("in1k-val", "1"),
            ("twice-val", "2"),
            ("twice-val", "3"),
        )
    )
    dataclasses.replace(RunRecord.read(run), datasets=datasets).write(run)
    assert [each.digest for each in find_measured([tmp_path])] == ["1", "", ""]


@pytest.mark.parametrize(
    ("params", "called"),
    [
        ({"data.root": "/data/birds"}, "birds"),
        ({"data.root": '["/data/birds", "/data/cars"]'}, "birds+cars"),
        ({"data.root": "/data/birds", "data.shards": "/packed/boats"}, "boats"),
        ({"data.root": "/d/birds", "eval.knn.data.name": "folder", "eval.knn.data.root": "x"}, "x"),
        ({}, "folder"),
    ],
)
def test_older_rows_of_unnamed_images_are_called_after_the_folder(
    result, tmp_path: Path, params: dict[str, str], called: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    images = DatasetRecord(
        name="folder-val", context="eval", digest="12", source="/data", n_images=3
    )
    RunRecord(name="run", experiment="relloc", params=dict(params), datasets=(images,)).write(run)
    append_results(run, [result("knn", "avgpool", "top1_k20", 1.0, dataset="folder")])
    [found] = find_measured([run])
    assert (found.result.dataset, found.digest) == (called, "12")


def test_of_a_run_that_watched_trainings_the_end_is_reported(new_run, result) -> None:
    folder = new_run(
        "watcher",
        result("knn", "avgpool", "top1_k20", 1.0, checkpoint="/one/checkpoints/epoch_1.pt"),
        result("knn", "avgpool", "top1_k20", 2.0, checkpoint="/one/backbone.safetensors"),
    )
    assert len(find_measured([folder])) == 2
    record = RunRecord.read(folder)
    dataclasses.replace(record, params={**record.params, "watch": "/one"}).write(folder)
    [end] = find_measured([folder])
    assert end.result.value == 2
