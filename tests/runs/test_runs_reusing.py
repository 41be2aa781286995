"""Tests the reuse of results of other runs, and the resuming of stopped evaluations."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from relloc.checkpoints.states import save_state
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.views import Center
from relloc.evals.knn import Knn
from relloc.evaluation.contract import EvaluatedModel, NamedEvaluation
from relloc.evaluation.run import EvalPart
from relloc.models.small import SmallBackbone
from relloc.pretext.stopping import Stopped, StopRequest, stop_request
from relloc.results import Result, append_results, read_results
from relloc.runs.folder import UNREADABLE_FILE
from relloc.runs.reusing import (
    EvalRun,
    ResumableState,
    ReusableRows,
    measured_by_us,
    not_measured,
    state_file,
)

MODEL = EvaluatedModel(
    backbone=SmallBackbone(widths=(8, 8, 8, 10, 8)),
    checkpoint="/here/backbone.safetensors",
    model="small",
    weights="w",
)
KNN = Knn(
    k=(10,),
    temperature=0.07,
    layers=("avgpool",),
    view=Center(short_px=8, crop_px=8),
    batch=8,
    bank_gib=1,
)
IMAGES = FolderImages(name="colors", split="train", paths=[])


def eval_run(
    run_dir: Path, *, every_s: float = 0, stop: StopRequest | None = None, runs: Path | None
) -> EvalRun:
    stop = stop or StopRequest()
    return EvalRun(run_dir=run_dir, folder=None, stop=stop, save_every_s=every_s, reused_runs=runs)


def is_known(
    run_dir: Path,
    runs: Path | None,
    name: str = "knn",
    batch_norm: str = "as_trained",
    fingerprint: str = "mark",
    evaluation: Knn = KNN,
) -> bool:
    """Whether a part of an evaluation has rows in the run folder, or copies them from another's."""
    named = NamedEvaluation(
        name=name, evaluation=evaluation, splits=Splits(train=IMAGES, held_out=IMAGES)
    )
    part = EvalPart(
        named=named, evaluation=evaluation, batch_norm=batch_norm, fingerprint=fingerprint
    )
    rows = ReusableRows([part], eval_run(run_dir, runs=runs))
    return not_measured([part], MODEL, rows) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(Knn):
    """Stands for an evaluation that gives other numbers each time."""

    repeatable = False


def row(**changes: object) -> Result:
    about = {
        "eval": "knn",
        "dataset": "colors",
        "split": "val",
        "layer": "avgpool",
        "metric": "top1_k10",
        "value": 40.0,
    }
    who = {
        "n": 18,
        "seed": 0,
        "protocol": "3.7",
        "checkpoint": "/old/backbone.safetensors",
        "model": "small",
    }
    return Result(**{**about, **who, "fingerprint": "mark", **changes})  # type: ignore[arg-type]


def folder(runs: Path, name: str, *rows: Result) -> Path:
    (runs / name).mkdir(parents=True, exist_ok=True)
    append_results(runs / name, rows)
    return runs / name


def test_rows_of_the_same_weights_are_copied_once_and_say_where_they_were_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = folder(
        tmp_path, "sweep/0", row(), row(metric="top1_k20", value=41.0), row(fingerprint="another")
    )
    new = folder(tmp_path, "new")
    assert is_known(new, tmp_path)
    assert is_known(new, tmp_path)
    copied = read_results(new)
    assert [(found.metric, found.value) for found in copied] == [
        ("top1_k10", 40.0),
        ("top1_k20", 41.0),
    ]
    assert {(found.checkpoint, found.measured_in) for found in copied} == {
        (MODEL.checkpoint, str(old))
    }
    assert capsys.readouterr().out.count("same weights") == 1
    newest = folder(tmp_path, "newest")
    assert is_known(newest, tmp_path)
    # The run that measured them is named, not the one that copied them first.
    assert {found.measured_in for found in read_results(newest)} == {str(old)}


def test_rows_of_a_part_under_another_batch_norm_or_about_noise_are_copied_too(
    tmp_path: Path,
) -> None:
    of_part = row(batch_norm="recalibrated")
    of_network = row(metric="accuracy", layer="", batch_norm="as_trained")
    of_noise = row(metric="noise", layer="", dataset="noise", split="generated")
    folder(tmp_path, "old", of_part, of_network, of_noise)
    new = folder(tmp_path, "new")
    assert is_known(new, tmp_path, batch_norm="recalibrated")
    copied = [(found.metric, found.batch_norm, found.dataset) for found in read_results(new)]
    assert copied == [
        ("top1_k10", "recalibrated", "colors"),
        ("accuracy", "as_trained", "colors"),
        ("noise", "as_trained", "noise"),
    ]


