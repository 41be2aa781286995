import csv
import dataclasses
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from relloc.reports.as_csv import as_csv
from relloc.reports.compare import ABOVE, BELOW, INSIDE, ReportEntry, make_entries
from relloc.reports.hours import hours_text
from relloc.reports.lines import label_lines
from relloc.reports.load import Line, Measured, Run
from relloc.reports.missing import command
from relloc.reports.notes import note, short_commit
from relloc.reports.parts import MISSING, Report, Row
from relloc.reports.published import CARD_GROUP, card_parts, published_numbers
from relloc.reports.table import column_order, make_report
from relloc.results import CHOSEN_WITHOUT_TEST, Result

OURS = "/data/runs/card2022/backbone.safetensors"


def measured(*rows: Result, run: str = "a", started_ms: int = 1) -> list[Measured]:
    of = Run(
        folder=Path("/data/runs") / run,
        name=run,
        commit="6a6cf28a1b2c3d4e5f60",
        started_ms=started_ms,
    )
    return [Measured(result=row, run=of) for row in rows]


def entry(row: Result) -> ReportEntry:
    return make_entries(measured(row))[0]


def rows_of(report: Report, table: str, group: str = CARD_GROUP) -> dict[str, Row]:
    tables = {
        each.title: each for found in report.groups if found.title == group for each in found.tables
    }
    return {", ".join(filter(None, (row.label, row.setting))): row for row in tables[table].rows}


@pytest.mark.parametrize(
    ("value", "mark"), [(64.51, BELOW), (64.52, INSIDE), (66.52, INSIDE), (66.53, ABOVE)]
)
def test_marks_at_the_edges_of_the_tolerance(
    result: Callable[..., Result], value: float, mark: str
) -> None:
    row = result("voc07_svm", "feature4", "map_best", value, dataset="voc2007", checkpoint=OURS)
    assert entry(row).mark == mark


@pytest.mark.parametrize(
    ("value", "mark"), [(37.2, BELOW), (37.3, INSIDE), (41.8, INSIDE), (42.0, ABOVE)]
)
def test_of_several_published_values_the_range_counts(
    result: Callable[..., Result], value: float, mark: str
) -> None:
    assert (
        entry(result("linear_avgpool", "avgpool", "top1_best", value, checkpoint=OURS)).mark == mark
    )


def test_each_line_is_compared_with_its_own_row(result: Callable[..., Result]) -> None:
    def beside(checkpoint: str, **fields: object) -> list[str]:
        row = result("semisup_1", "avgpool", "top5", 5.0, checkpoint=checkpoint, **fields)
        return [f"{each.row} {each.printed}" for each in entry(row).compared_with]

    assert beside("random") == ["OpenSelfSup Random 4.99"]
    assert beside("torchvision") == ["OpenSelfSup Supervised 88.87"]
    assert beside(OURS) == ["OpenSelfSup Relative-Loc 40.37"]  # the card has no such row
    assert beside(OURS, batch_norm="recalibrated") == ["OpenSelfSup Relative-Loc 40.37"]
    assert beside(OURS, model="small") == []
    knn = entry(result("knn", "avgpool", "top1_k20", 15.0, checkpoint=OURS))
    assert [each.row for each in knn.compared_with] == ["mmselfsup Relative-Loc"]
    assert entry(result("knn", "feature4", "top1_k20", 15.0, checkpoint=OURS)).compared_with == ()
    assert (
        entry(result("knn", "avgpool", "top1_k20", 15.0)).compared_with == ()
    )  # no random row was published


DETECTION = "Detection, VOC07+12 protocol"


def detection(
    result: Callable[..., Result], checkpoint: str, column: str, value: float, variant: str = ""
) -> Result:
    return result(
        "voc0712_detection",
        "",
        column.lower(),
        value,
        dataset="voc2007",
        checkpoint=checkpoint,
        kind="fine-tuned",
        table=DETECTION,
        column=column,
        variant=variant,
        view="whole image fitted into 1333 x 800 px",
    )


