"""Notebooks are executed as notebooks, on a small set of runs that `record.py` recorded."""

import re
from pathlib import Path

import jupytext
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from relloc.reports.published import CARD, card_parts, published_numbers
from relloc.results import Result, append_results, read_results
from relloc.tracking import RunRecord

HERE = Path(__file__).parent
ANALYSIS = HERE.parents[1] / "analysis"
NOTEBOOKS = sorted(path.stem for path in ANALYSIS.glob("*.py") if "jupytext" in path.read_text())
# What each is asked of, and the figures that it saves
SELECTED = {
    "accuracy_by_layer": ("sweep=gaps grid.jitter_px=0", ["accuracy_by_layer"]),
    "card": ("", ["card"]),
    "gap_jitter": ("sweep=gaps eval=pretext,linear_fast,knn", ["gap_jitter", "gap_jitter_order"]),
    "label_free": ("sweep=gaps", ["label_free"]),
    "low_shot_curves": ("", ["low_shot_curves"]),
    "neighbors_and_discovery": ("", ["neighbors_and_discovery"]),
    "shortcuts": ("", ["shortcuts"]),
    "sweep": ("", ["sweep"]),
    "training_curves": ("sweep=gaps", ["training_curves"]),
}


def execute(name: str) -> str:
    """Returns the sentence that a notebook ends with, once it has run and drawn."""
    notebook = jupytext.read(ANALYSIS / f"{name}.py")
    NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(ANALYSIS)}},
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return outputs[-1]["text"]


def rows_of(folder: Path, evaluation: str) -> list[Result]:
    return [row for row in read_results(folder) if row.eval == evaluation]


def mean(values) -> float:
    return float(np.mean(list(values)))


def gain_by_layer(runs: Path) -> dict[str, float]:
    """The gain of networks without jitter over random ones, mean over two evaluations, by hand."""
    by_layer = {}
    for stage in range(1, 6):
        gains = []
        for evaluation in ("linear_fast", "knn"):
            random = {}
            for gap in (0, 4, 8):
                ours = []
                for seed in (0, 1):
                    [folder] = runs.glob(f"train_gap_px_{gap}_jitter_px_0_seed_{seed}_*")
                    for row in rows_of(folder, evaluation):
                        if row.layer != f"feature{stage}" or not row.headline:
                            continue
                        if row.checkpoint == "random":
                            random[seed] = row.value
                        else:
                            ours.append(row.value)
                gains.append(mean(ours))
            # Each random network was measured by one run, and copied to five others
            gains[-3:] = [gain - mean(random.values()) for gain in gains[-3:]]
        by_layer[f"feature{stage}"] = mean(gains)
    return by_layer


def numbers_of(name: str, runs: Path) -> list[str]:
    """Phrases that the sentence is to have, with numbers computed here from the rows."""
    if name == "accuracy_by_layer":
        gains = gain_by_layer(runs)
        best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
        return [f"{best}: {gains[best]:+.1f} points", f"least at {worst}, {gains[worst]:+.1f}"]
    if name == "low_shot_curves":
        gains = []
        rows = [
            row for row in rows_of(runs / "low_shot", "voc07_low_shot") if row.metric == "map_k1"
        ]
        for row in rows:
            sign = -1 if row.checkpoint == "random" else 1
            gains.append(sign * row.value)
        return [f"gains {sum(gains) / 4:+.1f} points", "with 4 it", "of 12 cells"]
    if name == "training_curves":
        last = [rows_of(folder, "pretext")[0].value for folder in runs.glob("train_*")]
        assert len(last) == 12
        # Monitors ask part of the held-out images, and another way: the number is near the row's
        return ["12 trainings", "chance 12.5 %"]
    if name == "shortcuts":
        effects = {
            row.metric.removeprefix("effect_"): row.value
            for row in rows_of(runs / "studies", "shortcuts")
            if row.unit == "points" and row.metric.startswith("effect_")
        }
        largest = max(effects, key=effects.__getitem__)
        found = f"is that of {largest}, {effects[largest]:+.1f} points"
        return ["Of 13 shortcuts", "padding_noise", found]
    if name == "neighbors_and_discovery":
        phrases = ["pretrained weights", "random weights"]
        for row in rows_of(runs / "studies", "discovery"):
            if row.metric == "verified_images":
                line = "random" if row.checkpoint == "random" else "pretrained"
                phrases.append(f"{line} {row.value:.1f} %")
        assert len(phrases) == 4
        return phrases
    return {
        "card": ["0 of the 42", "voc07_svm"],
        "gap_jitter": [
            "of 6 measures over 6 points",
            "gap 8, jitter 2 px",
            "gap 4, jitter 2 px",
            "Pretext accuracy agrees with them",
        ],
        "label_free": ["none of 4 measures", "6 settings"],
        "sweep": ["of 18 metrics and layers", "feature4"],
    }[name]


def test_each_notebook_is_executed_here():
    assert list(SELECTED) == NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_draws_and_answers_its_question(name, runs, monkeypatch):
    words, figures = SELECTED[name]
    monkeypatch.setenv("RELLOC_SELECT", words)
    answer = execute(name)
    for phrase in numbers_of(name, runs):
        assert phrase in answer
    for figure in figures:
        for form in ("png", "svg", "pdf"):
            assert (runs / "figures" / f"{figure}.{form}").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accuracy_by_layer", "training_curves", "gap_jitter"])
def test_a_notebook_refuses_what_it_can_not_show_together(name, runs):
    # Six points of a sweep, and one of them trained for longer
    with pytest.raises(CellExecutionError, match=r"MixedRows.*schedule\.epochs"):
        execute(name)


@pytest.mark.slow
def test_two_points_have_no_rank_correlation(runs, monkeypatch):
    words, _ = SELECTED["gap_jitter"]
    monkeypatch.setenv("RELLOC_SELECT", f"{words} grid.gap_px=0,8 grid.jitter_px=0")
    answer = execute("gap_jitter")
    assert "over 2 points" in answer
    assert "nan" not in answer


@pytest.mark.slow
def test_the_card_counts_numbers_inside_the_tolerance(runs):
    [part] = [part for part in card_parts() if part.evaluation == "voc07_svm"]
    [published] = [
        number
        for number in published_numbers()
        if (number.row, number.table, number.column) == (CARD, part.table, "best layer")
    ]
    RunRecord(name="card", experiment="relloc", params={"seed": 0}).write(_made(runs / "card"))
    row = Result(
        eval="voc07_svm",
        dataset=part.dataset,
        split=part.split,
        n=part.images,
        seed=0,
        checkpoint="/x/backbone.safetensors",
        model="resnet50",
        view=part.view,
        layer="feature4",
        table=part.table,
        column="best layer",
        metric="map_best",
        headline=True,
        value=published.value + 0.5 * published.tolerance,
    )
    append_results(runs / "card", [row])
    answer = execute("card")
    assert re.search(r"1 of the 42 .*: 1 of 1 lie inside .* 0 above and 0 below", answer)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