def test_what_differs_each_time_is_taken_from_the_same_run_folder_only(tmp_path: Path) -> None:
    folder(tmp_path, "old", row())
    new = folder(tmp_path, "new")
    asked = Asked(**vars(KNN))
    assert not is_known(new, tmp_path, evaluation=asked)
    append_results(new, [row(checkpoint=MODEL.checkpoint)])
    assert is_known(new, tmp_path, evaluation=asked)
    assert len(read_results(new)) == 1


def test_answers_of_a_person_are_not_copied_as_those_of_weights(tmp_path: Path) -> None:
    asked = Asked(**vars(KNN))
    of_person = row(checkpoint="person", model="", layer="")
    run = folder(tmp_path, "run", of_person)
    # Weights without a head were asked nothing: all that there is has been measured.
    assert is_known(run, None, evaluation=asked)
    assert read_results(run) == [of_person]
    of_network = row(checkpoint="/other/backbone.safetensors", metric="network_accuracy")
    append_results(run, [of_network])
    assert is_known(run, None, evaluation=asked)
    found = [(each.metric, each.checkpoint) for each in read_results(run)]
    assert found[2:] == [("network_accuracy", MODEL.checkpoint)]


def test_what_is_not_the_same_is_measured(tmp_path: Path) -> None:
    folder(tmp_path, "old", row())
    new = folder(tmp_path, "new")
    assert not is_known(new, tmp_path, fingerprint="other mark")
    assert not is_known(new, tmp_path, name="linear")
    assert not is_known(new, None)  # reuse=false
    assert read_results(new) == []


def test_runs_with_broken_images_or_rows_are_not_trusted(tmp_path: Path) -> None:
    (folder(tmp_path, "broken images", row()) / UNREADABLE_FILE).write_text("3.jpg: broken\n")
    (folder(tmp_path, "broken rows", row()) / "results.jsonl").write_text("{}\n")
    new = folder(tmp_path, "new")
    assert not is_known(new, tmp_path)


def test_the_same_weights_by_two_paths_are_measured_once_in_a_run(tmp_path: Path) -> None:
    run = folder(tmp_path, "run", row(checkpoint="random"))
    assert is_known(run, None)
    assert [found.checkpoint for found in read_results(run)] == ["random", MODEL.checkpoint]
    assert is_known(run, None)
    assert len(read_results(run)) == 2


def test_rows_of_a_sweeps_runs_are_found(tmp_path: Path) -> None:
    for place in ("a sweep/0", "sweeps/name/0"):
        folder(tmp_path, place, row(fingerprint=place))
    new = folder(tmp_path, "new")
    assert is_known(new, tmp_path, fingerprint="a sweep/0")
    assert is_known(new, tmp_path, fingerprint="sweeps/name/0")


def test_one_run_at_a_time_measures_what_others_may_reuse(tmp_path: Path) -> None:
    def may_measure(
        name: str, evaluation: Knn = KNN, runs: Path | None = tmp_path
    ) -> AbstractContextManager[bool]:
        named = NamedEvaluation(
            name="knn", evaluation=evaluation, splits=Splits(train=IMAGES, held_out=IMAGES)
        )
        part = EvalPart(
            named=named, evaluation=evaluation, batch_norm="as_trained", fingerprint="mark"
        )
        return measured_by_us([part], eval_run(tmp_path / name, runs=runs))

    with may_measure("first") as is_first:
        assert is_first
        with may_measure("second") as is_second:
            assert not is_second
        # With reuse=false it would not use the other's results, nor those that differ each time.
        with may_measure("second", runs=None) as is_second:
            assert is_second
        with may_measure("second", Asked(**vars(KNN))) as is_second:
            assert is_second
    with may_measure("second") as is_second:
        assert is_second
    assert not (tmp_path / ".measured_now").exists()


def test_runs_that_can_only_be_read_are_reused_without_a_lock(tmp_path: Path) -> None:
    (tmp_path / ".measured_now").write_text("a file in the place of the folder")
    named = NamedEvaluation(
        name="knn", evaluation=KNN, splits=Splits(train=IMAGES, held_out=IMAGES)
    )
    part = EvalPart(named=named, evaluation=KNN, batch_norm="as_trained", fingerprint="mark")
    with measured_by_us([part], eval_run(tmp_path / "run", runs=tmp_path)) as is_ours:
        assert is_ours