@pytest.mark.parametrize(
    ("checkpoint", "column", "variant", "beside"),
    [
        (OURS, "AP50", "", ["mmselfsup Relative-Loc 79.70"]),
        # mmselfsup published AP50 alone
        (OURS, "AP75", "", []),
        (OURS, "AP50", "detectron2", ["OpenSelfSup Relative-Loc 80.36"]),
        (OURS, "AP75", "detectron2", ["OpenSelfSup Relative-Loc 61.18"]),
        # Controls were published by OpenSelfSup alone
        ("random", "AP50", "", []),
        ("random", "AP50", "detectron2", ["OpenSelfSup Random 59.02"]),
        ("torchvision", "AP", "", []),
        ("torchvision", "AP", "detectron2", ["OpenSelfSup Supervised 54.19"]),
    ],
)
def test_detection_is_compared_with_published_rows_of_its_own_reference(
    result: Callable[..., Result], checkpoint: str, column: str, variant: str, beside: list[str]
) -> None:
    found = entry(detection(result, checkpoint, column, 60.0, variant))
    assert [f"{each.row} {each.printed}" for each in found.compared_with] == beside
    assert bool(found.mark) == bool(beside)


def test_detection_of_the_two_references_stands_in_lines_of_their_own(
    result: Callable[..., Result],
) -> None:
    by_detectron2 = detection(result, OURS, "AP50", 80.5, "detectron2")
    alone = make_report(measured(by_detectron2))
    lines = rows_of(alone, DETECTION)
    assert lines["OpenSelfSup Relative-Loc, detectron2"].is_published
    assert lines["mmselfsup Relative-Loc"].is_published
    assert [cell.mark for cell in lines["card2022, seed 0, detectron2"].cells if cell] == [INSIDE]
    # It fills no cell of the card, whose protocol is mmselfsup's
    assert alone.missing == ()
    published = {
        line["row"]: line["state"]
        for line in csv.DictReader(io.StringIO(as_csv(alone)))
        if (line["table"], line["column"], line["origin"]) == (DETECTION, "AP50", "published")
    }
    assert published["OpenSelfSup Relative-Loc"] == "measured"
    assert published["mmselfsup Relative-Loc"] == "missing"

    # The same annotations are read in two ways, so that the digests of the images differ
    by_mmdet = detection(result, OURS, "AP50", 78.0)
    runs = [
        dataclasses.replace(each.run, digests={"voc2007-test": digest})
        for each, digest in zip(measured(by_detectron2, by_mmdet), ("aaa", "bbb"), strict=True)
    ]
    both = [
        Measured(result=row, run=run)
        for row, run in zip((by_detectron2, by_mmdet), runs, strict=True)
    ]
    lines = rows_of(make_report(both), DETECTION)
    marks = {
        name: [cell.mark for cell in row.cells if cell]
        for name, row in lines.items()
        if not row.is_published
    }
    assert marks == {"card2022, seed 0": [BELOW], "card2022, seed 0, detectron2": [INSIDE]}


def test_a_number_without_a_column_is_in_csv_alone(result: Callable[..., Result]) -> None:
    rows = (
        detection(result, OURS, "AP50", 79.0),
        dataclasses.replace(detection(result, OURS, "AP50_area", 78.0), column=""),
    )
    report = make_report(measured(*rows))
    (table,) = (each for each in report.groups[0].tables if each.title == DETECTION)
    assert table.columns == ("AP", "AP50", "AP75")
    assert [each.result.value for each in report.entries] == [79.0, 78.0]


@pytest.mark.parametrize(
    "other",
    [{"n": 49_999}, {"split": "train"}, {"dataset": "imagenette", "split": "val", "n": 50_000}],
    ids=["a subset", "another split", "another set"],
)
def test_other_images_never_stand_beside_published_numbers(
    result: Callable[..., Result], other: dict[str, object]
) -> None:
    theirs = result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS)
    ours = result("linear_in1k", "feature4", "top1", 77.0, checkpoint=OURS, **other)
    report = make_report(measured(theirs, ours))
    card, elsewhere = report.groups
    assert "51.00" in _texts(card)
    assert "77.00" not in _texts(card)
    assert _texts(elsewhere) == ["77.00"]
    assert not any(
        row.is_published or row.empty for table in elsewhere.tables for row in table.rows
    )
    assert elsewhere.title == f"{ours.dataset} {ours.split}, {ours.n:,} images"
    assert elsewhere.tables[0].title == "Linear, ImageNet protocol, top-1"


def test_an_evaluation_on_another_data_set_of_the_card_is_not_the_card(
    result: Callable[..., Result],
) -> None:
    row = entry(result("knn", "avgpool", "top1_k20", 20.0, dataset="places205"))
    assert row.group == "places205 val, 20,500 images"
    assert row.compared_with == ()


def _texts(group) -> list[str]:
    return [cell.text for table in group.tables for row in table.rows for cell in row.cells if cell]


