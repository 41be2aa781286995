import csv
import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from relloc.errors import DataError
from relloc.report import main
from relloc.reports.early import early_observations
from relloc.reports.load import find_measured
from relloc.reports.observations import Observations, observations
from relloc.reports.prediction import (
    EARLY_TITLE,
    TITLE,
    Prediction,
    correlations,
    counted_kendall,
    counted_spearman,
    prediction_group,
    prediction_groups,
    predictions,
)
from relloc.results import Result, append_results
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import Sweep
from relloc.tracking.journal import Journal
from relloc.tracking.record import DatasetRecord, RunRecord, write_status
from relloc.tracking.watched import append_watched

RNG = np.random.default_rng(0)
NewRun = Callable[..., Path]


def row(metric: str, value: float, layer: str = "feature4", **fields: object) -> Result:
    """A row as an evaluation yields it; `metric` says which."""
    known = {
        "pretext": {"kind": "pretext", "metric": "top1", "eval": "pretext"},
        "rankme": {
            "eval": "label_free",
            "variant": "RankMe",
            "unit": "directions",
            "higher_is_better": None,
            "table": "Label-free measures",
            "column": layer,
        },
        "dse_between": {
            "eval": "label_free",
            "higher_is_better": None,
            "unit": "dimensionless",
            "table": "Terms of DSE",
            "column": "between",
        },
        "top1": {"eval": "linear", "table": "Linear"},
        "miou": {"eval": "voc12aug_fcn", "kind": "fine-tuned", "dataset": "voc2012"},
    }
    default = {
        "metric": metric,
        "headline": metric != "dse_between",
        "dataset": "photos",
        "split": "held_out",
        "n": 100,
        "seed": 0,
        "model": "small",
        "checkpoint": "x/backbone.safetensors",
        "layer": "" if metric in ("pretext", "miou") else layer,
    }
    return Result(**{**default, **known[metric], **fields, "value": value})  # type: ignore[arg-type]


@pytest.fixture
def pretrained(tmp_path: Path) -> NewRun:
    """A pretraining below runs/ that evaluated itself."""
    started = 0

    def new(*rows: Result, gap: int = 0, seed: int = 0, digest: str = "d") -> Path:
        nonlocal started
        started += 1
        folder = tmp_path / "runs" / f"run{started}"
        folder.mkdir(parents=True)
        record = RunRecord(
            name=f"gap{gap} s{seed}",
            experiment="relloc",
            tags={"relloc.kind": "train"},
            params={"grid.gap_px": gap, "seed": seed, "workers": started},
            datasets=(
                DatasetRecord(
                    name="photos-held_out", context="eval", digest=digest, source="x", n_images=9
                ),
            ),
            started_ms=started,
        )
        record.write(folder)
        append_results(folder, rows)
        write_status(folder, "FINISHED")
        return folder

    return new


def observed(tmp_path: Path) -> Observations:
    return observations(find_measured([tmp_path / "runs"]))


def by_names(found: Sequence[Prediction]) -> dict[tuple[str, str, str], Prediction]:
    return {(each.measure.name, each.accuracy.metric, each.layer): each for each in found}


def test_known_correlations_and_ties() -> None:
    points = [str(number) for number in range(8)]
    x = np.arange(8.0)
    for y, sign in ((np.exp(x), 1), (-(x**3), -1)):
        spearman, kendall = correlations(x, y, points)
        assert (spearman.value, kendall.value) == pytest.approx((sign, sign))
        assert (spearman.low, spearman.high) == pytest.approx((sign, sign))
    tied = np.array([1.0, 1, 2, 2, 3, 3, 3, 0])
    spearman, kendall = correlations(x, tied, points)
    assert spearman.value == pytest.approx(scipy.stats.spearmanr(x, tied)[0])
    assert kendall.value == pytest.approx(scipy.stats.kendalltau(x, tied)[0])
    assert -1 <= (spearman.low or 0) < spearman.value < (spearman.high or 0) <= 1
    assert correlations(x, tied, points) == (spearman, kendall)  # nothing is left to chance


