import dataclasses
import json
import math
import os
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from relloc.files import locked
from relloc.results import Result, append_results
from relloc.tracking import (
    DatasetRecord,
    Journal,
    RunRecord,
    StoreError,
    add_artifact,
    mlflow,
    open_store,
    read_note,
    sync,
    write_status,
)
from relloc.tracking.note import Note, write_note

NewRun = Callable[..., Path]
LINEAR = Result(
    eval="linear",
    dataset="voc07",
    split="test",
    layer="feature1",
    metric="top1",
    value=10.0,
    n=100,
    seed=0,
    protocol="test",
    checkpoint="runs/a.pt",
    model="resnet50",
)


def rows(checkpoint: str = "runs/a.pt", scale: float = 10.0) -> list[Result]:
    layers = [*(f"feature{stage}" for stage in range(1, 6)), "avgpool"]
    return [
        dataclasses.replace(LINEAR, layer=layer, value=scale * index, checkpoint=checkpoint)
        for index, layer in enumerate(layers, start=1)
    ]


def mlflow_run(run_dir: Path, uri: str) -> Any:
    note = read_note(run_dir)
    assert note is not None
    return open_store(uri).get_run(note.run_id)


def points(run_dir: Path, uri: str) -> Counter[tuple[str, int, float]]:
    """Every stored point of the run and how often it is there."""
    run = mlflow_run(run_dir, uri)
    histories = [
        open_store(uri).get_metric_history(run.info.run_id, name) for name in run.data.metrics
    ]
    return Counter(
        (point.key, point.step, point.value) for history in histories for point in history
    )


JOURNAL_POINTS = Counter(
    point
    for step in (0, 10, 20)
    for point in (("train/loss", step, 2.5 - step / 40), ("train/top1", step, 12.5 + step))
)


def test_a_run_arrives_whole(uri: str, new_run: NewRun) -> None:
    run_dir = new_run(
        "r50 seed0", tags={"devices": "cpu", "relloc.kind": "train", "relloc.commit": "6a6cf28"}
    )
    sent = sync(run_dir, uri)
    assert (sent.params, sent.points, sent.artifacts) == (4, 6, 0)
    run = mlflow_run(run_dir, uri)
    assert run.info.run_name == "r50 seed0"
    assert run.info.start_time == RunRecord.read(run_dir).started_ms
    assert run.data.tags["devices"] == "cpu"
    assert run.data.tags["mlflow.source.name"] == "relloc.train"
    assert run.data.tags["mlflow.source.git.commit"] == "6a6cf28"
    assert run.data.tags["relloc.run_dir"] == str(run_dir)
    assert points(run_dir, uri) == JOURNAL_POINTS
    experiment = open_store(uri).get_experiment(sent.experiment_id)
    assert experiment.name == "relloc"


def test_numbers_arrive_as_plain_numbers(uri: str, new_run: NewRun) -> None:
    run_dir = new_run(
        params={"lr": 1e-05, "epochs": 70, "on": True, "model": "r50", "long": "x" * 7000}
    )
    sync(run_dir, uri)
    params = mlflow_run(run_dir, uri).data.params
    long = params.pop("long")
    assert params == {"lr": "1e-05", "epochs": "70", "on": "true", "model": "r50"}
    assert long == "x" * 6000


def test_hundreds_of_params_and_thousands_of_points_arrive(uri: str, new_run: NewRun) -> None:
    run_dir = new_run(params={f"group/{index}@x": index for index in range(250)})
    journal = Journal(run_dir)
    for step in range(100, 700):
        journal.log({f"m{index}": float(index) for index in range(4)}, step)
    assert sync(run_dir, uri).points == 6 + 2400
    assert mlflow_run(run_dir, uri).data.params == {
        f"group/{index}_x": str(index) for index in range(250)
    }
    assert len(points(run_dir, uri)) == 6 + 2400


