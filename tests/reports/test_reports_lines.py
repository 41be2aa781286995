import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from relloc.reports.as_csv import as_csv
from relloc.reports.compare import make_entries
from relloc.reports.load import Measured, Run
from relloc.reports.parts import Report
from relloc.reports.published import CARD_GROUP, foreign_view
from relloc.reports.table import make_report
from relloc.results import Result

OURS = "/data/runs/card2022/backbone.safetensors"
PUBLISHED, SMALL = "center view 256/224 px", "center view 72/64 px"
Rows = Callable[..., Result]


def of_run(
    folder: str,
    *rows: Result,
    name: str = "",
    at: int = 1,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> list[Measured]:
    where = {"folder": Path("/data/runs") / folder, "name": name or folder}
    run = Run(**where, commit="6a6cf28a1b2c", started_ms=at, digests=digests)
    return [Measured(result=row, run=run) for row in rows]


def shown(report: Report) -> dict[tuple[str, str], list[str]]:
    return {
        (group.title, ", ".join(filter(None, (row.label, row.setting)))): [
            cell.text for cell in row.cells if cell
        ]
        for group in report.groups
        for table in group.tables
        for row in table.rows
        if not row.is_published
    }


def test_numbers_of_other_images_or_settings_stand_apart_with_their_runs(result: Rows) -> None:
    def row(value: float, layer: str = "feature4", mark: str = "") -> Result:
        return result("linear_in1k", layer, "top1", value, checkpoint=OURS, fingerprint=mark)

    first, again = (
        of_run("a", row(50.0, mark="f"), row(20.0, "feature1", "f")),
        of_run("b", row(51.0, mark="f"), at=2),
    )
    assert shown(make_report([*first, *again])) == {
        (CARD_GROUP, "card2022, seed 0"): ["20.00", "51.00"]
    }
    other = of_run("c", row(9.0, mark="g"), row(3.0, "feature1", "g"), at=3)
    apart = shown(make_report([*first, *again, *other]))
    assert apart == {
        (CARD_GROUP, "card2022, seed 0, run a"): ["20.00"],
        (CARD_GROUP, "card2022, seed 0, run b"): ["51.00"],
        (CARD_GROUP, "card2022, seed 0, run c"): ["3.00", "9.00"],
    }
    assert "50.0 of a" in as_csv(make_report([*first, *again, *other]))  # the only one replaced
    assert "otherwise" in make_report([*first, *other]).legend[-1]
    assert "otherwise" not in make_report([*first, *again]).legend[-1]


def test_none_and_some_fingerprint_are_two(result: Rows) -> None:
    row = {mark: result("knn", "avgpool", "top1_k20", 1.0, fingerprint=mark) for mark in ("", "f")}
    both = make_report([*of_run("a", row[""]), *of_run("b", row["f"])])
    assert {label for _, label in shown(both)} == {
        "random, seed 0, run a, avgpool",
        "random, seed 0, run b, avgpool",
    }


def test_runs_named_alike_are_told_by_their_folders_and_answers_of_one_run_are_counted(
    result: Rows,
) -> None:
    rows = [
        result("linear", "feature4", "top1", value, dataset="folder", fingerprint=str(value))
        for value in (1.0, 2.0)
    ]
    alike = [
        *of_run("a/x", rows[0], name="random on folder"),
        *of_run("b/x", rows[1], name="random on folder"),
    ]
    assert [label for _, label in shown(make_report(alike))] == [
        "random, seed 0, run a/x",
        "random, seed 0, run b/x",
    ]
    assert [label for _, label in shown(make_report(of_run("a", *rows)))] == [
        "random, seed 0, run a",
        "random, seed 0, run a (2)",
    ]


def test_another_evaluation_of_the_line_stays_whole(result: Rows) -> None:
    rows = [
        result("linear", "feature4", "top1", value, dataset="folder", fingerprint=str(value))
        for value in (1.0, 2.0)
    ]
    other = result("linear_fast", "feature4", "top1", 3.0, dataset="folder")
    labels = {
        each.result.value: each.label
        for each in make_entries([*of_run("a", rows[0], other), *of_run("b", rows[1])])
    }
    assert labels == {
        1.0: "random, seed 0, run a",
        2.0: "random, seed 0, run b",
        3.0: "random, seed 0",
    }


def of_two_sets(result: Rows, name: str, dataset: str, other: str) -> list[Measured]:
    """Three checkpoints: two measured on the same images, the third on `other` images."""
    rows = [
        result(name, "feature4", "top1", value, dataset=dataset, checkpoint=checkpoint)
        for value, checkpoint in (
            (1.0, "random"),
            (2.0, OURS),
            (3.0, "/data/runs/other/backbone.safetensors"),
        )
    ]
    digests = ("0123456789", "0123456789", other)
    runs = zip("abc", rows, digests, strict=True)
    return [
        each
        for run, row, digest in runs
        for each in of_run(run, row, digests={f"{dataset}-val": digest})
    ]


def test_elsewhere_other_images_of_the_same_name_have_tables_of_their_own(result: Rows) -> None:
    title = "folder val, 300 images"
    alike = make_report(of_two_sets(result, "linear", "folder", "0123456789"))
    assert {group for group, _ in shown(alike)} == {title}
    two = make_report(of_two_sets(result, "linear", "folder", "abcdefghij"))
    assert shown(two) == {
        (f"{title}, images 01234567", "random, seed 0"): ["1.00"],
        (f"{title}, images 01234567", "card2022, seed 0"): ["2.00"],
        (f"{title}, images abcdefgh", "other, seed 0"): ["3.00"],
    }
    assert {each.result.value for each in two.entries if each.is_best} == {
        2.0
    }  # the third competes with none
    assert "several sets of them" in two.legend[-1]
    assert "several sets of them" not in alike.legend[-1]
    lines = list(csv.DictReader(io.StringIO(as_csv(alike))))
    assert [line["images"] for line in lines if line["origin"] == "ours"] == ["0123456789"] * 3


def test_on_the_card_other_images_of_the_same_name_are_a_line_that_says_so(result: Rows) -> None:
    two = make_report(of_two_sets(result, "linear_in1k", "in1k", "abcdefghij"))
    assert shown(two) == {
        (CARD_GROUP, "random, seed 0, images 01234567"): ["1.00"],
        (CARD_GROUP, "card2022, seed 0, images 01234567"): ["2.00"],
        (CARD_GROUP, "other, seed 0, images abcdefgh"): ["3.00"],
    }
    assert {each.result.value for each in two.entries if each.is_best} == {2.0}
    assert all(
        each.fills_card and each.mark for each in two.entries
    )  # they fill the card all the same


def test_images_that_no_run_recorded_are_told_only_where_others_differ(result: Rows) -> None:
    unknown = of_run(
        "d", result("linear", "feature4", "top1", 4.0, dataset="folder", model="small")
    )
    one = [*of_two_sets(result, "linear", "folder", "0123456789"), *unknown]
    assert {group for group, _ in shown(make_report(one))} == {"folder val, 300 images"}
    two = [*of_two_sets(result, "linear", "folder", "abcdefghij"), *unknown]
    assert ("folder val, 300 images, images not recorded", "random, small, seed 0") in shown(
        make_report(two)
    )


def test_elsewhere_each_view_has_tables_of_its_own(result: Rows) -> None:
    rows = [
        result("linear", layer, "top1", value, dataset="folder", view=view, fingerprint=view)
        for layer, value, view in (
            ("feature4", 1.0, PUBLISHED),
            ("feature4", 2.0, SMALL),
            ("feature5", 3.0, SMALL),
        )
    ]
    assert shown(make_report(of_run("a", *rows))) == {
        (f"folder val, 300 images, {PUBLISHED}", "random, seed 0"): ["1.00"],
        (f"folder val, 300 images, {SMALL}", "random, seed 0"): ["2.00", "3.00"],
    }


def test_on_the_card_another_view_is_a_line_that_says_so_and_fills_no_cell(result: Rows) -> None:
    rows = [
        result("linear_in1k", "feature4", "top1", value, view=view, fingerprint=view)
        for value, view in ((9.0, PUBLISHED), (8.0, SMALL))
    ]
    both = shown(make_report(of_run("a", *rows)))
    assert both == {
        (CARD_GROUP, "random, seed 0"): ["9.00"],
        (CARD_GROUP, f"random, seed 0, {SMALL}"): ["8.00"],
    }
    entries = make_entries(of_run("a", *rows))
    assert [(each.fills_card, bool(each.mark)) for each in entries] == [
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize(
    ("name", "dataset", "view", "foreign"),
    [
        ("knn", "in1k", PUBLISHED, ""),
        ("voc07_svm", "voc2007", PUBLISHED, PUBLISHED),
        ("voc07_svm", "voc2007", "whole image at short side 256 px squashed to 224 x 224 px", ""),
        ("knn", "folder", SMALL, ""),
    ],
)
def test_the_view_of_a_number_on_the_card_may_be_another_than_the_published(
    result: Rows, name: str, dataset: str, view: str, foreign: str
) -> None:
    assert (
        foreign_view(result(name, "avgpool", "map_best", 9.0, dataset=dataset, view=view))
        == foreign
    )


def test_low_shot_is_at_the_best_layer_of_its_own_run_where_runs_stand_apart(result: Rows) -> None:
    def rows(mark: str, best: str) -> list[Result]:
        shots = [
            result(
                "voc07_low_shot",
                layer,
                "map_k1",
                value,
                dataset="voc2007",
                fingerprint=mark + layer,
            )
            for layer, value in (("feature3", 3.0), ("feature4", 4.0))
        ]
        return [
            *shots,
            result("voc07_svm", best, "map_best", 60.0, dataset="voc2007", fingerprint=mark),
        ]

    entries = make_entries(
        [*of_run("a", *rows("a", "feature3")), *of_run("b", *rows("b", "feature4"), at=2)]
    )
    placed = {
        each.label: each.result.layer
        for each in entries
        if each.is_shown and each.result.metric == "map_k1"
    }
    assert placed == {"random, seed 0, run a": "feature3", "random, seed 0, run b": "feature4"}


def test_on_other_images_a_line_has_one_note_and_its_cells_keep_the_details(result: Rows) -> None:
    shots = [
        result(
            "voc07_low_shot",
            "feature4",
            f"map_k{k}",
            9.0,
            dataset="toy",
            protocol="3.2",
            choice=f"cost {k} of 19",
            details=(),
        )
        for k in (1, 2, 4)
    ]
    report = make_report([*of_run("a", shots[0]), *of_run("b", *shots[1:])])
    table = report.groups[1].tables[0]
    (note,) = table.notes
    assert note.startswith(
        "run a and b; seed 0; commit 6a6cf28a1b; protocol 3.2; …; at feature4 as on the published"
    )
    for cell, row in zip((cell for cell in table.rows[0].cells if cell), shots, strict=True):
        assert {"protocol 3.2", row.choice} <= set(cell.details.splitlines())