def test_low_shot_numbers_are_those_of_the_best_svm_layer_of_the_run(
    result: Callable[..., Result],
) -> None:
    def low_shot(layer: str, value: float) -> Result:
        return result("voc07_low_shot", layer, "map_k1", value, dataset="voc2007", checkpoint=OURS)

    def best(layer: str) -> Result:
        return result("voc07_svm", layer, "map_best", 60.0, dataset="voc2007", checkpoint=OURS)

    shots = (low_shot("feature3", 3.0), low_shot("feature4", 4.0), low_shot("feature5", 5.0))

    def shown(*found: Measured) -> tuple[float, str]:
        placed = [
            each
            for each in make_entries(found)
            if each.result.eval == "voc07_low_shot" and each.is_shown
        ]
        assert len(placed) == 1
        return placed[0].result.value, placed[0].layer_reason

    assert shown(*measured(*shots)) == (
        4.0,
        "at feature4 as on the published card, no best layer being known",
    )
    same = "at feature5, the best layer of the same run"
    assert shown(*measured(best("feature5"), *shots)) == (5.0, same)
    other = "at feature3, the best layer of run b"
    assert shown(*measured(*shots), *measured(best("feature3"), run="b")) == (3.0, other)


def test_what_was_chosen_without_the_test_set_has_lines_of_its_own(
    result: Callable[..., Result],
) -> None:
    rows = [
        result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS),
        result("linear_in1k", "feature4", "top1_tuned", 53.5, checkpoint=OURS),
        result("linear_avgpool", "avgpool", "top1", 39.0, checkpoint=OURS),
        result("linear_avgpool", "avgpool", "top1_best", 39.2, checkpoint=OURS),
    ]
    lines = rows_of(make_report(measured(*rows)), "Linear, ImageNet protocol, top-1")
    ours = {label: row for label, row in lines.items() if not row.is_published}
    assert {label: [cell.text for cell in row.cells if cell] for label, row in ours.items()} == {
        "card2022, seed 0": ["51.00", "39.20"],
        f"card2022, seed 0, {CHOSEN_WITHOUT_TEST}": ["53.50"],
        "card2022, seed 0, last epoch": ["39.00"],
    }
    assert ours["card2022, seed 0"].empty == MISSING
    assert ours["card2022, seed 0, last epoch"].empty == ""


def test_the_best_of_ours_is_marked_apart_from_supervised_weights(
    result: Callable[..., Result],
) -> None:
    values = {"random": 11.0, "torchvision": 90.0, OURS: 15.0, "/other/backbone.safetensors": 15.0}
    rows = [
        result("linear_in1k", "feature1", "top1", value, checkpoint=name)
        for name, value in values.items()
    ]
    best = [each.result.checkpoint for each in make_entries(measured(*rows)) if each.is_best]
    assert sorted(best) == sorted([OURS, "/other/backbone.safetensors"])
    assert not any(each.is_best for each in make_entries(measured(rows[2])))
    ranks = [
        result("label_free", "avgpool", "rankme", value, checkpoint=name)
        for name, value in values.items()
    ]
    assert not any(each.is_best for each in make_entries(measured(*ranks)))


def test_details_name_run_seed_commit_protocol_interval_draws_and_what_was_replaced(
    result: Callable[..., Result],
) -> None:
    shot = ("voc07_low_shot", "feature4")
    rows = [
        result(*shot, "map_k1", 9.0, dataset="voc2007", low=8.0, high=10.0),
        result(*shot, "map_k1_std", 0.5, dataset="voc2007"),
        result(*shot, "map_k1_min", 8.4, dataset="voc2007"),
    ]
    old = measured(result(*shot, "map_k1", 7.0, dataset="voc2007"), run="old")
    lines = rows_of(
        make_report([*old, *measured(*rows, started_ms=2)]), "Low-shot SVM, VOC07 protocol, mAP"
    )
    cell = lines["random, seed 0"].cells[0]
    assert cell is not None
    assert (cell.text, cell.spread, cell.mark) == ("9.00", "± 0.50", INSIDE)
    assert cell.details.splitlines() == [
        "run a (/data/runs/a)",
        "seed 0, commit 6a6cf28a1b2c3d4e5f60",
        *("protocol 3.9", "as published"),
        "voc2007 test, n = 4,952, feature4, map_k1",
        "95 % interval 8.00 to 10.00",
        *("std over draws: 0.50", "min over draws: 8.40"),
        "at feature4 as on the published card, no best layer being known",
        "inside: OpenSelfSup Random 9.15, tolerance 2.2",
        "replaces 7.00 of run old",
    ]
    assert any("1 older left out" in line for line in make_report([*old, *measured(*rows)]).legend)


