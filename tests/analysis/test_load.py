"""What notebooks are given: each measurement once, selected, and never mixed."""

import subprocess
import sys
from pathlib import Path

import draw
import load
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from relloc.errors import DataError, UsageError
from relloc.results import Result, append_results, read_results
from relloc.tracking import DatasetRecord, RunRecord, sync
from relloc.tracking.watched import append_watched


def row(**changes) -> Result:
    usual = {
        "eval": "knn",
        "layer": "feature1",
        "metric": "top1_k20",
        "value": 1.0,
        "model": "small",
        "dataset": "photos",
        "split": "held_out",
        "n": 100,
        "seed": 0,
        "headline": True,
        "checkpoint": "/x/backbone.safetensors",
        "fingerprint": "one",
    }
    return Result(**{**usual, **changes})


def write_run(folder: Path, *rows: Result, name: str = "", **record) -> None:
    folder.mkdir(parents=True)
    kind = record.pop("kind", "train")
    params = record.pop("params", {"seed": 0})
    RunRecord(
        name=name or folder.name,
        experiment="relloc",
        tags={"relloc.kind": kind},
        params=params,
        **record,
    ).write(folder)
    append_results(folder, rows)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    for name in ("RELLOC_MLFLOW", "RELLOC_SELECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "checkpoint", "study"),
    [
        ("train", "/moved/away/backbone.safetensors", "gap32 gray"),
        ("evaluate", "{runs}/pretrained/backbone.safetensors", "gap0 gray"),
        ("evaluate", "{runs}/pretrained/checkpoints/epoch_30.pt", "gap0 gray epoch_30"),
        ("evaluate", "/x/theirs/backbone.safetensors", "theirs"),
        ("evaluate", "/x/relative-loc_resnet50.pth", "relative-loc_resnet50"),
        ("evaluate", "random", "random"),
    ],
)
def test_rows_belong_to_the_pretraining_of_their_weights(here, kind, checkpoint, study):
    write_run(here / "pretrained", name="gap0 s1 gray", params={"seed": 1}, kind="")
    ours = row(checkpoint=checkpoint.format(runs=here))
    write_run(here / "it", ours, name="gap32 s0 gray", kind=kind)
    assert list(load.load_results()["study"]) == [study]


