import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relloc.errors import DamagedFile
from relloc.files import path_as_text
from relloc.results import FORMAT, LAYERS, RESULTS_FILE, Result, append_results, read_results

ROW = Result(
    eval="linear",
    dataset="in1k",
    split="val",
    layer="feature4",
    metric="top1",
    value=51.2 + 1e-13,
    n=50_000,
    seed=0,
    protocol="3.3",
    deviations=("five heads; “as published”, ü", "small"),
    details=("lr 0.1",),
    higher_is_better=None,
    headline=True,
    checkpoint="/runs/a b/ü/backbone.safetensors",
    model="resnet50",
)


def row(**changes: object) -> Result:
    return dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]


def test_rows_come_back_as_they_were_written_oldest_first(tmp_path: Path) -> None:
    rows = [
        ROW,
        row(layer="avgpool", value=0.1 + 0.2, low=1 / 3, high=99.9),
        row(batch_norm="recalibrated"),
    ]
    append_results(tmp_path, rows[:2])
    append_results(tmp_path, rows[2:])
    assert list(read_results(tmp_path)) == rows
    lines = (tmp_path / RESULTS_FILE).read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4
    assert lines[3] == ""
    assert json.loads(lines[0])["value"] == ROW.value


@pytest.mark.parametrize(
    "odd", ["a\u2028b", "a\x85b", "a\x0bb", "a\nb", "a\rb", 'a"b', "𝄞", "a\\b"]
)
def test_any_path_stays_in_its_line(tmp_path: Path, odd: str) -> None:
    rows = [row(checkpoint=f"/runs/{odd}", measured_in=odd), ROW]
    append_results(tmp_path, rows)
    assert list(read_results(tmp_path)) == rows


def test_a_path_of_bytes_that_are_no_text_is_readable(tmp_path: Path) -> None:
    odd = os.fsdecode(b"/runs/caf\xe9.pt")
    text = path_as_text(Path(odd))
    assert text == r"/runs/caf\xe9.pt"
    append_results(tmp_path, [row(checkpoint=text), row(checkpoint=odd)])
    assert list(read_results(tmp_path)) == [
        row(checkpoint=text),
        row(checkpoint="/runs/caf\ufffd.pt"),
    ]


def test_a_last_line_that_a_kill_left_unfinished_is_no_row_and_makes_room_for_the_next(
    tmp_path: Path,
) -> None:
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

row = Result(eval="linear", dataset="d", split="val", layer="avgpool", metric="top1", value=1.0,
             n=1, seed=0, protocol="p", checkpoint="random", model="small")
run_dir = Path(sys.argv[1])
append_results(run_dir, [row])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    append_results(run_dir, [dataclasses.replace(row, seed=seed) for seed in range(1, 20)])
except OSError:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)  # as if space was freed
    append_results(run_dir, [dataclasses.replace(row, seed=100)])
else:
    sys.exit("rows were lost without a word")