def test_of_the_layers_of_nearest_neighbors_one_is_bold(result: Callable[..., Result]) -> None:
    of_layer = {"feature3": 20.0, "feature4": 30.0, "avgpool": 25.0}
    rows = [
        result("knn", layer, "top1_k20", value, checkpoint=OURS)
        for layer, value in of_layer.items()
    ]
    lines = rows_of(
        make_report(measured(*rows, result("knn", "avgpool", "top1_k20", 10.0))),
        "Nearest neighbors, top-1",
    )
    bold = {
        label: [cell.is_best for cell in row.cells if cell]
        for label, row in lines.items()
        if not row.is_published
    }
    assert bold == {
        "random, seed 0, avgpool": [False],
        "card2022, seed 0, feature3": [False],
        "card2022, seed 0, feature4": [True],
        "card2022, seed 0, avgpool": [False],
    }


def test_lines_have_short_names_no_two_alike() -> None:
    paths = [
        "random",
        "/a/x/backbone.safetensors",
        "/b/x/backbone.safetensors",
        "w/x.pth",
        "/c/run10",
        "/c/run9",
    ]
    lines = [
        Line(checkpoint=path, model="resnet50", batch_norm="as_trained", seed=0) for path in paths
    ]
    small = Line(checkpoint="random", model="small", batch_norm="recalibrated", seed=1)
    assert list(label_lines([*lines, small]).values()) == [
        "random, seed 0",
        "random, small, recalibrated, seed 1",
        "a/x, seed 0",
        "b/x, seed 0",
        "run9, seed 0",
        "run10, seed 0",
        "x.pth, seed 0",
    ]


def test_missing_cells_name_their_commands(result: Callable[..., Result]) -> None:
    knn = [
        result("knn", "avgpool", f"top1_k{k}", 15.0, checkpoint=OURS) for k in (10, 20, 100, 200)
    ]
    some = result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS)
    missing = {fill.label: fill.commands for fill in make_report(measured(*knn, some)).missing}
    assert list(missing) == ["random, seed 0", "torchvision, seed 0", "card2022, seed 0"]
    ours = f"python -m relloc.evaluate checkpoint={OURS} eval="
    evaluations = [
        "voc07_svm",
        "voc07_low_shot",
        "linear_in1k",
        "linear_avgpool",
        "linear_places205",
        "linear_inat18",
        "semisup_1",
        "semisup_10",
        "voc0712_detection",
        "coco_mask_rcnn_fpn_1x",
        "voc12aug_fcn",
        "cityscapes_fcn",
        "voc07_finetune_fc",
        "voc07_finetune",
        "voc07_fast_rcnn",
    ]
    commands = [each.partition("  # ")[0] for each in missing["card2022, seed 0"]]
    assert commands == [ours + name for name in evaluations]
    hours = {
        part.evaluation: hours_text(part.evaluation, part.hours)
        for part in card_parts()
        if part.evaluation
    }
    assert [each.partition("  # ")[2] for each in missing["card2022, seed 0"]] == [
        hours[name] for name in evaluations
    ]
    assert (
        "python -m relloc.evaluate checkpoint=random model=resnet50 eval=knn_in1k  "
        f"# {hours['knn_in1k']}" in (missing["random, seed 0"])
    )


def test_a_command_can_be_given_as_it_is_printed() -> None:
    line = Line(checkpoint='/a b/"c",gap=3/x', model="small", batch_norm="recalibrated", seed=3)
    printed = command(line, card_parts()[0])
    assert printed.startswith("python -m relloc.evaluate 'checkpoint=")
    parsed = OverridesParser.create().parse_overrides(shlex.split(printed, comments=True)[3:])
    assert {each.key_or_group: each.value() for each in parsed} == {
        "checkpoint": '/a b/"c",gap=3/x',
        "eval": "voc07_svm",
        "batch_norm": "recalibrated",
        "seed": 3,
    }


def test_a_command_of_a_finer_network_makes_and_sees_it_so() -> None:
    line = Line(
        checkpoint="random",
        model="resnet50 width=2 last_stride=1",
        batch_norm="as_trained",
        seed=0,
        strides="as_trained",
    )
    words = shlex.split(command(line, card_parts()[0]), comments=True)
    assert set(words) >= {
        "model=resnet50",
        "model.backbone.width=2",
        "model.backbone.last_stride=1",
        "strides=as_trained",
    }


