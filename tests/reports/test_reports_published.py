import csv
import dataclasses
import io
from collections import Counter
from pathlib import Path

import pytest

from relloc.reports import published
from relloc.reports.as_csv import as_csv
from relloc.reports.hours import measured_hours
from relloc.reports.published import (
    CARD_GROUP,
    Published,
    accepted,
    card_parts,
    parts_of,
    published_numbers,
)
from relloc.reports.render import as_markdown
from relloc.reports.table import make_report


def numbers(row: str, evaluation: str, metric: str = "") -> list[float]:
    found = [
        each for each in published_numbers() if (each.row, each.evaluation) == (row, evaluation)
    ]
    return [each.value for each in found if not metric or each.metric == metric]


def test_the_card_is_as_published() -> None:
    card = "mmselfsup Relative-Loc"
    assert numbers(card, "voc07_svm") == [65.52]
    assert numbers(card, "voc07_low_shot") == [
        20.36,
        23.12,
        30.66,
        37.02,
        42.55,
        50.00,
        55.58,
        59.28,
    ]
    assert numbers(card, "linear_in1k") == [15.11, 30.47, 42.83, 51.20, 40.96]
    assert numbers(card, "linear_avgpool") == [39.65, 38.78, 40.4]
    assert numbers(card, "linear_places205") == [20.69, 34.72, 43.01, 45.97, 41.96]
    assert numbers(card, "knn_in1k") == [14.5, 15.0, 15.0, 14.2]
    assert numbers(card, "voc0712_detection") == [79.70]
    assert numbers(card, "coco_mask_rcnn_fpn_1x") == [37.5, 56.2, 41.3, 33.7, 53.3, 36.1]
    assert numbers(card, "voc12aug_fcn") == [63.49]
    assert numbers(card, "semisup_1") == []


def test_the_controls_are_as_published() -> None:
    assert numbers("OpenSelfSup Random", "linear_in1k") == [11.37, 16.21, 13.47, 9.07, 6.54]
    assert numbers("OpenSelfSup Random", "voc07_svm") == [30.54]
    assert numbers("OpenSelfSup Supervised", "linear_avgpool") == [74.12]
    assert numbers("OpenSelfSup Supervised", "voc07_low_shot", "map_k4") == [73.7]
    assert numbers("OpenSelfSup Relative-Loc", "semisup_1") == [16.48, 40.37]
    assert numbers("OpenSelfSup Relative-Loc", "semisup_10") == [53.86, 79.62]
    assert numbers("OpenSelfSup Random", "coco_mask_rcnn_c4_2x", "mask_ap") == [31.4]
    assert numbers("mmselfsup SwAV", "linear_in1k") == [16.98, 34.96, 49.26, 65.98, 70.74]


def test_tolerances_are_those_of_the_field() -> None:
    tolerances = {each.evaluation: each.tolerance for each in published_numbers()}
    assert (tolerances["voc07_svm"], tolerances["linear_in1k"]) == (1.0, 1.5)
    assert (tolerances["voc0712_detection"], tolerances["voc12aug_fcn"]) == (0.7, 1.0)
    svm = [each for each in published_numbers() if each.evaluation == "voc07_svm"][:1]
    assert accepted(svm) == (64.52, 66.52)
    avgpool = [each for each in published_numbers() if each.evaluation == "linear_avgpool"][:3]
    assert accepted(avgpool) == pytest.approx((38.78 - 1.5, 40.4 + 1.5))


def test_every_number_stands_in_a_column_of_its_own_and_names_its_source() -> None:
    cells = Counter()
    for each in published_numbers():
        (part,) = (part for part in parts_of(each.table) if each.column in part.columns)
        assert (each.dataset, each.split) == (part.dataset, part.split)
        assert "protocols.md 4." in each.source
        cells[each.row, each.table, each.column, each.edition] += 1
    assert set(cells.values()) == {1}