"""


def test_a_disk_that_fills_up_midway_is_an_error_and_whole_rows_stay(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seeds = [row.seed for row in read_results(tmp_path)]
    assert (seeds[0], seeds[-1]) == (0, 100)
    assert seeds == sorted(seeds)


def lines_of(run_dir: Path) -> list[bytes]:
    return (run_dir / RESULTS_FILE).read_bytes().splitlines(keepends=True)


BATCH = [row(seed=seed) for seed in range(1, 6)]


@pytest.mark.parametrize("left", range(6))
def test_rows_of_a_batch_that_a_power_cut_left_unfinished_are_none(
    tmp_path: Path, left: int
) -> None:
    append_results(tmp_path, [ROW])
    append_results(tmp_path, BATCH)
    (tmp_path / RESULTS_FILE).write_bytes(b"".join(lines_of(tmp_path)[: 1 + left]))
    there = BATCH if left == 5 else []
    assert list(read_results(tmp_path)) == [ROW, *there]
    append_results(tmp_path, BATCH)  # measured again
    append_results(tmp_path, [row(seed=6)])
    assert list(read_results(tmp_path)) == [ROW, *there, *BATCH, row(seed=6)]


def test_a_batch_whose_lines_are_not_all_there_counts_as_none(tmp_path: Path) -> None:
    append_results(tmp_path, BATCH)
    append_results(tmp_path, [ROW, ROW])
    lines = lines_of(tmp_path)
    del lines[2]
    (tmp_path / RESULTS_FILE).write_bytes(b"".join(lines))
    assert list(read_results(tmp_path)) == [ROW, ROW]


def test_rows_without_a_word_of_their_batch_are_complete(tmp_path: Path) -> None:
    old = "".join(
        f"{json.dumps({'format': FORMAT, **dataclasses.asdict(each)})}\n" for each in BATCH
    )
    (tmp_path / RESULTS_FILE).write_text(old)
    append_results(tmp_path, [ROW, ROW])
    assert list(read_results(tmp_path)) == [*BATCH, ROW, ROW]


@pytest.mark.parametrize(("number", "of"), [(0, 2), (3, 2), (1, 0), ("1", 2), (1, None), (1, [2])])
def test_a_batch_of_impossible_numbers_is_an_error(
    tmp_path: Path, number: object, of: object
) -> None:
    (tmp_path / RESULTS_FILE).write_text(json.dumps({**FIELDS, "row": number, "rows": of}) + "\n")
    with pytest.raises(DamagedFile, match="line 1 "):
        read_results(tmp_path)


WRITER = """
import dataclasses, sys
from pathlib import Path
from relloc.results import Result, append_results

writer = int(sys.argv[2])
row = Result(eval="linear", dataset="d", split="val", layer="avgpool", metric="top1", value=1.0,
             n=1, seed=0, protocol="p" * 2000, checkpoint="random", model=str(writer))
for batch in range(30):
    rows = [dataclasses.replace(row, seed=5 * batch + each) for each in range(5)]
    append_results(Path(sys.argv[1]), rows)
