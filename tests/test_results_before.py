"""Rows of results.jsonl from before lines said their format become whole results."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from relloc.errors import DamagedFile
from relloc.results import (
    CHOSEN_WITHOUT_TEST,
    KINDS,
    RESULTS_FILE,
    Result,
    append_results,
    read_results,
)

RECORDED = Path(__file__).parent / "results_before.jsonl"
LINES = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows(tmp_path: Path) -> list[Result]:
    shutil.copy(RECORDED, tmp_path / RESULTS_FILE)
    return list(read_results(tmp_path))


def find(
    rows: list[Result],
    evaluation: str,
    metric: str,
    batch_norm: str = "as_trained",
    layer: str = "",
) -> Result:
    return next(
        row
        for row in rows
        if (row.eval, row.metric, row.batch_norm) == (evaluation, metric, batch_norm)
        and layer in ("", row.layer)
    )


def test_no_row_is_lost_and_no_value_changes(rows: list[Result]) -> None:
    same = (
        "dataset",
        "split",
        "metric",
        "value",
        "low",
        "high",
        "n",
        "seed",
        "checkpoint",
        "model",
    )
    same += ("batch_norm", "fingerprint", "measured_in")
    assert [[getattr(row, name) for name in same] for row in rows] == [
        [line[name] for name in same] for line in LINES
    ]
    assert {row.kind for row in rows} == set(KINDS) - {"study"}
    renamed = {"knn": "knn_in1k", "label_free": "label_free_in1k"}
    for row, line in zip(rows, LINES, strict=True):
        assert row.eval == (
            renamed.get(line["eval"], line["eval"]) if line["dataset"] == "in1k" else line["eval"]
        )
    assert [row.layer or "avgpool" for row in rows] == [
        line["layer"] for line in LINES
    ]  # of pretext rows now ""


def test_nothing_that_a_sentence_said_is_lost(rows: list[Result]) -> None:
    for row, line in zip(rows, LINES, strict=True):
        facts = (row.protocol, *row.deviations, row.choice, *row.details, row.view, row.precision)
        kept = set(" ".join(facts).replace(";", " ").replace(",", " ").split())
        said = set(line["protocol"].replace(";", " ").replace(",", " ").split())
        dropped = {
            "deviation:",
            "batch",
            "norm:",
            "statistics",
            "as",
            "trained",
            "OpenSelfSup",
            "semi-supervised:",
            "fast:",
        }
        assert said - kept <= dropped
        assert not any(one.startswith("deviation") or ";" in one for one in facts)


def test_facts_of_a_sentence_become_fields(rows: list[Result]) -> None:
    tuned = find(rows, "linear_in1k", "top1_tuned")
    assert (tuned.protocol, tuned.view, tuned.precision) == (
        "3.3",
        "center view 256/224 px",
        "float32",
    )
    assert tuned.choice.startswith(
        "chosen among 10 on a held-back tenth of train in the still view, not trained on"
    )
    assert ", lr 0.03, " in tuned.details[0]
    assert (tuned.table, tuned.column, tuned.variant) == (
        "Linear, ImageNet protocol, top-1",
        "feature1",
        CHOSEN_WITHOUT_TEST,
    )
    last = find(rows, "linear_in1k", "top1")
    assert [one.startswith("a batch is all of the held-back tenth") for one in last.deviations] == [
        True
    ]
    assert (last.variant, last.headline, last.choice) == ("", True, "")
    best = find(rows, "voc07_svm", "map_best_cv")
    assert best.choice == "best of 5 layers, chosen by cross-validation on train"
    assert best.view == "whole image at short side 256 px squashed to 224 x 224 px"
    assert best.deviations == ("without sofa (no positive image to train on or to test on)",)
    shot = find(rows, "voc07_low_shot", "map_k1_cv")
    assert shot.choice == "cost 0.0625 of 19 chosen on the training images not drawn"
    fine = find(rows, "semisup_1", "top5")
    assert (fine.kind, fine.protocol, fine.column) == (
        "fine-tuned",
        "OpenSelfSup semi_classification",
        "1 % top-5",
    )
    assert fine.deviations == ("the list is ours, not SimCLR's",)
    again = find(rows, "knn", "top1_k20", "recalibrated")
    assert again.details[-1].startswith("batch-norm statistics re-estimated on ")


def test_units_headlines_and_places_are_those_of_the_evaluations_of_now(rows: list[Result]) -> None:
    rank = find(rows, "label_free_in1k", "rankme")
    assert (rank.unit, rank.higher_is_better, rank.headline, rank.variant) == (
        "directions",
        None,
        True,
        "RankMe",
    )
    assert {row.unit for row in rows if not row.eval.startswith("label_free")} == {"%"}
    headlines = {(row.eval.removesuffix("_in1k"), row.metric) for row in rows if row.headline}
    assert headlines == {
        *(
            ("pretext", "top1"),
            ("linear_fast", "top1"),
            ("knn", "top1_k20"),
            ("label_free", "rankme"),
        ),
        *(
            (name, "top1")
            for name in ("linear", "linear_avgpool", "linear_places205", "linear_inat18")
        ),
        *(
            ("voc07_svm", "map"),
            ("voc07_low_shot", "map_k1"),
            ("semisup_1", "top1"),
            ("semisup_10", "top1"),
        ),
    }
    details = {row.metric for row in rows if not row.table}
    assert details == {"map_cv", "map_k1_std", "map_k1_min", "map_k1_max"}


def test_the_name_of_a_metric_told_its_k_and_how_draws_differ(
    tmp_path: Path, rows: list[Result]
) -> None:
    by_metric = {row.metric: (row.series, row.k, row.spread) for row in rows if row.k is not None}
    assert by_metric["top1_k20"] == ("top1", 20, "")
    assert (by_metric["map_k1"], by_metric["map_k1_cv"]) == (("map", 1, ""), ("map_cv", 1, ""))
    assert [by_metric[f"map_k1_{name}"] for name in ("std", "min", "max")] == [
        ("map", 1, n) for n in ("std", "min", "max")
    ]
    # And of lines with a format from before there were fields for it
    lines = [{"format": 2, **dataclasses.asdict(row)} for row in rows]
    without = [
        {name: line[name] for name in line if name not in ("series", "k", "spread")}
        for line in lines
    ]
    (tmp_path / RESULTS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in without))
    assert list(read_results(tmp_path)) == rows


def test_an_evaluation_of_somebody_else_keeps_its_sentence(tmp_path: Path) -> None:
    line = LINES[0] | {
        "eval": "mine",
        "metric": "score",
        "layer": "feature2",
        "protocol": "as I do it; twice",
    }
    (tmp_path / RESULTS_FILE).write_text(json.dumps(line) + "\n")
    (row,) = read_results(tmp_path)
    assert (row.table, row.column, row.variant) == ("mine", "feature2", "score")
    assert row.details == ("as I do it", "twice")


def test_rows_of_both_formats_lie_in_one_file(tmp_path: Path, rows: list[Result]) -> None:
    append_results(tmp_path, rows[:2])
    assert list(read_results(tmp_path)) == [*rows, *rows[:2]]


@pytest.mark.parametrize(
    "change", [{"protocol": None}, {"protocol": 3}, {"eval": 3}, {"layer": "feature9"}]
)
def test_a_broken_line_is_an_error_with_its_number(
    tmp_path: Path, change: dict[str, object]
) -> None:
    (tmp_path / RESULTS_FILE).write_text(json.dumps(LINES[0] | change) + "\n")
    with pytest.raises(DamagedFile, match="line 1 .*result row"):
        read_results(tmp_path)


def test_a_line_of_a_later_format_is_told_as_such(tmp_path: Path, rows: list[Result]) -> None:
    line = {"format": 3, **dataclasses.asdict(rows[0])}
    (tmp_path / RESULTS_FILE).write_text(json.dumps(line) + "\n")
    with pytest.raises(DamagedFile, match="its format is 3"):
        read_results(tmp_path)