def test_decoders_have_lines_of_their_own(result: Callable[..., Result]) -> None:
    values = {"": 51.0, "nvJPEG": 52.0}
    rows = [
        result("linear_in1k", "feature4", "top1", value, checkpoint=OURS, decoder=decoder)
        for decoder, value in values.items()
    ]
    rows = [dataclasses.replace(row, fingerprint=f"of {row.decoder}") for row in rows]
    report = make_report(measured(*rows))
    lines = rows_of(report, "Linear, ImageNet protocol, top-1")
    numbers = {
        label: [cell.text for cell in line.cells if cell]
        for label, line in lines.items()
        if not line.is_published
    }
    assert numbers == {"card2022, seed 0": ["51.00"], "card2022, nvJPEG, seed 0": ["52.00"]}
    written = list(csv.DictReader(io.StringIO(as_csv(report))))
    ours = {line["decoder"]: line["value"] for line in written if line["origin"] == "ours"}
    assert ours == {"": "51.0", "nvJPEG": "52.0"}


def test_what_is_missing_is_measured_by_the_decoder_of_the_line(
    result: Callable[..., Result],
) -> None:
    linear = [
        result("linear_in1k", f"feature{stage}", "top1", 51.0, checkpoint=OURS, decoder="nvJPEG")
        for stage in range(1, 6)
    ]
    # Detectors decode on the CPU in any case.
    detected = [detection(result, OURS, metric, 78.9) for metric in ("AP50", "AP", "AP75")]
    missing = {
        fill.label: " ".join(fill.commands)
        for fill in make_report(measured(*linear, *detected)).missing
    }
    assert list(missing) == ["random, seed 0", "torchvision, seed 0", "card2022, nvJPEG, seed 0"]
    assert "decode" not in missing["random, seed 0"]
    commands = missing["card2022, nvJPEG, seed 0"]
    for measured_already in ("eval=linear_in1k ", "eval=voc0712_detection "):
        assert measured_already not in commands
    for name in ("linear_places205", "voc07_svm", "knn_in1k", "semisup_1"):
        assert f"eval={name} decode=device " in commands
    assert "eval=cityscapes_fcn decode" not in commands
    assert "eval=cityscapes_fcn " in commands


def test_lines_that_are_not_on_the_card_get_one_sentence(result: Callable[..., Result]) -> None:
    elsewhere = result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS, n=300)
    small = result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS, model="small")
    report = make_report(measured(elsewhere, small))
    assert report.missing == ()
    assert re.search(r"\bresnet50\b.*: python -m relloc\.evaluate", report.advice)
    lines = rows_of(report, "Linear, ImageNet protocol, top-1")
    assert lines["card2022, small, seed 0"].empty == ""  # nothing below says how to fill it
    on_card = result(
        "linear_in1k", "feature4", "top1", 51.0, checkpoint="/c/run9/backbone.safetensors"
    )
    report = make_report(measured(elsewhere, small, on_card))
    assert [fill.label for fill in report.missing] == [
        "random, seed 0",
        "torchvision, seed 0",
        "run9, seed 0",
    ]
    sets = ("VOC", "IN1K", "PLACES205", "INAT18", "COCO")
    assert [name for name in sets if f"RELLOC_{name}" not in report.advice] == []
    assert "eval.NAME.data.root=" in report.advice


def test_a_recalibrated_line_asks_only_for_what_its_line_as_trained_has(
    result: Callable[..., Result],
) -> None:
    row = result("linear_avgpool", "avgpool", "top1_best", 40.0, checkpoint=OURS)
    both = [row, dataclasses.replace(row, batch_norm="recalibrated")]
    knn = [
        result("knn", "avgpool", f"top1_k{k}", 15.0, checkpoint=OURS) for k in (10, 20, 100, 200)
    ]
    missing = {fill.label: fill.commands for fill in make_report(measured(*both, *knn)).missing}
    assert "recalibrated" not in " ".join(missing["card2022, seed 0"])
    (line,) = missing["card2022, recalibrated, seed 0"]
    command, _, hours = line.partition("  # ")
    assert command == (
        f"python -m relloc.evaluate checkpoint={OURS} eval=knn_in1k batch_norm=recalibrated"
    )
    assert hours == hours_text("knn_in1k", "0.1")