"""


def test_four_writers_lose_nothing_and_a_reader_sees_whole_batches(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(number)])
        for number in range(4)
    ]
    while any(writer.poll() is None for writer in writers):
        assert len(read_results(tmp_path)) % 5 == 0
    assert [writer.returncode for writer in writers] == [0] * 4
    rows = read_results(tmp_path)
    assert len(rows) == 600
    for number in range(4):
        assert [each.seed for each in rows if each.model == str(number)] == list(range(150))


def test_a_folder_without_results_has_none(tmp_path: Path) -> None:
    assert list(read_results(tmp_path)) == []
    append_results(tmp_path, [])
    assert list(read_results(tmp_path)) == []


FIELDS = {"format": FORMAT, **dataclasses.asdict(ROW)}


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
        json.dumps({**FIELDS, "eval": 3}),
        json.dumps({**FIELDS, "value": "much"}),
        json.dumps({**FIELDS, "value": True}),
        json.dumps({**FIELDS, "headline": 1}),
        json.dumps({**FIELDS, "details": "lr 0.1"}),
        json.dumps({**FIELDS, "deviations": [1]}),
        json.dumps({**FIELDS, "kind": "frosty"}),
        json.dumps({**FIELDS, "checkpoint": None}),
        "[" * 100_000,
    ],
    ids=[
        "torn",
        "cut",
        "list",
        "number",
        "blank",
        "unknown field",
        "missing field",
        "unknown layer",
        "no samples",
        "a number for a name",
        "text",
        "truth",
        "number for a truth",
        "text for a list",
        "list of numbers",
        "unknown kind",
        "null",
        "deep",
    ],
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path: Path, bad: str) -> None:
    append_results(tmp_path, [ROW, ROW])
    with open(tmp_path / RESULTS_FILE, "a", encoding="utf-8") as file:
        file.write(bad + "\n")
    append_results(tmp_path, [ROW])
    with pytest.raises(ValueError, match=r"results\.jsonl line 3 .*result row: "):
        read_results(tmp_path)


def test_what_can_not_be_read_at_all_is_named(tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_bytes(b"\xff\xfe\n")
    with pytest.raises(DamagedFile, match="line 1 "):
        read_results(tmp_path)
    (tmp_path / RESULTS_FILE).unlink()
    (tmp_path / RESULTS_FILE).mkdir()
    with pytest.raises(DamagedFile, match=RESULTS_FILE):
        read_results(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("strides", "as_trained"), ("decoder", "nvJPEG")])
def test_what_most_rows_do_not_have_is_in_the_file_only_where_one_has_it(
    field: str, value: str, tmp_path: Path
) -> None:
    rows = [row(), row(**{field: value})]
    append_results(tmp_path, rows)
    assert list(read_results(tmp_path)) == rows
    usual, own = (tmp_path / RESULTS_FILE).read_text().splitlines()
    assert not {"strides", "decoder"} & json.loads(usual).keys()
    assert json.loads(own)[field] == value


def test_older_rows_whose_details_alone_name_the_decoder_get_the_field(tmp_path: Path) -> None:
    rows = [row(), row(details=("95 % interval", "JPEGs decoded by nvJPEG"))]
    append_results(tmp_path, rows)
    assert "decoder" not in (tmp_path / RESULTS_FILE).read_text()
    usual, decoded = read_results(tmp_path)
    assert usual == rows[0]
    assert decoded == dataclasses.replace(rows[1], decoder="nvJPEG")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "linear/feature4/top1"),
        ({"batch_norm": "recalibrated"}, "linear_recalibrated/feature4/top1"),
        ({"checkpoint": "random"}, "linear_random/feature4/top1"),
        ({"checkpoint": "torchvision"}, "linear_torchvision/feature4/top1"),
        (
            {"checkpoint": "random", "batch_norm": "recalibrated"},
            "linear_random_recalibrated/feature4/top1",
        ),
        ({"eval": "knn", "layer": "avgpool", "metric": "top1_k20"}, "knn/avgpool/top1_k20"),
        ({"eval": "pretext", "layer": ""}, "pretext/top1"),
        ({"checkpoint": "/runs/random"}, "linear/feature4/top1"),
        ({"strides": "as_trained"}, "linear_strides_as_trained/feature4/top1"),
        ({"decoder": "nvJPEG"}, "linear_nvJPEG/feature4/top1"),
        (
            {"checkpoint": "random", "batch_norm": "recalibrated", "decoder": "nvJPEG"},
            "linear_random_recalibrated_nvJPEG/feature4/top1",
        ),
    ],
)
def test_tracked_names_tell_what_is_compared(changes: dict[str, str], name: str) -> None:
    assert row(**changes).tracked_name == name


def test_no_two_kinds_of_row_share_a_tracked_name() -> None:
    kinds = [
        row(eval=run, layer=layer, checkpoint=checkpoint, batch_norm=batch_norm, decoder=decoder)
        for run in ("linear", "knn")
        for layer in LAYERS
        for checkpoint in ("/runs/one", "random", "torchvision")
        for batch_norm in ("as_trained", "recalibrated")
        for decoder in ("", "nvJPEG")
    ]
    assert len({kind.tracked_name for kind in kinds}) == len(kinds) == 144


def test_a_row_without_a_layer_of_the_benchmark_or_without_samples_can_not_exist() -> None:
    with pytest.raises(ValueError, match=r"layer .* 'conv1': .* feature1, feature2, .*, avgpool"):
        row(layer="conv1")
    with pytest.raises(ValueError, match=r"\bn .*is 0\b"):
        row(n=0)


def test_a_row_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROW.value = 100.0  # type: ignore[misc]