def test_a_notebook_that_is_run_as_a_script_ends_in_one_message(here):
    done = subprocess.run(
        [sys.executable, Path(load.__file__).with_name("label_free.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    [message] = done.stderr.splitlines()
    assert message.startswith("relloc: ")
    assert str(here) in message


def test_runs_that_differ_in_their_seed_alone_are_one_line(here):
    for seed, rate in ((0, 0.1), (1, 0.1), (2, 0.2)):
        params = {"seed": seed, "optimizer.lr": rate, "workers": seed}
        ours = row(seed=seed, value=10.0 * seed, fingerprint=str(seed))
        write_run(here / f"run{seed}", ours, name=f"gap0 s{seed} gray", params=params)
    found = load.load_results()
    assert set(found["study"]) == {"gap0 gray"}
    assert list(load.line_names(found).values()) == ["lr 0.1", "lr 0.2"]
    means = load.over_seeds(found, [*load.LINE, "layer"])
    assert list(means["mean"]) == [5.0, 20.0]
    assert list(means["n"]) == [2, 1]
    # Student's t of two values that differ by 10: 12.706 standard errors of 5
    assert means["high"].iloc[0] == pytest.approx(5 + 12.706 * 5, abs=0.01)


def test_lines_of_an_ablation_have_what_sets_them_apart(here):
    base = {"grid.gap_px": 32, "grid.yoked_scale": False, "color._target_": "relloc.patches.Drop"}
    changes = {
        "nothing": {},
        "gray": {"color._target_": "relloc.patches.Gray", "color.p": 0.66},
        "scaled": {"grid.gap_px": 21, "grid.yoked_scale": True},
        "flip": {"pretext_flip": 0.5},
    }
    for name, changed in changes.items():
        write_run(here / name, row(fingerprint=name), name=name, params=base | changed)
    found = load.load_results()
    names = {"usual settings", "color Gray", "gap 21, yoked_scale True", "pretext_flip 0.5"}
    assert set(load.line_names(found).values()) == names
    # Of few settings, and where none is usual, each line has its own
    two = found[found["folder"].isin(["nothing", "gray"])]
    assert set(load.line_names(two).values()) == {"color Drop", "color Gray"}
    two = found[found["folder"].isin(["gray", "scaled"])]
    assert set(load.line_names(two).values()) == {
        "gap 32, color Gray, yoked_scale none",
        "gap 21, color Drop, yoked_scale True",
    }
    fainter = base | {"color._target_": "relloc.patches.Gray", "color.p": 0.5}
    write_run(here / "fainter", row(fingerprint="fainter"), name="fainter", params=fainter)
    found = load.load_results()
    three = found[found["folder"].isin(["nothing", "gray", "fainter"])]
    assert set(load.line_names(three).values()) == {
        "color Drop, p none",
        "color Gray, p 0.66",
        "color Gray, p 0.5",
    }


def test_copies_of_a_measurement_count_once(here):
    write_run(here / "a", row(checkpoint="random", value=3.0))
    copy = row(checkpoint="random", value=3.0, measured_in=str(here / "a"))
    write_run(here / "b", copy, row(value=5.0, fingerprint="two"))
    # The same weights under another path
    moved = row(value=5.0, fingerprint="two", checkpoint="/y/b.pth", measured_in=str(here / "b"))
    write_run(here / "c", moved, kind="evaluate")
    found = load.load_results()
    assert sorted(found["value"]) == [3.0, 5.0]
    assert set(found["folder"]) == {"a", "b"}


def test_two_sets_of_one_name_are_two_panels(here):
    for name, digest in (("a", "12"), ("b", "34")):
        images = DatasetRecord(
            name="photos-held_out", context="eval", digest=digest, source="/d", n_images=100
        )
        write_run(here / name, row(fingerprint=name), datasets=(images,))
    found = load.load_results()
    shown = load.panels(found)
    assert [shared["images"] for shared, _ in shown] == ["12", "34"]
    titles = [load.panel_title(shared, found) for shared, _ in shown]
    assert "images 12" in titles[0]
    with pytest.raises(load.MixedRows, match=r"images \(12, 34\).*RELLOC_SELECT='images=12"):
        load.panels(found, most=1)
    assert len(load.load_results(["images=34"])) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"n": 200}, r"n \(100, 200\)"), ({"precision": "TF32"}, r"precision \(none, TF32\)")],
)
def test_what_differs_in_more_than_the_seed_is_not_averaged(here, changes, told):
    write_run(here / "a", row(), name="same")
    other = row(**changes, seed=1, fingerprint="b")
    write_run(here / "b", other, name="same", params={"seed": 1})
    with pytest.raises(load.MixedRows, match=told):
        load.over_seeds(load.load_results(), [*load.LINE, "layer"])


def test_equal_seeds_are_no_repeats(here):
    write_run(here / "a", row(), name="same")
    write_run(here / "b", row(value=2.0, fingerprint="b", details=("30 epochs",)), name="same")
    with pytest.raises(load.MixedRows, match=r"same seed.*folder \(a, b\); details"):
        load.over_seeds(load.load_results(), [*load.LINE, "layer"])


def test_more_lines_than_can_be_told_apart_are_refused(here):
    for gap in range(8):
        for jitter in (0, 7):
            params = {"seed": 0, "grid.gap_px": gap, "grid.jitter_px": jitter}
            name = f"{gap} {jitter}"
            write_run(here / name, row(fingerprint=name), params=params)
    found = load.load_results()
    with pytest.raises(load.MixedRows, match=r"16 pretrainings .*RELLOC_SELECT='grid.jitter_px=0'"):
        draw.named_lines(found)
    # One setting that differs orders eight lines, from dark to light
    ordered = load.load_results(["grid.jitter_px=0"])
    _, by_line = draw.named_lines(ordered)
    looks = list(by_line.values())
    brightness = [sum(look["color"][:3]) for look in looks]
    assert brightness == sorted(brightness)
    assert len({look["marker"] for look in looks}) == 8


