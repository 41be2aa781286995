"""Results of checkpoints, written by another process than the training, and their curves."""

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relloc.errors import DamagedFile
from relloc.results import Result
from relloc.tracking import open_store, read_note, sync
from relloc.tracking.note import NOTE_FILE
from relloc.tracking.watched import WATCHED_FILE, append_watched, read_watched

ROW = Result(
    eval="knn",
    dataset="photos",
    split="held_out",
    layer="feature4",
    metric="top1_k20",
    value=40.0,
    n=40,
    seed=0,
    checkpoint="one/checkpoints/epoch_1.pt",
    model="small",
    fingerprint="a",
)
SPREAD = dataclasses.replace(ROW, metric="top1_k20_std", spread="std", value=1.5)


def test_a_measurement_is_noted_once_whoever_measured_it(tmp_path: Path) -> None:
    again = dataclasses.replace(ROW, checkpoint="one/step_8.pt", measured_in="elsewhere")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda row: append_watched(tmp_path, 8, [row]), [ROW, again] * 4))
    append_watched(tmp_path, 16, [ROW])
    append_watched(tmp_path, 16, [dataclasses.replace(ROW, value=41.0, fingerprint="b"), ROW])
    seen = [(each.step, each.result.value, each.curve) for each in read_watched(tmp_path)]
    curve = "watch/knn/feature4/top1_k20"
    assert seen == [(8, 40.0, curve), (16, 40.0, curve), (16, 41.0, curve)]


def test_decoders_have_curves_of_their_own_and_usual_lines_name_none(tmp_path: Path) -> None:
    append_watched(tmp_path, 8, [ROW, dataclasses.replace(ROW, decoder="nvJPEG")])
    curves = [each.curve for each in read_watched(tmp_path)]
    assert curves == ["watch/knn/feature4/top1_k20", "watch/knn_nvJPEG/feature4/top1_k20"]
    usual, of_gpu = map(json.loads, (tmp_path / WATCHED_FILE).read_text().splitlines())
    assert not {"strides", "decoder"} & usual["result"].keys()
    assert of_gpu["result"]["decoder"] == "nvJPEG"


def test_a_half_line_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    append_watched(tmp_path, 8, [ROW])
    path = tmp_path / WATCHED_FILE
    with path.open("a") as file:
        file.write('{"step": 16, "resu')
    assert len(read_watched(tmp_path)) == 1
    append_watched(tmp_path, 16, [ROW])
    assert [each.step for each in read_watched(tmp_path)] == [8, 16]
    path.write_text(path.read_text() + '{"step": "x"}\n')
    with pytest.raises(DamagedFile, match=f"{WATCHED_FILE} line 3"):
        read_watched(tmp_path)


def test_the_store_of_the_training_gets_each_point_of_a_curve_once(
    uri: str, new_run: Callable[..., Path]
) -> None:
    run_dir = new_run()
    sync(run_dir, uri)
    # Where nothing is watched the note is as earlier versions wrote it.
    assert "watched" not in json.loads((run_dir / NOTE_FILE).read_text())
    append_watched(run_dir, 8, [ROW, SPREAD])
    assert sync(run_dir, uri).points == 1
    later = dataclasses.replace(ROW, value=50.0, batch_norm="recalibrated")
    append_watched(run_dir, 16, [ROW, later])
    assert sync(run_dir, uri).points == 2
    assert not sync(run_dir, uri)
    note = read_note(run_dir)
    assert note is not None
    client = open_store(uri)
    points = {}
    for name in client.get_run(note.run_id).data.metrics:
        if name.startswith("watch/"):
            history = client.get_metric_history(note.run_id, name)
            points[name] = {(point.step, point.value) for point in history}
    assert points == {
        "watch/knn/feature4/top1_k20": {(8, 40.0), (16, 40.0)},
        "watch/knn_recalibrated/feature4/top1_k20": {(16, 50.0)},
    }