def kept(
    run_dir: Path, *, every_s: float = 0, stop: StopRequest | None = None, runs: Path | None = None
) -> ResumableState:
    return ResumableState(eval_run(run_dir, every_s=every_s, stop=stop, runs=runs), "mark")


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """A state installs handlers, as each who listens does."""
    with stop_request():
        yield


def test_a_state_comes_back_as_it_was_and_is_not_written_all_the_time(tmp_path: Path) -> None:
    assert kept(tmp_path).load() is None
    kept(tmp_path, every_s=3600).save({"epoch": 1})
    assert not state_file(tmp_path, "mark").exists()
    kept(tmp_path).save({"epoch": 2, "weight": torch.arange(3.0)})
    found = kept(tmp_path).load()
    assert found is not None
    assert found["epoch"] == 2
    assert torch.equal(found["weight"], torch.arange(3.0))


def test_a_stop_waits_for_a_state_that_was_not_written_writes_it_and_leaves(tmp_path: Path) -> None:
    with stop_request() as stop:
        state = kept(tmp_path, every_s=3600, stop=stop)
        state.save({"epoch": 1})
        os.kill(os.getpid(), signal.SIGUSR1)  # nothing is raised: epoch 1 is in no file
        with pytest.raises(Stopped) as stopped:
            state.save({"epoch": 2})
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert (kept(tmp_path).load() or {})["epoch"] == 2


def test_what_takes_longer_than_a_stop_may_wait_is_written_each_time_and_no_stop_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("relloc.runs.reusing.time.monotonic", lambda: now[0])
    with stop_request() as stop:
        state = kept(tmp_path, every_s=3600, stop=stop)
        for epoch, (at, written) in enumerate(((6, 1), (7, 1), (11, 1), (17, 4)), start=1):
            now[0] = at
            state.save({"epoch": epoch})
            assert (kept(tmp_path).load() or {})["epoch"] == written
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert (kept(tmp_path).load() or {})["epoch"] == 4


def test_a_stop_while_the_state_is_written_leaves_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(path: Path, content: dict[str, int]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save_state(path, content)

    monkeypatch.setattr("relloc.runs.reusing.save_state", save)
    with stop_request() as stop, pytest.raises(Stopped) as stopped:
        kept(tmp_path, stop=stop).save({"epoch": 1})
    assert stopped.value.code == 130
    assert (kept(tmp_path).load() or {})["epoch"] == 1


def test_a_signal_while_ranks_agree_on_whether_to_stop_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def largest(*numbers: int) -> list[int]:
        calls.append(numbers)
        # The second call is the one after the state was written.
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return list(numbers)

    monkeypatch.setattr("relloc.runs.reusing.ranks.largest", largest)
    with stop_request() as stop, pytest.raises(Stopped) as stopped:
        kept(tmp_path, stop=stop).save({"epoch": 1})
    assert stopped.value.code == 143


def test_a_damaged_state_is_told_and_not_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(tmp_path).save({"epoch": 2})
    flip_a_byte(state_file(tmp_path, "mark"))
    assert kept(tmp_path).load() is None
    assert "No evaluation" in capsys.readouterr().out


def test_a_full_disk_ends_no_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    kept(tmp_path / "file").save({"epoch": 1})  # no folder can be made there
    assert "evaluation itself goes on" in capsys.readouterr().out


def test_the_newest_state_that_another_run_left_is_gone_on_from(tmp_path: Path) -> None:
    for epoch, name in enumerate(("older", "newer", "sweeps/name/0", "broken images"), start=1):
        left = folder(tmp_path, name)
        kept(left).save({"epoch": epoch})
        os.utime(state_file(left, "mark"), (epoch, epoch))
    (tmp_path / "broken images" / UNREADABLE_FILE).write_text("3.jpg: broken\n")
    new = folder(tmp_path, "new")
    other_mark = ResumableState(eval_run(new, runs=tmp_path), "other mark")
    assert other_mark.load() is None
    assert kept(new).load() is None  # reuse=false
    assert kept(new, runs=tmp_path).load() == {"epoch": 3}
    flip_a_byte(state_file(tmp_path / "sweeps" / "name" / "0", "mark"))
    assert kept(new, runs=tmp_path).load() == {"epoch": 2}
    kept(new).save({"epoch": 7})
    assert kept(new, runs=tmp_path).load() == {"epoch": 7}  # its own comes first
    assert state_file(tmp_path / "newer", "mark").exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_results_of_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match="is nan"):
        dataclasses.replace(row(), value=float("nan"))