def test_counts_are_as_good_as_repeated_pairs() -> None:
    x, y = RNG.integers(5, size=(2, 12)).astype(float)
    counts = RNG.integers(3, size=(40, 12)).astype(float)
    for number, drawn in enumerate(counts.astype(int)):
        repeated = np.repeat(x, drawn), np.repeat(y, drawn)
        rho, _ = scipy.stats.spearmanr(*repeated)
        tau, _ = scipy.stats.kendalltau(*repeated)
        assert counted_spearman(x, y, counts)[number] == pytest.approx(rho)
        assert counted_kendall(x, y, counts)[number] == pytest.approx(tau)
    one_pair = np.eye(12)[:1]
    assert np.isnan(counted_spearman(x, y, one_pair)).all()
    assert np.isnan(counted_kendall(x, y, one_pair)).all()


def test_seeds_of_a_point_are_drawn_together() -> None:
    x, y = RNG.normal(size=(2, 9))
    points = [str(number) for number in range(9)]
    alone, _ = correlations(x, y, points)
    # Repeats that bring nothing new leave the interval as wide as it was, though they are 4 times
    # as many pairs
    repeated, _ = correlations(np.tile(x, 4), np.tile(y, 4), points * 4)
    assert repeated.low == pytest.approx(alone.low)
    assert repeated.high == pytest.approx(alone.high)
    pairs, _ = correlations(np.tile(x, 4), np.tile(y, 4), [str(each) for each in range(36)])
    assert (pairs.high or 0) - (pairs.low or 0) < 0.7 * ((alone.high or 0) - (alone.low or 0))


def test_the_interval_is_that_of_drawing_points_one_after_another() -> None:
    n_points, seeds = 7, 3
    x = np.repeat(RNG.normal(size=n_points), seeds) + 0.3 * RNG.normal(size=n_points * seeds)
    y = x + RNG.normal(size=len(x))
    points = np.repeat(np.arange(n_points), seeds)
    rhos = []
    for _ in range(2000):
        chosen = RNG.integers(n_points, size=n_points)
        index = np.concatenate([np.flatnonzero(points == point) for point in chosen])
        rhos.append(scipy.stats.spearmanr(x[index], y[index])[0])
    found, _ = correlations(x, y, [str(point) for point in points])
    assert (found.low, found.high) == pytest.approx(np.percentile(rhos, [2.5, 97.5]), abs=0.05)


def test_layers_are_held_against_their_own_and_networks_against_all(
    pretrained: NewRun, tmp_path: Path
) -> None:
    for gap, seed in itertools.product(range(6), range(2)):
        rank = 10.0 * gap + seed
        pretrained(
            row("pretext", 50 - gap),
            row("rankme", rank, "feature3"),
            row("rankme", -rank, "feature4"),
            row("dse_between", 1.0),
            row("top1", rank, "feature3"),
            # As nearest neighbors name their lines
            row("top1", rank, "feature4", variant="feature4"),
            row("miou", rank),
            row("rankme", 1000.0, checkpoint="random"),
            row("top1", 0.0, checkpoint="random"),
            gap=gap,
            seed=seed,
        )
    found = by_names(predictions(observed(tmp_path)))
    assert set(found) == {
        ("RankMe", "top1", "feature3"),
        ("RankMe", "top1", "feature4"),
        ("RankMe", "miou", "feature3"),
        ("RankMe", "miou", "feature4"),
        ("pretext accuracy", "top1", "feature3"),
        ("pretext accuracy", "top1", "feature4"),
        ("pretext accuracy", "miou", ""),
    }
    rhos = {key: each.spearman.value for key, each in found.items() if each.spearman}
    assert rhos["RankMe", "top1", "feature3"] == pytest.approx(1)
    assert rhos["RankMe", "top1", "feature4"] == pytest.approx(-1)
    assert rhos["RankMe", "miou", "feature4"] == pytest.approx(-1)
    assert -1 < rhos["pretext accuracy", "miou", ""] < -0.9  # ties of seeds
    assert {(each.n_weights, each.n_points) for each in found.values()} == {(12, 6)}
    tables = prediction_group(list(found.values())).tables
    assert [table.columns for table in tables] == [
        ("feature3", "feature4"),
        ("feature3", "feature4", "network"),
    ]