@pytest.mark.parametrize(
    ("words", "n"),
    [
        (["sweep=gaps", "eval=knn", "layer=feature[45]", "metric=top1_k20"], 2 * 2 * (6 + 1)),
        (["eval=knn", "layer=feature4", "grid.gap_px=0,4"], 8 + 2),
        (["schedule.epochs=6", "eval=pretext"], 1),
        (["run=*6ep*", "eval=pretext"], 1),
    ],
)
def test_words_select_as_those_of_reports(runs, words, n):
    assert len(load.load_results(words)) == n


def test_words_that_fit_nothing_are_told(runs):
    with pytest.raises(UsageError, match=r"grid\.gap is neither a field"):
        load.load_results(["grid.gap=0"])
    with pytest.raises(UsageError, match="fits eval=none"):
        load.load_results(["eval=none"])
    with pytest.raises(UsageError, match="nowhere is no folder"):
        load.load_results(["nowhere"])


def test_no_runs_are_told(here):
    with pytest.raises(DataError, match="RELLOC_RUNS"):
        load.load_results()


def test_curves_are_of_trainings_by_images_seen(runs):
    knn = next(each for each in read_results(runs / "long") if each.eval == "knn")
    append_watched(runs / "long", 4, [knn])
    curves = load.load_curves(["grid.gap_px=8", "grid.jitter_px=0"])
    assert curves["folder"].nunique() == 3
    [watched] = curves[curves["metric"] == f"watch/{knn.tracked_name}"].to_dict("records")
    assert (watched["folder"], watched["step"], watched["value"]) == ("long", 4, knn.value)
    last = curves[(curves["folder"] == "long") & (curves["metric"] == "train/loss")].iloc[-1]
    assert last["images_seen"] == pytest.approx(last["step"] * 16 / 1e6)


@pytest.mark.slow
def test_a_store_of_mlflow_gives_what_run_folders_give(runs, monkeypatch, tmp_path):
    knn = next(each for each in read_results(runs / "long") if each.eval == "knn")
    append_watched(runs / "long", 4, [knn])
    results, curves = load.load_results(), load.load_curves()
    of_sweep = load.load_results(["sweep=gaps", "eval=knn"])
    # Among them are rows of random weights that one run measured and others copied
    rows = [row for file in runs.glob("train_*") for row in read_results(file)]
    assert any(row.measured_in.startswith(str(runs)) for row in rows)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for record in runs.rglob("run.json"):
        sync(record.parent, store)
    monkeypatch.setenv("RELLOC_MLFLOW", store)
    pd.testing.assert_frame_equal(load.load_results(), results)
    pd.testing.assert_frame_equal(load.load_curves(), curves)
    pd.testing.assert_frame_equal(load.load_results(["sweep=gaps", "eval=knn"]), of_sweep)


def test_intervals_that_hold_together_are_those_of_students_t_at_a_smaller_level():
    of_seeds = load.statistics(np.array([1.0, 2.0, 6.0]))
    single = load.statistics(np.array([3.0]), 2.0, 4.0)
    means = pd.DataFrame([of_seeds, single])
    few, many = load.half_widths(means, of=10)
    # 5 % divided by ten intervals, over three seeds
    low, high = student.interval(0.995, 2, loc=3, scale=np.sqrt(7 / 3))
    assert few == pytest.approx((high - low) / 2)
    # A single row has the interval of its evaluation, which is one of a normal mean
    assert many == pytest.approx(norm.ppf(0.9975) / norm.ppf(0.975))
