"""Notebooks are executed as notebooks, on results written here."""

import itertools
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

from relloc.results import Result, append_results
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import Sweep
from relloc.tracking import Journal, RunRecord

ANALYSIS = Path(__file__).parents[2] / "analysis"
NOTEBOOKS = sorted(path for path in ANALYSIS.glob("*.py") if "jupytext" in path.read_text())
TOLD = {
    "accuracy_by_layer": ("31.0", "65.0"),  # random, feature1; pretrained, feature5
    "label_free": ("RankMe", "1.0", "-1.0"),  # of a measure that goes with accuracy, or against it
    "sweep": (
        "10.08",
        "0.71",
        "(16, 7)",
    ),  # how far settings and seeds lie apart, where the highest is
    "training_curves": ("2.17", "31.0"),  # the last loss, the last accuracy
}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    RunRecord(name="small gap21 s0", experiment="relloc").write(run_dir)
    names = {
        "dataset": "photos",
        "split": "held_out",
        "n": 100,
        "seed": 0,
        "protocol": "3.3",
        "model": "small",
    }
    append_results(
        run_dir,
        [
            Result(
                eval=evaluation,
                layer=f"feature{stage}",
                metric=metric,
                headline=True,
                value=value + stage,
                checkpoint=who,
                **names,
            )
            for evaluation, metric in (("linear_fast", "top1"), ("knn", "top1_k20"))
            for who, value in (("random", 30.0), ("/x/backbone.safetensors", 60.0))
            for stage in range(1, 6)
        ],
    )
    journal = Journal(run_dir)
    for step in (10, 20, 30):
        journal.log({"train/loss": 65.0 / step, "train/top1": 31.0}, step)
    points = []
    for gap, jitter, seed in itertools.product((0, 16), (0, 7), (0, 1)):
        folder = tmp_path / f"gap{gap} jit{jitter} s{seed}"
        folder.mkdir()
        value = 40.0 + gap + jitter + seed
        row = {
            **names,
            "eval": "knn",
            "metric": "top1_k20",
            "checkpoint": "/x/backbone.safetensors",
            "seed": seed,
        }
        append_results(folder, [Result(layer="feature4", value=value, headline=True, **row)])
        words = (f"grid.gap_px={gap}", f"grid.jitter_px={jitter}", f"seed={seed}")
        points.append(
            Point(
                kind="train", name=folder.name, overrides=words, identity=folder.name, folder=folder
            )
        )
    sweep = Sweep(tmp_path / "sweeps" / "grid")
    with sweep.locked():
        sweep.add(points, ["train.py"])
    copies = tmp_path / "mlartifacts" / "relloc"  # MLflow keeps copies of results beside the runs
    copies.mkdir(parents=True)
    (copies / "results.jsonl").write_bytes((run_dir / "results.jsonl").read_bytes())
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path))
    return tmp_path


def test_there_is_a_notebook_to_execute():
    assert [path.stem for path in NOTEBOOKS] == [
        "accuracy_by_layer",
        "label_free",
        "sweep",
        "training_curves",
    ]


def measure_without_labels(runs: Path) -> None:
    """Adds pretrainings whose RankMe goes with the accuracy of feature4 and against feature5's."""
    names = {"dataset": "photos", "split": "held_out", "n": 100, "model": "small"}
    for gap, seed in itertools.product(range(6), range(2)):
        folder = runs / f"measured gap{gap} s{seed}"
        folder.mkdir()
        RunRecord(
            name=f"gap{gap} s{seed}",
            experiment="relloc",
            tags={"relloc.kind": "train"},
            params={"grid.gap_px": gap, "seed": seed},
        ).write(folder)
        value = 10.0 * gap + seed
        shared = {**names, "seed": seed, "headline": True, "checkpoint": "x/backbone.safetensors"}
        rows = [Result(eval="pretext", kind="pretext", metric="top1", value=50 + gap, **shared)]
        for layer, accuracy in (("feature4", 30 + value), ("feature5", 90 - value)):
            of_layer = {**shared, "layer": layer}
            rows.append(Result(eval="knn", metric="top1_k20", value=accuracy, **of_layer))
            rows.append(
                Result(
                    eval="label_free",
                    table="Label-free measures",
                    metric="rankme",
                    variant="RankMe",
                    unit="directions",
                    higher_is_better=None,
                    value=value,
                    **of_layer,
                )
            )
        append_results(folder, rows)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, runs):
    if path.stem == "label_free":
        measure_without_labels(runs)
    notebook = jupytext.read(path)
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(ANALYSIS)}},
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    table = next(
        output["data"]["text/plain"] for output in outputs if "text/html" in output.get("data", {})
    )
    for value in TOLD[path.stem]:
        assert value in table
    assert (runs / f"{path.stem}.png").stat().st_size > 10_000
    if path.stem == "label_free":
        # Neither sign of either measure stands at both layers
        [answer] = [each["text"] for each in outputs if "direction" in each.get("text", "")]
        assert answer.startswith("**No")
        assert "2 measures" in answer
        assert "6 settings" in answer


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
def test_rows_belong_to_the_pretraining_of_their_weights(
    tmp_path, monkeypatch, kind, checkpoint, study
):
    monkeypatch.syspath_prepend(str(ANALYSIS))
    from load import load_results

    told = {
        "pretrained": ("gap0 s1 gray", 1, {}),
        "it": ("gap32 s0 gray", 0, {"relloc.kind": kind}),
    }
    for folder, (name, seed, tags) in told.items():
        (tmp_path / folder).mkdir()
        RunRecord(name=name, experiment="relloc", tags=tags, params={"seed": seed}).write(
            tmp_path / folder
        )
    row = Result(
        eval="knn",
        layer="feature1",
        metric="top1_k20",
        value=1.0,
        protocol="3.7",
        model="small",
        dataset="photos",
        split="held_out",
        n=100,
        seed=0,
        checkpoint=checkpoint.format(runs=tmp_path),
    )
    append_results(tmp_path / "it", [row])
    assert list(load_results(tmp_path)["study"]) == [study]


def test_runs_that_differ_in_their_seed_alone_are_one_study(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ANALYSIS))
    from load import load_results

    names = {
        "dataset": "photos",
        "split": "held_out",
        "n": 100,
        "model": "small",
        "checkpoint": "/x/backbone.pt",
    }
    for seed, rate in ((0, 0.1), (1, 0.1), (2, 0.2)):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        params = {"seed": seed, "optimizer.lr": rate, "workers": seed}
        told = {"name": f"gap0 s{seed} gray", "tags": {"relloc.kind": "train"}, "params": params}
        RunRecord(experiment="relloc", **told).write(folder)
        append_results(
            folder,
            [Result(eval="knn", layer="feature1", metric="top1", value=1.0, seed=seed, **names)],
        )
    found = load_results(tmp_path)
    assert set(found["study"]) == {"gap0 gray"}
    assert list(found["settings"] == found["settings"][0]) == [True, True, False]