def test_only_rows_that_compare_are_put_together(pretrained: NewRun, tmp_path: Path) -> None:
    def run(gap: int, digest: str = "d", **fields: object) -> None:
        rows = row("rankme", float(gap), **fields), row("top1", float(gap), **fields)
        pretrained(*rows, gap=gap, digest=digest)

    for gap in range(5):
        run(gap)
    run(5, n=99)
    run(6, batch_norm="recalibrated")
    run(7, model="resnet50")
    run(8, view="another")
    run(9, digest="another")
    run(11, decoder="nvJPEG")
    pretrained(row("rankme", 1.0), gap=10)  # no accuracy
    found = predictions(observed(tmp_path))
    told = [each for each in found if each.spearman]
    assert [(each.n_weights, each.n_points) for each in told] == [(5, 5)]
    for each in found:
        assert each.measure.model == each.accuracy.model
        assert each.measure.batch_norm == each.accuracy.batch_norm
        assert each.measure.decoder == each.accuracy.decoder


def test_the_last_measurement_counts_and_seeds_of_an_evaluation_are_averaged(
    pretrained: NewRun, tmp_path: Path
) -> None:
    pretrained(
        row("rankme", 1.0),
        row("top1", 1.0),
        row("top1", 2.0),
        row("top1", 4.0, seed=1),
    )
    seen = observed(tmp_path)
    assert [list(values.values()) for values in seen.accuracies.values()] == [[3.0]]


def test_an_evaluation_of_a_run_is_joined_with_what_it_measured_of_itself(
    pretrained: NewRun, tmp_path: Path
) -> None:
    folder = pretrained(row("top1", 1.0, checkpoint="/moved/away/backbone.safetensors"))
    evaluated = tmp_path / "runs" / "evaluated"
    evaluated.mkdir()
    RunRecord(name="e", experiment="relloc", tags={"relloc.kind": "evaluate"}).write(evaluated)
    append_results(
        evaluated,
        [
            row("rankme", 2.0, checkpoint=str(folder / "backbone.safetensors")),
            row("rankme", 3.0, checkpoint="/theirs/weights.pth"),
        ],
    )
    seen = observed(tmp_path)
    [of_measure], [of_accuracy] = seen.measures.values(), seen.accuracies.values()
    assert len(of_measure) == 2
    assert of_accuracy.keys() < of_measure.keys()
    assert len(set(seen.points.values())) == 2


@pytest.fixture
def watched(pretrained: NewRun) -> Callable[[int], Path]:
    """A training of 100 steps, which monitors and another process measured meanwhile."""

    def new(gap: int) -> Path:
        folder = pretrained(row("top1", 10.0 * gap), gap=gap)
        record = RunRecord.read(folder)
        more = {"schedule.epochs": 10, "model.name": "small", "monitor.images": 20}
        dataclasses.replace(record, params={**record.params, **more}).write(folder)
        journal = Journal(folder)
        for step, rank in ((10, -gap), (100, gap)):
            metrics = {
                "train/epoch": step / 10,
                "monitor/rankme/feature4": float(rank),
                "monitor/pretext/top1": 50.0 + rank,
                "monitor/pretext/top1_up": 1.0,
                "monitor/knn/feature4/top1_k20": float("nan"),
            }
            journal.log(metrics, step)
        # The one closest to step 10 counts, and none that is far from it.
        for step, rank in ((14, -gap), (9, gap), (100, -gap)):
            append_watched(folder, step, [row("top1", float(rank), checkpoint="x/step.pt")])
        append_watched(folder, 40, [row("rankme", float(gap), checkpoint="x/step.pt")])
        return folder

    return new