def test_fine_tuning_is_not_asked_for_twice(result: Callable[..., Result]) -> None:
    row = result("knn", "avgpool", "top1_k20", 15.0, checkpoint=OURS, batch_norm="recalibrated")
    (fill,) = (fill for fill in make_report(measured(row)).missing if "card2022" in fill.label)
    assert not any("semisup" in each for each in fill.commands)
    assert all("batch_norm=recalibrated  #" in each for each in fill.commands)


def test_an_evaluation_that_the_card_does_not_have_gets_a_table_by_its_fields(
    result: Callable[..., Result],
) -> None:
    placed = {
        "table": "Mine",
        "column": "a column",
        "variant": "twice",
        "unit": "px",
        "higher_is_better": False,
    }
    rows = [
        result("mine", "", "loss", value, checkpoint=name, **placed)
        for value, name in ((2.0, "random"), (1.0, OURS))
    ]
    hidden = result("mine", "", "detail", 3.0, table="")
    report = make_report(measured(*rows, hidden))
    (table,) = report.groups[0].tables
    assert (table.title, table.columns) == ("Mine", ("a column",))
    assert [
        (row.label, row.setting, row.cells[0].text, row.cells[0].is_best)
        for row in table.rows
        if row.cells[0]
    ] == [
        ("random, seed 0", "twice, px", "2.00", False),
        ("card2022, seed 0", "twice, px", "1.00", True),  # lower is better
    ]
    assert len(report.entries) == 3


@pytest.mark.parametrize(
    ("name", "fields", "is_shown"),
    [
        ("neighbors", {"kind": "study", "table": "Nearest patches"}, False),
        # Nearest neighbors on other images than the card's: its table, but not its evaluation
        ("knn", {"dataset": "photos"}, False),
        ("knn", {"dataset": "in1k"}, True),
        ("linear_in1k", {"dataset": "photos"}, True),
        ("pretext", {"kind": "pretext", "dataset": "photos"}, False),
        ("pretext", {"kind": "pretext", "dataset": "in1k"}, True),
        ("pretext", {"kind": "pretext", "dataset": "in1k", "model": "small"}, False),
    ],
)
def test_the_card_is_shown_where_a_number_has_to_do_with_it(
    result: Callable[..., Result], name: str, fields: dict[str, str], is_shown: bool
) -> None:
    row = result(name, "", "top1_k20", 20.0, **fields)
    report = make_report(measured(row))
    titles = [group.title for group in report.groups]
    assert (CARD_GROUP in titles) == bool(report.published) == is_shown
    assert any("--rows card" in line for line in report.legend) != is_shown
    if not is_shown:
        assert not report.advice
        assert not report.missing
        lines = list(csv.DictReader(io.StringIO(as_csv(report))))
        assert {line["origin"] for line in lines} == {"ours"}
    asked = make_report(measured(row), rows="card")
    assert asked.groups[0].title == CARD_GROUP


def study_row(result: Callable[..., Result], value: float, **fields: Any) -> Result:
    """A number of a study of 300 photographs; `fields` replace its fields."""
    of_study = {
        "kind": "study",
        "dataset": "photos",
        "table": "Effects",
        "column": "effect",
        "variant": "",
        "checkpoint": OURS,
        "details": ("interval by source",),
        "view": "center view",
    }
    metric = fields.pop("metric", "effect")
    return result("mine", "", metric, value, **{**of_study, **fields})


def test_numbers_of_a_study_stand_together_whatever_images_they_are_about(
    result: Callable[..., Result],
) -> None:
    noise = {"dataset": "noise", "split": "generated", "n": 16, "view": "grids"}
    rows = [
        study_row(result, 4.0, variant="lens", unit="points", low=3.0, high=5.0, **noise),
        study_row(result, 80.0, variant="padding", batch_norm="recalibrated"),
        study_row(result, 70.0, variant="padding", batch_norm="recalibrated", checkpoint="random"),
    ]
    (group,) = make_report(measured(*rows)).groups
    (table,) = group.tables
    shown = []
    for row in table.rows:
        (cell,) = row.cells
        assert cell
        shown.append((row.label, row.setting, cell.text, cell.spread))
    assert shown == [
        ("random, recalibrated, seed 0", "padding", "70.00", ""),
        ("card2022, seed 0", "lens, points", "4.00", "(3.00 to 5.00)"),
        ("card2022, recalibrated, seed 0", "padding", "80.00", ""),
    ]
    # Not all are about the same images: a row's notes say about which it is
    assert table.caption == ""
    of_random, of_lens, _ = [" ".join(row.notes) for row in table.rows]
    assert "photos val" in of_random
    assert "300 images" in of_random
    assert "noise generated" in of_lens
    assert "16 images" in of_lens


