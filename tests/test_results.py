import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from relloc.results import LAYERS, RESULTS_FILE, Result, append_results, read_results

ROW = Result(
    eval="linear",
    dataset="in1k",
    split="val",
    layer="feature4",
    metric="top1",
    value=51.2 + 1e-13,
    n=50_000,
    seed=0,
    protocol="3.3 five heads; “as published”, ü",
    checkpoint="/runs/a b/ü/backbone.safetensors",
    model="resnet50",
)


def row(**changes: object) -> Result:
    return dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]


def test_rows_come_back_as_they_were_written_oldest_first(tmp_path: Path) -> None:
    rows = [ROW, row(layer="avgpool", value=0.1 + 0.2, low=1 / 3, high=99.9), row(batch_norm="recalibrated")]
    append_results(tmp_path, rows[:2])
    append_results(tmp_path, rows[2:])
    assert list(read_results(tmp_path)) == rows
    lines = (tmp_path / RESULTS_FILE).read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4
    assert lines[3] == ""
    assert json.loads(lines[0])["value"] == ROW.value


@pytest.mark.parametrize("odd", ["a\u2028b", "a\x85b", "a\x0bb", "a\nb", "a\rb", 'a"b', "𝄞", "a\\b"])
def test_any_path_stays_in_its_line(tmp_path: Path, odd: str) -> None:
    append_results(tmp_path, [row(checkpoint=f"/runs/{odd}"), ROW])
    assert list(read_results(tmp_path)) == [row(checkpoint=f"/runs/{odd}"), ROW]


def test_a_last_line_that_a_kill_left_unfinished_is_no_row_and_makes_room_for_the_next(tmp_path: Path) -> None:
    append_results(tmp_path, [ROW])
    with open(tmp_path / RESULTS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(FIELDS)[:-5])
    assert list(read_results(tmp_path)) == [ROW]
    append_results(tmp_path, [row(seed=1), row(seed=2)])
    assert list(read_results(tmp_path)) == [ROW, row(seed=1), row(seed=2)]


FULL_DISK = """
import dataclasses, resource, sys
from pathlib import Path
from relloc.results import Result, append_results

row = Result(eval="linear", dataset="d", split="val", layer="avgpool", metric="top1", value=1.0, n=1, seed=0,
             protocol="p", checkpoint="random", model="small")
run_dir = Path(sys.argv[1])
append_results(run_dir, [row])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    append_results(run_dir, [dataclasses.replace(row, seed=seed) for seed in range(1, 20)])
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # space was made
    append_results(run_dir, [dataclasses.replace(row, seed=100)])
else:
    sys.exit("rows were lost without a word")
"""


def test_a_disk_that_fills_up_midway_is_an_error_and_whole_rows_stay(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    seeds = [row.seed for row in read_results(tmp_path)]
    assert (seeds[0], seeds[-1]) == (0, 100)
    assert seeds == sorted(seeds)


def test_a_folder_without_results_has_none(tmp_path: Path) -> None:
    assert list(read_results(tmp_path)) == []
    append_results(tmp_path, [])
    assert list(read_results(tmp_path)) == []


FIELDS = dataclasses.asdict(ROW)


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        json.dumps(FIELDS)[:-5],
        "[1]",
        "3",
        "",
        json.dumps({**FIELDS, "mood": "good"}),
        json.dumps({name: value for name, value in FIELDS.items() if name != "seed"}),
        json.dumps({**FIELDS, "layer": "feature9"}),
        json.dumps({**FIELDS, "n": 0}),
    ],
    ids=["torn", "cut", "list", "number", "blank", "unknown field", "missing field", "unknown layer", "no samples"],
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path: Path, bad: str) -> None:
    append_results(tmp_path, [ROW, ROW])
    with open(tmp_path / RESULTS_FILE, "a", encoding="utf-8") as file:
        file.write(bad + "\n")
    append_results(tmp_path, [ROW])
    with pytest.raises(ValueError, match=r"results\.jsonl line 3 is not a result row: "):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "linear/feature4/top1"),
        ({"batch_norm": "recalibrated"}, "linear_recalibrated/feature4/top1"),
        ({"checkpoint": "random"}, "linear_random/feature4/top1"),
        ({"checkpoint": "torchvision"}, "linear_torchvision/feature4/top1"),
        ({"checkpoint": "random", "batch_norm": "recalibrated"}, "linear_random_recalibrated/feature4/top1"),
        ({"eval": "knn", "layer": "avgpool", "metric": "top1_k20"}, "knn/avgpool/top1_k20"),
        ({"eval": "pretext", "layer": "avgpool"}, "pretext/top1"),
        ({"checkpoint": "/runs/random"}, "linear/feature4/top1"),
    ],
)
def test_tracked_names_tell_what_is_compared(changes: dict[str, str], name: str) -> None:
    assert row(**changes).tracked_name == name


def test_no_two_kinds_of_row_share_a_tracked_name() -> None:
    kinds = [
        row(eval=run, layer=layer, checkpoint=checkpoint, batch_norm=batch_norm)
        for run in ("linear", "knn")
        for layer in LAYERS
        for checkpoint in ("/runs/one", "random", "torchvision")
        for batch_norm in ("as_trained", "recalibrated")
    ]
    assert len({kind.tracked_name for kind in kinds}) == len(kinds) == 72


def test_a_row_without_a_layer_of_the_benchmark_or_without_samples_can_not_exist() -> None:
    with pytest.raises(ValueError, match=r"layer is 'conv1', not one of feature1, feature2, .*, avgpool"):
        row(layer="conv1")
    with pytest.raises(ValueError, match="n is 0: a result needs at least one sample"):
        row(n=0)


def test_a_row_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROW.value = 100.0  # type: ignore[misc]