def test_syncing_twice_changes_nothing(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    append_results(run_dir, rows())
    (run_dir / "a.txt").write_text("a")
    add_artifact(run_dir, "a.txt")
    assert sync(run_dir, uri)
    before = points(run_dir, uri), (run_dir / "mlflow.json").read_bytes()
    assert not sync(run_dir, uri)
    assert (points(run_dir, uri), (run_dir / "mlflow.json").read_bytes()) == before


def test_what_is_added_later_is_all_that_is_sent_later(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    sync(run_dir, uri)
    Journal(run_dir).log({"train/loss": 1.0}, 30)
    assert sync(run_dir, uri).points == 1
    assert points(run_dir, uri) == JOURNAL_POINTS + Counter([("train/loss", 30, 1.0)])


def test_a_lost_note_costs_no_double_points_and_no_second_run(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    append_results(run_dir, rows())
    Journal(run_dir).log({"a": math.nan, "b": math.inf}, 40)
    first = sync(run_dir, uri)
    (run_dir / "mlflow.json").unlink()
    again = sync(run_dir, uri)
    assert (again.run_id, again.points) == (first.run_id, 0)
    assert max(points(run_dir, uri).values()) == 1
    assert sum(points(run_dir, uri).values()) == first.points == 6 + 11 + 2


@pytest.mark.parametrize(
    "damage", [b"", b'{"uri": "sqli', b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"1" * 5000]
)
def test_a_damaged_note_is_a_lost_note(uri: str, new_run: NewRun, damage: bytes) -> None:
    run_dir = new_run()
    first = sync(run_dir, uri)
    (run_dir / "mlflow.json").write_bytes(damage)
    assert read_note(run_dir) is None
    again = sync(run_dir, uri)
    assert (again.run_id, again.points) == (first.run_id, 0)


def test_a_count_that_was_changed_in_the_note_costs_no_point(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    first = sync(run_dir, uri)
    path = run_dir / "mlflow.json"
    path.write_text(path.read_text().replace('"lines": 3', '"lines": 9'))
    Journal(run_dir).log({"train/loss": 1.0}, 30)
    again = sync(run_dir, uri)
    assert (again.run_id, again.points) == (first.run_id, 1)
    assert max(points(run_dir, uri).values()) == 1


def test_a_folder_copied_to_be_another_run_is_another_run(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    first = sync(run_dir, uri)
    copy = run_dir.with_name("copy")
    shutil.copytree(run_dir, copy)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "uid": "another"}))
    second = sync(copy, uri)
    assert second.run_id != first.run_id
    assert second.points == 6


def test_files_outside_of_the_folder_are_not_sent_and_told(
    uri: str, new_run: NewRun, tmp_path: Path
) -> None:
    run_dir = new_run()
    (tmp_path / "key").write_text("secret")
    (run_dir / "own.txt").write_text("own")
    (run_dir / "link.txt").symlink_to(tmp_path / "key")
    names = ["link.txt", "../key", str(tmp_path / "key"), "a%2fb", "own.txt"]
    (run_dir / "a%2fb").write_text("an odd name")
    (run_dir / "artifacts.json").write_text(json.dumps(names))
    sent = sync(run_dir, uri)
    stored = [
        file.name for file in (tmp_path / "store" / "mlartifacts").rglob("*") if file.is_file()
    ]
    assert "own.txt" in stored
    assert "key" not in stored
    assert "link.txt" not in stored
    assert [line for line in sent.refused if str(tmp_path / "key") in line] == list(sent.refused)[
        :3
    ]
    assert sync(run_dir, uri).artifacts == 0


def test_a_name_longer_than_mlflow_takes_is_cut(uri: str, new_run: NewRun) -> None:
    run_dir = new_run("run")
    RunRecord(name="r" * 300, experiment="relloc").write(run_dir)
    sync(run_dir, uri)
    assert mlflow_run(run_dir, uri).info.run_name == "r" * 250
    assert not sync(run_dir, uri)


@pytest.mark.parametrize("died_at", ["lines", "results"])
def test_dying_between_sending_and_noting_costs_no_double_points(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch, died_at: str
) -> None:
    run_dir = new_run()
    append_results(run_dir, rows())
    whole = mlflow.write_note

    def die(folder: Path, note: Note) -> None:
        before = read_note(folder)
        if before and getattr(before, died_at) != getattr(note, died_at):
            raise KeyboardInterrupt
        whole(folder, note)

    monkeypatch.setattr(mlflow, "write_note", die)
    with pytest.raises(KeyboardInterrupt):
        sync(run_dir, uri)
    stored = points(run_dir, uri)
    assert ("train/loss", 0, 2.5) in stored
    monkeypatch.setattr(mlflow, "write_note", whole)
    # New points beside the doubtful ones, as in a training that was killed and resumed.
    Journal(run_dir).log({"train/loss": 1.0}, 30)
    sync(run_dir, uri)
    after = points(run_dir, uri)
    assert stored <= after
    assert max(after.values()) == 1
    assert len(after) == 6 + 11 + 1


def test_the_store_is_asked_only_in_doubt(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = new_run()
    monkeypatch.delattr("mlflow.MlflowClient.get_metric_history")
    sync(run_dir, uri)
    Journal(run_dir).log({"train/loss": 1.0}, 30)
    assert sync(run_dir, uri).points == 1


def test_results_give_a_value_a_layer_and_a_curve_over_the_layers(
    uri: str, new_run: NewRun
) -> None:
    run_dir = new_run()
    append_results(run_dir, rows())
    append_results(run_dir, rows(checkpoint="random", scale=1.0))
    append_results(run_dir, [dataclasses.replace(LINEAR, eval="pretext", layer="", value=55.5)])
    sync(run_dir, uri)
    stored = points(run_dir, uri) - JOURNAL_POINTS
    expected = [
        ("linear/avgpool/top1", 0, 60.0),
        ("linear_random/avgpool/top1", 0, 6.0),
        ("pretext/top1", 0, 55.5),
    ]
    for layer in range(1, 6):
        for variant, scale in (("linear", 10.0), ("linear_random", 1.0)):
            expected.append((f"{variant}/feature{layer}/top1", 0, scale * layer))
            expected.append((f"{variant}/top1_by_layer", layer, scale * layer))
    assert stored == Counter(expected)


def test_numbers_of_another_decoder_have_names_of_their_own(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    usual = dataclasses.replace(LINEAR, value=30.0)
    append_results(run_dir, [usual, dataclasses.replace(usual, decoder="nvJPEG", value=31.0)])
    sync(run_dir, uri)
    assert points(run_dir, uri) - JOURNAL_POINTS == Counter(
        [
            ("linear/feature1/top1", 0, 30.0),
            ("linear/top1_by_layer", 1, 30.0),
            ("linear_nvJPEG/feature1/top1", 0, 31.0),
            ("linear_nvJPEG/top1_by_layer", 1, 31.0),
        ]
    )


def test_a_curve_of_tests_does_not_begin_with_the_result_that_it_ends_with(
    uri: str, new_run: NewRun
) -> None:
    run_dir = new_run()
    for step, value in ((10, 20.0), (20, 30.0)):
        Journal(run_dir).log({"fcn/miou": value}, step)
    row = dataclasses.replace(LINEAR, eval="fcn", layer="", metric="miou", value=30.0)
    append_results(run_dir, [row])
    sync(run_dir, uri)
    stored = points(run_dir, uri) - JOURNAL_POINTS
    assert stored == Counter([("fcn/miou", 10, 20.0), ("fcn/miou", 20, 30.0)])
    assert mlflow_run(run_dir, uri).data.metrics["fcn/miou"] == 30


def test_numbers_of_several_k_are_also_a_curve_over_k(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    shots = [
        dataclasses.replace(LINEAR, eval="low_shot", metric=metric, value=value, **told)
        for metric, value, told in (
            ("map_k1", 10.0, {"series": "map", "k": 1}),
            ("map_k16", 30.0, {"series": "map", "k": 16}),
            ("map_k1_cv", 9.0, {"series": "map_cv", "k": 1}),
            ("map_k1_std", 1.0, {"series": "map", "k": 1, "spread": "std"}),
            ("map_best", 40.0, {}),
        )
    ]
    append_results(run_dir, shots)
    sync(run_dir, uri)
    curves = {point for point in points(run_dir, uri) if point[0].endswith("_by_k")}
    over_k, tuned = "low_shot/feature1/map_by_k", "low_shot/feature1/map_cv_by_k"
    assert curves == {(over_k, 1, 10.0), (over_k, 16, 30.0), (tuned, 1, 9.0)}


def test_rows_measured_anew_replace_the_old_values(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    append_results(run_dir, rows())
    sync(run_dir, uri)
    (run_dir / "results.jsonl").unlink()
    append_results(run_dir, [*rows()[:5], dataclasses.replace(rows()[5], value=1.5)])
    assert sync(run_dir, uri).points == 1
    latest = mlflow_run(run_dir, uri).data.metrics
    assert (latest["linear/feature5/top1"], latest["linear/avgpool/top1"]) == (50.0, 1.5)
    assert not sync(run_dir, uri)


def test_a_broken_result_row_is_told_and_holds_back_nothing_before_it(
    uri: str, new_run: NewRun
) -> None:
    run_dir = new_run()
    (run_dir / "results.jsonl").write_text('{"eval": "lin\n')
    with pytest.raises(ValueError, match=r"results\.jsonl line 1"):
        sync(run_dir, uri)
    assert points(run_dir, uri) == JOURNAL_POINTS


def test_datasets_arrive_as_inputs_without_the_data(uri: str, new_run: NewRun) -> None:
    both = [
        DatasetRecord(name="imagenet", context=use, digest="c" * 64, source="/data/in", n_images=9)
        for use in ("train", "eval")
    ]
    plain, shared = new_run("plain"), new_run("shared", datasets=tuple(both))
    for run_dir in (plain, shared):
        sync(run_dir, uri)
    seen = {
        (
            inputs.tags[0].value,
            inputs.dataset.digest,
            json.loads(inputs.dataset.profile)["n_images"],
        )
        for inputs in mlflow_run(plain, uri).inputs.dataset_inputs
    }
    assert seen == {("train", "a" * 36, 5011), ("eval", "b" * 36, 4952)}
    (inputs,) = mlflow_run(shared, uri).inputs.dataset_inputs
    assert (inputs.tags[0].key, inputs.tags[0].value) == ("mlflow.data.context", "train, eval")
    assert (inputs.dataset.name, json.loads(inputs.dataset.source)) == (
        "imagenet",
        {"uri": "/data/in"},
    )


def test_artifacts_lie_beside_the_store_and_are_sent_again_only_when_changed(
    uri: str, new_run: NewRun
) -> None:
    run_dir = new_run()
    (run_dir / "pictures").mkdir()
    for name in ("config.yaml", "pictures/map.png"):
        (run_dir / name).write_text("old")
        add_artifact(run_dir, name)
    first = sync(run_dir, uri)
    assert first.artifacts == 2
    folder = (
        Path(uri.removeprefix("sqlite:///")).parent
        / "mlartifacts"
        / "relloc"
        / first.run_id
        / "artifacts"
    )
    copy = folder / "pictures" / "map.png"
    assert copy.read_text() == "old"
    assert (folder / "config.yaml").exists()
    copy.write_text("marked")
    assert sync(run_dir, uri).artifacts == 0
    assert copy.read_text() == "marked"
    (run_dir / "pictures" / "map.png").write_text("new")
    os.utime(run_dir / "pictures" / "map.png", ns=(1, 1))
    assert sync(run_dir, uri).artifacts == 1
    assert copy.read_text() == "new"


def test_status_follows_and_a_resumed_run_runs_again(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = new_run()
    sync(run_dir, uri)
    assert mlflow_run(run_dir, uri).info.status == "RUNNING"
    write_status(run_dir, "FAILED")
    sync(run_dir, uri)
    ended = mlflow_run(run_dir, uri).info
    assert ended.status == "FAILED"
    assert ended.end_time >= ended.start_time
    with monkeypatch.context() as patch:
        patch.delattr("mlflow.MlflowClient.set_terminated")
        sync(run_dir, uri)
    assert mlflow_run(run_dir, uri).info.status == "FAILED", (
        "a later sync does not bring it back to life"
    )
    write_status(run_dir, "RUNNING")
    sync(run_dir, uri)
    assert mlflow_run(run_dir, uri).info.status == "RUNNING"
    write_status(run_dir, "FINISHED")
    sync(run_dir, uri)
    assert mlflow_run(run_dir, uri).info.status == "FINISHED"


def test_a_changed_description_is_sent_and_changed_params_are_told(
    uri: str, new_run: NewRun
) -> None:
    run_dir = new_run(params={"epochs": 70, "lr": 0.1})
    first = sync(run_dir, uri)
    RunRecord(
        name="longer", experiment="relloc", params={"epochs": 90, "lr": 0.1, "seed": 3}
    ).write(run_dir)
    again = sync(run_dir, uri)
    assert (again.run_id, again.params) == (first.run_id, 1)
    run = mlflow_run(run_dir, uri)
    assert run.info.run_name == "longer"
    assert run.data.params == {"epochs": "70", "lr": "0.1", "seed": "3"}
    assert run.data.tags["relloc.changed_params"] == "epochs: 70 -> 90"


def test_another_store_gets_the_whole_run(
    uri: str, new_run: NewRun, empty_database: Path, tmp_path: Path
) -> None:
    run_dir = new_run()
    write_status(run_dir, "FINISHED")
    first = sync(run_dir, uri)
    other = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'other.db')}"
    moved = sync(run_dir, other)
    assert moved.points == 6
    assert moved.run_id != first.run_id
    assert points(run_dir, other) == JOURNAL_POINTS
    assert mlflow_run(run_dir, other).info.status == "FINISHED"


def test_a_store_restored_from_a_copy_gets_what_it_missed(
    uri: str, new_run: NewRun, tmp_path: Path
) -> None:
    run_dir = new_run()
    first = sync(run_dir, uri)
    copy = f"sqlite:///{shutil.copy(uri.removeprefix('sqlite:///'), tmp_path / 'copy.db')}"
    Journal(run_dir).log({"train/loss": 1.0}, 30)
    sync(run_dir, uri)
    again = sync(run_dir, copy)
    assert (again.run_id, again.points) == (first.run_id, 1)
    assert points(run_dir, copy) == points(run_dir, uri)


def test_senders_of_one_run_folder_take_turns(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    open_store(uri)
    other = threading.Thread(target=sync, args=(run_dir, uri))
    with locked(run_dir / "mlflow.json.lock"):
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert read_note(run_dir) is None
    other.join(120)
    assert points(run_dir, uri) == JOURNAL_POINTS


def test_a_store_that_lost_the_run_gets_it_again(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    first = sync(run_dir, uri)
    note = read_note(run_dir)
    assert note is not None
    write_note(run_dir, dataclasses.replace(note, run_id="0" * 32))
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute("DELETE FROM tags")
        database.commit()
    again = sync(run_dir, uri)
    assert again.run_id != first.run_id
    assert again.points == 6


def test_a_run_deleted_in_mlflow_is_not_brought_back(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    open_store(uri).delete_run(sync(run_dir, uri).run_id)
    with pytest.raises(StoreError, match=r"deleted .*mlflow runs restore --run-id .*/mlflow\.json"):
        sync(run_dir, uri)
    (run_dir / "mlflow.json").unlink()
    assert sync(run_dir, uri).points == 6


def test_a_folder_without_a_record_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        sync(tmp_path, uri)