def test_intervals_that_tell_nothing_are_left_out(result: Callable[..., Result]) -> None:
    def told(low: float, high: float, unit: str) -> tuple[str, bool, bool]:
        row = study_row(result, 12.5, unit=unit, low=low, high=high, n=1)
        report = make_report(measured(row))
        (group,) = report.groups
        (table,) = group.tables
        (cell,) = table.rows[0].cells
        assert cell
        assert "1 image" in f"{table.caption} {table.rows[0].notes}"
        assert "1 images" not in f"{table.caption} {table.rows[0].notes}"
        in_legend = any("95 % interval" in sentence for sentence in report.legend)
        return cell.spread, "95 % interval" in cell.details, in_legend

    # Of one source, and of sources that all gave the same number
    assert told(0, 100, "%") == ("", False, False)
    assert told(12.5, 12.5 + 1e-14, "%") == ("", False, False)
    assert told(0, 99, "%") == ("(0.00 to 99.00)", True, True)
    assert told(0, 100, "points") == ("(0.00 to 100.00)", True, True)


def test_a_table_of_a_study_says_once_which_images_it_is_about(
    result: Callable[..., Result],
) -> None:
    rows = [
        study_row(result, 4.0),
        study_row(result, 5.0, checkpoint="random"),
        study_row(result, 6.0, n=20),
    ]
    (group,) = make_report(measured(*rows[:2])).groups
    assert "photos val, 300 images, center view" in group.tables[0].caption
    assert [row.setting for row in group.tables[0].rows] == ["", ""]

    # The same quantity on fewer images has a row of its own, and competes with none
    (group,) = make_report(measured(*rows)).groups
    (table,) = group.tables
    assert "300" not in table.caption
    assert [(row.label, row.setting) for row in table.rows] == [
        ("random, seed 0", "300 images"),
        ("card2022, seed 0", "300 images"),
        ("card2022, seed 0", "20 images"),
    ]
    assert [cell.is_best for row in table.rows for cell in row.cells if cell] == [
        True,
        False,
        False,
    ]


def test_notes_of_a_study_say_where_its_pictures_are(
    result: Callable[..., Result], tmp_path: Path
) -> None:
    rows = [
        study_row(result, 4.0, fingerprint="f1", variant="lens"),
        study_row(result, 5.0, fingerprint="f2", variant="border"),
    ]
    run = dataclasses.replace(measured(rows[0])[0].run, folder=tmp_path)
    with_files = tmp_path / "evaluations" / "mine_f1"
    with_files.mkdir(parents=True)
    (group,) = make_report(Measured(result=row, run=run) for row in rows).groups
    notes = [" ".join(row.notes) for row in group.tables[0].rows]
    assert all(str(with_files) in note for note in notes)
    assert not any("mine_f2" in note for note in notes)


def test_two_measurements_of_a_study_are_named_by_their_runs_in_all_rows(
    result: Callable[..., Result],
) -> None:
    noise = {"dataset": "noise", "n": 16, "view": "grids", "variant": "lens"}
    first = [study_row(result, 4.0, fingerprint="a", **noise), study_row(result, 1.0)]
    second = [study_row(result, 5.0, fingerprint="b", **noise)]
    both = [*measured(*first, run="a"), *measured(*second, run="b", started_ms=2)]
    (group,) = make_report(both).groups
    labels = [row.label for row in group.tables[0].rows]
    assert labels == [
        "card2022, seed 0, run a",
        "card2022, seed 0, run a",
        "card2022, seed 0, run b",
    ]


def test_a_unit_that_not_all_numbers_of_a_row_have_stands_beside_the_number(
    result: Callable[..., Result],
) -> None:
    rows = [
        study_row(result, 4.0, column="error", metric="error"),
        study_row(result, 2.0, column="likelihood", metric="nll", unit="nats"),
    ]
    (group,) = make_report(measured(*rows)).groups
    (row,) = group.tables[0].rows
    assert [cell.text for cell in row.cells if cell] == ["4.00", "2.00 nats"]
    assert row.setting == ""


def test_columns_are_in_the_order_of_the_card_and_of_their_numbers() -> None:
    assert column_order({"k=200", "k=5", "k=10"}, ("k=10", "k=200")) == ["k=5", "k=10", "k=200"]
    assert column_order({"zz", "avgpool", "feature2"}, ()) == ["feature2", "avgpool", "zz"]
    assert column_order({"feature1", "best layer"}, ("best layer", "feature1")) == [
        "best layer",
        "feature1",
    ]
    assert column_order({"10 % top-1", "1 % top-5", "1 % top-1"}, ()) == [
        "1 % top-1",
        "1 % top-5",
        "10 % top-1",
    ]


