import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.status import Status
from relloc.tracking import (
    DatasetRecord,
    RunRecord,
    environment_tags,
    flatten,
    read_status,
    write_status,
)
from relloc.tracking.record import commit_of, legal_name


def test_a_record_comes_back_as_it_was_and_numbers_stay_numbers(tmp_path: Path) -> None:
    voc = DatasetRecord(name="voc07", context="train", digest="ab", source="/data", n_images=5011)
    params = {"lr": 1e-05, "epochs": 70, "nesterov": True, "model": "resnet50"}
    record = RunRecord(
        name="r50", experiment="card", tags={"host": "n1"}, params=params, datasets=(voc,)
    )
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    written = json.loads((tmp_path / "run.json").read_text())["params"]
    assert [type(value) for value in written.values()] == [float, int, bool, str]
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_path_of_bytes_that_are_no_text_ends_no_run(tmp_path: Path) -> None:
    RunRecord(name="a", experiment="b", params={"checkpoint": os.fsdecode(b"caf\xe9.pt")}).write(
        tmp_path
    )
    assert RunRecord.read(tmp_path).params == {"checkpoint": "caf?.pt"}


def test_a_resumed_run_keeps_its_identity_but_takes_the_new_description(tmp_path: Path) -> None:
    first = RunRecord(name="first", experiment="card", started_ms=1)
    first.write(tmp_path)
    RunRecord(name="again", experiment="card").write(tmp_path)
    read = RunRecord.read(tmp_path)
    assert (read.uid, read.started_ms, read.name) == (first.uid, 1, "again")


def test_a_relative_store_is_written_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RunRecord(name="r", experiment="e", tracking_uri="sqlite:///x/mlflow.db").write(tmp_path)
    assert RunRecord.read(tmp_path).tracking_uri == f"sqlite:///{tmp_path}/x/mlflow.db"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "a"}', '{"name": "a", "experiment": "b", "color": 1}']
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json .*run record"):
        RunRecord.read(tmp_path)


def test_impossible_records_do_not_exist() -> None:
    with pytest.raises(ValueError, match="context is 'test'"):
        DatasetRecord(name="a", context="test", digest="", source="", n_images=1)
    with pytest.raises(ValueError, match="n_images is -1"):
        DatasetRecord(name="a", context="eval", digest="", source="", n_images=-1)
    with pytest.raises(ValueError, match="experiment is empty"):
        RunRecord(name="a", experiment=" ")


def test_status_round_trip(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, "KILLED")
    status = read_status(tmp_path)
    assert status is not None
    assert status.status == Status.STOPPED
    with pytest.raises(ValueError, match="'done' .*Status"):
        write_status(tmp_path, "done")


def test_flatten_names_every_leaf() -> None:
    config = {
        "a": {"b": {"c": 1, "none": None}, "d": [1, {"e": 2}]},
        "f": False,
        "g": {},
        "p": Path("/x"),
    }
    assert flatten(config) == {"a.b.c": 1, "a.d": '[1, {"e": 2}]', "f": False, "p": "/x"}
    assert flatten({"x": math.inf, "y": math.nan}) == {"x": "inf", "y": "nan"}


words = st.text("abc_", min_size=1, max_size=4)


@given(
    st.dictionaries(
        words, st.one_of(st.integers(), st.floats(), st.dictionaries(words, st.booleans()))
    )
)
def test_flatten_always_gives_valid_json(config: dict[str, object]) -> None:
    json.dumps(flatten(config), allow_nan=False)


@given(st.text(max_size=300))
def test_legal_names_are_taken_by_mlflow_and_stay_as_they_are(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    legal = legal_name(name)
    _validate_metric_name(legal)
    assert legal_name(legal) == legal
    assert 0 < len(legal) <= 250


def test_legal_name_changes_only_what_must_change() -> None:
    assert legal_name("linear_random/feature4/top1") == "linear_random/feature4/top1"
    assert legal_name("/acc@5//k=[1]") == "acc_5/k__1_"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    file = tmp_path / "package.py"
    file.write_text("a")
    assert commit_of(file) is None
    git(tmp_path, "init", "-q")
    assert commit_of(file) is None, "a file that is only lying in a checkout has no commit"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(file) == head
    assert len(head) == 40
    file.write_text("b")
    assert commit_of(file) == f"{head}-dirty"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    tags = environment_tags(["NVIDIA H200", "NVIDIA H200"])
    assert "relloc.commit" not in tags
    assert tags["devices"] == "NVIDIA H200, NVIDIA H200"
    assert tags["version.python"] == sys.version.split()[0]
    assert tags["version.torch"][0].isdigit()
    assert tags["host"]


def test_importing_the_room_does_not_import_mlflow() -> None:
    code = "import relloc.tracking, relloc.sync, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