def test_the_parts_of_the_card_fill_each_column_once_and_name_evaluations_that_exist() -> None:
    cells = [(part.table, column) for part in card_parts() for column in part.columns]
    assert len(cells) == len(set(cells))
    conf = Path(__file__).parents[2] / "conf" / "eval"
    for part in card_parts():
        assert not part.evaluation or (conf / f"{part.evaluation}.yaml").exists()
        assert bool(part.evaluation) == bool(part.view)
        has_hours = bool(part.hours) or part.evaluation in measured_hours()
        assert bool(part.evaluation) == has_hours
        assert part.layer_best_in in ("", *(other.table for other in card_parts()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "ours"},
        {"layer": "feature6"},
        {"printed": "165.5"},
        {"tolerance": 0.0},
        {"printed": "n/a"},
        {"split": "train"},
    ],
)
def test_a_wrong_line_of_the_file_is_told(wrong: dict[str, str | float]) -> None:
    line = dataclasses.asdict(published_numbers()[0])
    with pytest.raises(ValueError):
        Published(**{**line, **wrong})


@pytest.mark.parametrize(
    ("field", "unknown"),
    [("table", "Linear, CIFAR-10 protocol, top-1"), ("column", "feature6")],
)
def test_a_table_or_column_that_the_card_lacks_is_named(field: str, unknown: str) -> None:
    line = dataclasses.asdict(published_numbers()[0])
    with pytest.raises(ValueError, match=unknown):
        Published(**{**line, field: unknown})


def test_a_new_table_of_the_card_is_shown_in_all_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "Linear, CIFAR-10 protocol, top-1"
    new = {
        "card.csv": {"table": table, "kind": "frozen", "columns": "feature4", "images": "10000"},
        "published.csv": {
            "kind": "card",
            "row": "a new method",
            "table": table,
            "column": "feature4",
            "printed": "12.34",
            "tolerance": "1.5",
        },
    }
    read = published._lines

    def with_new_line(name: str) -> list[dict[str, str]]:
        lines = list(read(name))
        empty = dict.fromkeys(lines[0], "")
        return [*lines, empty | new[name]]

    monkeypatch.setattr(published, "_lines", with_new_line)
    caches = (published.card_parts, published.published_numbers)
    for cache in caches:
        cache.cache_clear()
    try:
        report = make_report([], rows="card")
        markdown, lines = as_markdown(report), as_csv(report)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert f"### {table}" in markdown
    assert "| a new method" in markdown
    (line,) = (line for line in csv.DictReader(io.StringIO(lines)) if line["table"] == table)
    assert (line["value"], line["state"]) == ("12.34", "not built")


def test_other_tasks_come_only_when_asked_for() -> None:
    card, everything = make_report([], rows="card"), make_report([], rows="all")
    assert [group.title for group in card.groups] == [CARD_GROUP]
    few = {row.label for table in card.groups[0].tables for row in table.rows}
    assert few == {
        "mmselfsup Relative-Loc",
        "OpenSelfSup Relative-Loc",
        "OpenSelfSup Random",
        "OpenSelfSup Supervised",
    }
    assert "mmselfsup SwAV" in {
        row.label for table in everything.groups[0].tables for row in table.rows
    }
    titles_of_card = [table.title for table in card.groups[0].tables]
    titles = [table.title for table in everything.groups[0].tables]
    # Some tables have numbers of other networks alone, which the card has not.
    assert [title for title in titles if title in titles_of_card] == titles_of_card
    assert "Classification, VOC07 fine-tuned, mAP" in set(titles) - set(titles_of_card)


def test_rows_of_the_papers_network_are_as_published() -> None:
    rescaled = "Relative location, AlexNet-like, rescaled"
    assert numbers(rescaled, "voc07_finetune_fc") == [55.1]
    assert numbers(rescaled, "voc07_finetune") == [65.3]
    assert numbers("Relative location, AlexNet-like, not rescaled", "voc07_finetune") == [55.3]
    assert numbers("ImageNet labels, AlexNet", "voc07_finetune") == [79.9]
    assert numbers("Doersch 2015 color dropping", "voc07_rcnn") == [46.3]