def test_every_table_of_the_card_says_its_tolerance_and_how_it_stands(
    result: Callable[..., Result],
) -> None:
    row = result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS)
    (card,) = make_report(measured(row)).groups
    captions = {table.title: table.caption for table in card.tables}
    # Tables without any row are not shown, and published rows of other tasks only when asked for
    assert captions.keys() == {each.table for each in published_numbers() if each.kind == "card"}
    for part in card_parts():
        caption = captions.get(part.table, "")
        assert ("Not built" in caption) == (bool(caption) and not part.evaluation)
        if caption:
            assert caption.startswith("Tolerance: ± ")
            hours = hours_text(part.evaluation, part.hours)
            asked = f"checkpoint=RUN eval={part.evaluation}, {hours}"
            assert (asked in caption) == (
                bool(part.evaluation) and part.evaluation != "linear_in1k"
            )


def test_what_was_measured_on_other_images_alone_is_named_with_its_numbers(
    result: Callable[..., Result],
) -> None:
    def caption(*rows: Result, table: str = DETECTION) -> str:
        (card, *_) = make_report(measured(*rows), rows="card").groups
        captions = {each.title: each.caption for each in card.tables}
        return captions[table]

    command = "checkpoint=RUN eval=voc0712_detection, 2.41 h"
    on_card = detection(result, OURS, "AP50", 78.9)
    # A subset of the card's images, another data set, and a number that is no headline.
    subset = dataclasses.replace(on_card, value=12.3, n=321, headline=True)
    minor = dataclasses.replace(detection(result, OURS, "AP", 6.5), n=321, headline=False)
    control = dataclasses.replace(subset, checkpoint="random", value=4.56)
    other = dataclasses.replace(subset, dataset="voc2012", value=23.4)

    assert "Not measured: " in caption()
    said = caption(subset, minor, control, other)
    assert "Not measured" not in said
    assert re.search(
        r"other images alone: "
        r"voc2007 test, 321 images: AP50 4\.56 \(random, seed 0\), "
        r"AP50 12\.30 \(card2022, seed 0\); "
        r"voc2012 test, 321 images: AP50 23\.40 \(card2022, seed 0\)\.",
        said,
    )
    assert command in said
    assert "6.50" not in said
    # Once the card's images are measured, its table has the number.
    said = caption(on_card, subset)
    assert "12.30" not in said
    assert command not in said
    # What another evaluation measured is nothing that this one's command would add to.
    pictures = result("knn", "avgpool", "top1_k20", 31.0, dataset="photos", checkpoint=OURS)
    assert pictures.table == "Nearest neighbors, top-1"
    assert "Not measured: " in caption(pictures, table=pictures.table)


def test_of_many_lines_on_other_images_the_first_are_named(result: Callable[..., Result]) -> None:
    rows = []
    for number in range(5):
        row = detection(result, f"/data/runs/run{number}", "AP50", 50.0 + number)
        rows.append(dataclasses.replace(row, n=321))
    (card, _) = make_report(measured(*rows)).groups
    (caption,) = [each.caption for each in card.tables if each.title == DETECTION]
    named = re.findall(r"AP50 (\S+) \((run\d)", caption)
    assert named == [("50.00", "run0"), ("51.00", "run1"), ("52.00", "run2")]
    assert "2 more" in caption


def test_commits_are_shortened_but_say_that_files_had_been_changed() -> None:
    assert short_commit("6a6cf28a1b2c3d4e5f60-dirty") == "6a6cf28a1b-dirty"
    assert short_commit("unknown") == "unknown"


def test_what_is_not_said_of_all_numbers_of_a_line_becomes_a_gap(
    result: Callable[..., Result],
) -> None:
    one = result(
        "knn",
        "feature1",
        "top1_k20",
        1.0,
        protocol="3.7",
        details=("T=0.07",),
        deviations=("pooled",),
    )
    other = result(
        "knn", "avgpool", "top1_k20", 1.0, protocol="3.7", details=("T=0.07",), view="center"
    )
    entries = make_entries(measured(one, other))
    assert note(entries) == "run a; seed 0; commit 6a6cf28a1b; protocol 3.7; T=0.07; …"
    assert note(entries[:1]).endswith("protocol 3.7; T=0.07; deviation: pooled")
