"""Reports of results that words select."""

from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.report import main
from relloc.reports.load import find_measured
from relloc.reports.selection import Filter, select, split_words
from relloc.results import append_results
from relloc.tracking import RunRecord


def write_run(folder: Path, *rows, **params) -> None:
    folder.mkdir()
    tags = {"relloc.kind": "train"}
    RunRecord(name=folder.name, experiment="relloc", tags=tags, params=params).write(folder)
    append_results(folder, rows)


@pytest.fixture
def runs(tmp_path: Path, result) -> Path:
    for gap, jitter in ((0, "[0, 21]"), (16, 7)):
        ours = result(
            "knn", "feature4", "top1_k20", 30.0 + gap, checkpoint="/x/b.pth", dataset="photos"
        )
        other = result("linear", "feature4", "top1", 40.0, checkpoint="random", dataset="birds")
        write_run(tmp_path / f"gap{gap}", ours, other, **{"grid.gap_px": gap, "grid.j": jitter})
    return tmp_path


def test_a_word_is_a_filter_unless_it_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    words = ["runs", "sweep=gaps", str(tmp_path / "a=b"), "eval=knn,linear"]
    places, filters = split_words(words)
    assert places == words[:3]
    assert filters == [Filter(field="eval", patterns=("knn", "linear"))]


@pytest.mark.parametrize(
    ("words", "evaluations"),
    [
        (["eval=knn"], ["knn", "knn"]),
        (["dataset=b*"], ["linear", "linear"]),
        # Random weights have no settings that could differ
        (["grid.gap_px=0"], ["knn", "linear", "linear"]),
        (["grid.j=[0,21]", "eval=knn"], ["knn"]),
        (["run=gap16"], ["knn", "linear"]),
    ],
)
def test_filters_go_by_fields_and_settings(
    runs: Path, words: list[str], evaluations: list[str]
) -> None:
    _, filters = split_words(words)
    selected = select(find_measured([runs]), filters)
    assert sorted(each.result.eval for each in selected) == evaluations


def test_a_report_of_selected_results(runs: Path, capsys) -> None:
    assert main([str(runs), "eval=knn", "grid.gap_px=16", "--format", "csv"]) == 0
    printed = capsys.readouterr().out
    assert "46" in printed
    assert "birds" not in printed
    assert main([str(runs), "grid.gap=16"]) == 2
    assert "grid.gap" in capsys.readouterr().err


def test_nothing_selected_is_told(runs: Path) -> None:
    with pytest.raises(UsageError, match="eval=none"):
        select(find_measured([runs]), split_words(["eval=none"])[1])