def test_measures_after_a_tenth_are_held_against_the_end(watched, tmp_path: Path) -> None:
    for gap in range(6):
        watched(gap)
    early = early_observations(observed(tmp_path))
    found = by_names(predictions(early))
    rhos = {key: each.spearman and each.spearman.value for key, each in found.items()}
    assert rhos == {
        ("RankMe of monitors", "top1", "feature4"): pytest.approx(-1),
        ("pretext accuracy of monitors", "top1", "feature4"): pytest.approx(-1),
        ("linear/top1", "top1", "feature4"): pytest.approx(1),
    }
    # The held-out set has fewer images than monitors ask for.
    assert {measure.n for measure in early.measures if measure.eval == "monitor"} == {9}
    [group] = prediction_groups(list(found.values()))
    assert group.title == EARLY_TITLE


def test_early_answers_tell_decoders_apart(watched, tmp_path: Path) -> None:
    """Trainings on the device's decoder beside others, and one that was watched with both."""
    for gap in range(5):
        for decode in ("cpu", "device"):
            folder = watched(gap)
            record = RunRecord.read(folder)
            params = {**record.params, "decode": decode}
            dataclasses.replace(record, params=params, tags={**record.tags, "devices": "H"}).write(
                folder
            )
        append_watched(folder, 10, [row("top1", float(-gap), decoder="nvJPEG")])
    early = early_observations(observed(tmp_path))
    n_weights = {
        (measure.name, measure.decoder): len(values) for measure, values in early.measures.items()
    }
    assert n_weights == {
        ("linear/top1", ""): 10,
        ("linear/top1", "nvJPEG"): 5,
        ("RankMe of monitors", ""): 5,
        ("RankMe of monitors", "nvJPEG"): 5,
        # Crops of monitors are decoded on the CPU.
        ("pretext accuracy of monitors", ""): 10,
    }
    [group] = prediction_groups(predictions(early))
    labels = [each.label for table in group.tables for each in table.rows]
    assert {label for label in labels if "nvJPEG" in label} == {
        "RankMe of monitors (9 images of photos held_out, nvJPEG)"
    }


def test_a_report_names_the_decoder_of_an_accuracy_and_its_measures(
    pretrained: NewRun, tmp_path: Path
) -> None:
    for gap in range(5):
        for decoder, sign in (("", 1), ("nvJPEG", -1)):
            measured = {"decoder": decoder, "fingerprint": decoder}
            pretrained(
                row("rankme", sign * float(gap), **measured),
                row("top1", float(gap), **measured),
                gap=gap,
            )
    tables = prediction_group(predictions(observed(tmp_path))).tables
    named = {table.title.count("nvJPEG"): table for table in tables}
    assert named.keys() == {0, 1}
    for count, table in named.items():
        spearman, _ = table.rows
        assert spearman.label.count("nvJPEG") == count
        assert [cell.text for cell in spearman.cells if cell] == ["-1.00" if count else "1.00"]


