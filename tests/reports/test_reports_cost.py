"""The hours of the card's rows: their file, and the table of the report."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from relloc.reports import as_csv, cost, hours
from relloc.reports.cost import COST_COLUMNS, cost_lines
from relloc.reports.hours import (
    HOURS_FILE,
    PRETRAINING,
    MeasuredHours,
    hours_text,
    measured_hours,
    read_hours,
    record_hours,
    rows_of_card,
)
from relloc.reports.load import Measured, Run
from relloc.reports.parts import Report
from relloc.reports.published import card_parts
from relloc.reports.render import as_html, as_markdown
from relloc.reports.table import make_report
from relloc.results import Result

OURS = "/data/runs/card2022/backbone.safetensors"


def of(row: str, hours: float, **fields: str) -> MeasuredHours:
    usual = {
        "limited_by": "reading",
        "leaves_out": "",
        "hardware": "one GPU, 16 cores",
        "date": "2026-11-30",
        "source": "benchmarks/card.py, commit 1234567",
    }
    return MeasuredHours(row=row, hours=hours, **{**usual, **fields})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, MeasuredHours]:
    """Hours of three rows on two machines, in place of those of the package."""
    found = {
        each.row: each
        for each in (
            of(PRETRAINING, 2.5, leaves_out="monitors"),
            of("linear_in1k", 3.25),
            of("voc0712_detection", 1.125, hardware="another GPU", limited_by="computing"),
        )
    }
    for module in (hours, cost, as_csv):
        monkeypatch.setattr(module, "measured_hours", lambda: found)
    return found


def cost_rows(report: Report) -> dict[str, dict[str, str]]:
    """The texts of the table of cost by row and column."""
    assert report.cost is not None
    (table,) = report.cost.tables
    assert table.columns == COST_COLUMNS
    return {
        row.label: {
            column: cell.text if cell else ""
            for column, cell in zip(table.columns, row.cells, strict=True)
        }
        for row in table.rows
    }


def test_hours_from_pages_are_those_of_the_pages() -> None:
    root = Path(__file__).parents[2]
    for each in measured_hours().values():
        page, _, _ = each.source.partition(": ")
        if not page.startswith("docs/"):
            continue
        text = (root / page).read_text(encoding="utf-8")
        # The page has the rate of a training, and the hours of fine-tunings
        if each.row == PRETRAINING:
            n_images = 70 * 1_281_167
            rate = n_images / each.hours / 3600
            assert f"{8681:,}" in text
            assert rate == pytest.approx(8681, rel=0.002)
        else:
            assert f"| {each.hours:.2f} |" in text


def test_recorded_lines_take_the_place_of_those_of_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "hours.csv"
    record_hours(file, [of("knn_in1k", 0.123456), of("voc07_svm", 0.02)])
    record_hours(file, [of("knn_in1k", 0.5), of(PRETRAINING, 2.0)])
    found = read_hours(file)
    # In the order of the card
    assert list(found) == [PRETRAINING, "voc07_svm", "knn_in1k"]
    assert (found["voc07_svm"].hours, found["knn_in1k"].hours) == (0.02, 0.5)
    record_hours(file, list(read_hours(HOURS_FILE).values()))
    assert read_hours(file) == found | measured_hours()


@pytest.mark.parametrize(
    "wrong",
    [
        {"row": "linear_fast"},
        {"hours": 0.0},
        {"limited_by": "memory"},
        {"hardware": ""},
        {"date": "yesterday"},
    ],
)
def test_a_wrong_line_is_an_error(wrong: dict[str, object]) -> None:
    line = dataclasses.asdict(of("knn_in1k", 1.0))
    with pytest.raises(ValueError):
        MeasuredHours(**{**line, **wrong})


def test_the_table_has_hours_beside_each_row_and_whether_it_is_missing(
    result: Callable[..., Result], recorded: Mapping[str, MeasuredHours]
) -> None:
    run = Run(folder=Path("/data/runs/a"), name="a", commit="6a6cf28a1b", started_ms=1)
    ours = result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS)
    rows = cost_rows(make_report([Measured(result=ours, run=run)]))
    not_built = [part.table for part in card_parts() if not part.evaluation]
    n_built = len(rows_of_card())
    sums = [label for label in rows if label.startswith("sum of")]
    assert [label.split(",")[0] for label in sums] == [
        f"sum of 2 of {n_built} rows",
        f"sum of 1 of {n_built} rows",
    ]
    # The pretraining is without its monitors.
    assert "of 1 only" in sums[0]
    assert set(rows) == {*rows_of_card(), *not_built, *sums}
    assert list(rows["linear_in1k"].values()) == [
        "3.25",
        "one GPU, 16 cores, 2026-11-30",
        "reading",
        "measured",
    ]
    assert rows[PRETRAINING]["measured on"].endswith("without monitors")
    assert rows[PRETRAINING]["our numbers"] == "missing"
    # Nobody has measured how long this takes
    assert list(rows["knn_in1k"].values()) == ["", "", "", "missing"]
    assert {rows[name]["our numbers"] for name in not_built} == {"not built"}
    # Hours on several machines don't add up
    assert [rows[name]["hours"] for name in sums] == ["5.75", "1.12"]


def test_a_training_on_the_cards_images_is_measured(result: Callable[..., Result]) -> None:
    pretext = result("pretext", "", "top1", 40.0, checkpoint=OURS, kind="pretext")
    run = Run(folder=Path("/data/runs/a"), name="a", commit="6a6cf28a1b", started_ms=1)
    rows = cost_rows(make_report([Measured(result=pretext, run=run)]))
    assert rows[PRETRAINING]["our numbers"] == "measured"


def test_hours_are_shown_with_the_card_alone() -> None:
    assert make_report([]).cost is None
    report = make_report([], rows="card")
    for text in (as_markdown(report), as_html(report)):
        assert "What the card costs" in text
        # The commands that fill what is missing
        assert "eval=card" in text
        assert "experiment=card2022" in text


@pytest.mark.parametrize(
    ("hours", "told"), [(4.9, "4.9 h"), (0.431, "26 min"), (0.021, "1.3 min"), (0.00205, "7.4 s")]
)
def test_short_times_are_told_in_minutes_and_seconds(hours: float, told: str) -> None:
    measured = MeasuredHours(
        row="knn_in1k",
        hours=hours,
        limited_by="",
        leaves_out="",
        hardware="one GPU",
        date="2026-11-30",
        source="a run",
    )
    assert str(measured) == f"{told} on one GPU (2026-11-30)"


def test_measured_hours_are_told_in_place_of_estimates(
    recorded: Mapping[str, MeasuredHours],
) -> None:
    assert "3.25 h on one GPU, 16 cores" in hours_text("linear_in1k", "7.1")
    assert "7.1" not in hours_text("linear_in1k", "7.1")
    assert "8.2 h" in hours_text("linear_avgpool", "8.2")
    assert "estimate" in hours_text("linear_avgpool", "8.2")
    assert hours_text("knn_in1k", "") == ""
    lines = csv.DictReader(io.StringIO(as_csv.as_csv(make_report([], rows="card"))))
    told = {line["evaluation"]: (line["hours"], line["hours_measured_on"]) for line in lines}
    assert told["linear_in1k"] == ("3.25", "one GPU, 16 cores, 2026-11-30")
    assert told["linear_places205"] == ("4.2", "")
    assert len(cost_lines(())) == len(rows_of_card()) + 4