def test_a_report_has_early_answers_beside_those_at_the_end(
    watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gap in range(5):
        folder = watched(gap)
        append_results(folder, [row("pretext", 50.0 - gap)])
    runs = str(tmp_path / "runs")
    assert main([runs]) == 0
    output = capsys.readouterr().out
    assert output.index(f"## {TITLE}") < output.index(f"## {EARLY_TITLE}")
    assert main([runs, "--prediction", "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    rhos = {(line["measure"], line["measure_progress"]): float(line["spearman"]) for line in lines}
    assert rhos == {
        ("pretext accuracy", "1.0"): pytest.approx(-1),
        ("pretext accuracy of monitors", "0.1"): pytest.approx(-1),
        ("RankMe of monitors", "0.1"): pytest.approx(-1),
        ("linear/top1", "0.1"): pytest.approx(1),
    }


def test_values_that_are_all_the_same_have_no_correlation(
    pretrained: NewRun, tmp_path: Path
) -> None:
    for gap in range(5):
        pretrained(
            row("pretext", 12.5), row("rankme", float(gap)), row("top1", float(gap)), gap=gap
        )
    found = by_names(predictions(observed(tmp_path)))
    assert found["pretext accuracy", "top1", "feature4"].spearman is None
    [table] = prediction_group(list(found.values())).tables
    shown = {(each.label, each.setting): each.cells for each in table.rows}
    assert shown["pretext accuracy (100 pairs of photos held_out)", "Kendall"] == (None,)
    [cell] = shown["RankMe (100 images of photos held_out)", "Spearman"]
    assert cell is not None
    assert (cell.text, cell.spread) == ("1.00", "(1.00 to 1.00)")


@pytest.fixture
def sweep(
    pretrained: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Sweep]:
    """A sweep of some gaps, whose points have all been measured."""
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path / "runs"))

    def new(n_points: int) -> Sweep:
        points = []
        for gap in range(n_points):
            folder = pretrained(row("rankme", float(gap)), row("top1", gap % 3 + 50.0), gap=gap)
            name = f"gap_px={gap}"
            points.append(
                Point(
                    kind="train",
                    name=name,
                    overrides=(f"grid.gap_px={gap}",),
                    identity=name,
                    folder=folder,
                )
            )
        made = Sweep(tmp_path / "runs" / "sweeps" / "s")
        with made.locked():
            made.add(points, ["train.py"])
        return made

    return new


def test_a_report_of_a_sweep_or_of_folders_ends_in_the_table(
    sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(6)
    for words in (["sweep=s", "--format", "markdown"], [str(tmp_path / "runs")]):
        assert main(words) == 0
        before, _, section = capsys.readouterr().out.partition(f"## {TITLE}\n")
        assert "linear/top1 on photos held_out, small, 6 runs of 6 settings" in section
        rho, _ = scipy.stats.spearmanr(range(6), [0, 1, 2, 0, 1, 2])
        assert "bootstrap" in before
        section = " ".join(section.split())
        assert f"| RankMe (100 images of photos held_out), Spearman | {rho:.2f} (" in section
    assert main(["sweep=s", "--format", "csv"]) == 0
    assert "spearman" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "html", "tex", "md"])
def test_the_table_alone(
    sweep, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sweep(6)
    out = tmp_path / f"table.{ending}"
    assert main([f"sweep={made.folder}", "--prediction", "--out", str(out)]) == 0
    text = out.read_text()
    assert "RankMe" in text
    if ending == "csv":
        [line] = csv.DictReader(io.StringIO(text))
        assert (line["measure"], line["accuracy_metric"], line["layer"]) == (
            "RankMe",
            "top1",
            "feature4",
        )
        assert (line["runs"], line["settings"], line["model"]) == ("6", "6", "small")
        low, value, high = (line[name] for name in ("kendall_low", "kendall", "kendall_high"))
        assert float(low) < float(value) < float(high)
    else:
        assert "6 runs of 6 settings" in text
    capsys.readouterr()


def test_too_few_points_say_so(sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(4)
    assert main(["sweep=s", "--format", "markdown"]) == 0
    output = capsys.readouterr().out
    assert f"## {TITLE}" not in output
    assert "5 settings or more: there are 4" in output
    assert main(["sweep=s", "--prediction"]) == DataError.exit_code
    error = " ".join(capsys.readouterr().err.split())
    assert "sweep s: " in error
    assert "4 settings" in error
    assert main(["sweep=s", "--prediction", "--metrics", "x"]) == 2
    assert "--metrics" in capsys.readouterr().err
    assert main(["sweep=s", str(tmp_path), "--prediction"]) == 2
    assert "alone" in capsys.readouterr().err
