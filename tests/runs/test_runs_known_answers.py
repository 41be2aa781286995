"""Tests which rows are compared with known answers, and the verdicts."""

import re
from collections import Counter
from collections.abc import Sequence

import pytest
from rows import result

from relloc.results import Result
from relloc.runs.known_answers import Verdict, applicable, known_answers, unchecked
from relloc.runs.known_answers import check as check_some


def check(rows: Sequence[Result]) -> list[Verdict]:
    return check_some(rows, known_answers())


@pytest.mark.parametrize(
    ("value", "passed"),
    [(73.11, False), (73.12, True), (75.0, True), (76.2, True), (77.2, True), (77.21, False)],
)
def test_supervised_weights_give_about_76(value: float, passed: bool) -> None:
    row = result("linear_avgpool", "avgpool", "top1", value, checkpoint="torchvision")
    (verdict,) = check([row])
    assert (verdict.answer.tolerance, verdict.passed) == (1.0, passed)
    word = "pass" if passed else "FAIL"
    what = "torchvision linear_avgpool avgpool top1 on in1k val"
    assert str(verdict).startswith(
        f"{word}  {what}: {value:.2f}, expected 74.12 to 76.2 ± 1 (OpenSelfSup"
    )


def test_random_layers_are_held_against_the_published_row() -> None:
    published = dict(
        zip((f"feature{n}" for n in range(1, 6)), (11.37, 16.21, 13.47, 9.07, 6.54), strict=True)
    )
    exact = [result("linear_in1k", layer, "top1", value) for layer, value in published.items()]
    verdicts = check([*exact, result("linear_avgpool", "avgpool", "top1_best", 4.35)])
    assert [verdict.value for verdict in verdicts] == [*published.values(), 4.35]
    assert all(verdict.passed and verdict.answer.tolerance == 1.5 for verdict in verdicts)
    off = [result("linear_in1k", layer, "top1", value + 1.51) for layer, value in published.items()]
    assert not any(verdict.passed for verdict in check(off))


def test_svm_and_low_shot_are_checked_where_they_are() -> None:
    rows = [
        result(
            "voc07_svm", "feature1", "map_best", 31.0, dataset="voc2007"
        ),  # whatever layer is best
        result("voc07_low_shot", "feature2", "map_k1", 20.0, dataset="voc2007"),
        result(
            "voc07_low_shot", "feature5", "map_k1", 9.0, dataset="voc2007"
        ),  # not the published layer
        result(
            "voc07_svm", "feature5", "map_best", 87.0, dataset="voc2007", checkpoint="torchvision"
        ),
    ]
    verdicts = check(rows)
    assert [
        (verdict.value, verdict.answer.published.value, verdict.passed) for verdict in verdicts
    ] == [
        (31.0, 30.54, True),
        (20.0, 9.15, False),
        (87.0, 87.17, True),
    ]
    left = unchecked(rows, known_answers())
    assert len(verdicts) + len(left) == len(known_answers())
    absent = [one for one in left if one.startswith("random voc07_low_shot feature2 map_k96 ")]
    assert len(absent) == 1
    assert "voc2007 test: no such number" in absent[0]


@pytest.mark.parametrize(
    ("unlike", "why"),
    [
        ({"n": 49_990}, r".*\b49,990 images.*\b50,000\b"),
        ({"dataset": "imagenette"}, r".*\bimagenette val\b"),
        ({"view": "center view 72/64 px"}, r".*\bcenter view 72/64 px"),
        ({"metric": "top1_tuned"}, "no such number"),
        ({"batch_norm": "recalibrated"}, "no such number"),
        ({"model": "resnet18"}, "no such number"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_an_answer_that_no_row_gives_is_named_with_the_reason(
    unlike: dict[str, object], why: str
) -> None:
    (answer,) = applicable([("torchvision", "resnet50")], ["linear_avgpool"], ["as_trained"])
    fields = {"metric": "top1", "checkpoint": "torchvision", **unlike}
    row = result("linear_avgpool", "avgpool", fields.pop("metric"), 75.0, **fields)
    (unanswered,) = unchecked([row], [answer])
    assert re.match(rf"torchvision linear_avgpool avgpool top1 on in1k val: {why}", unanswered)
    good = result("linear_avgpool", "avgpool", "top1", 75.0, checkpoint="torchvision")
    assert unchecked([row, good], [answer]) == []


@pytest.mark.parametrize(
    ("name", "layer", "metric", "published", "tolerance"),
    [
        ("voc07_svm", "feature1", "map_best", 30.54, 1.0),
        ("voc07_low_shot", "feature2", "map_k1", 9.15, 2.2),
        ("linear_in1k", "feature1", "top1", 11.37, 1.5),
    ],
)
def test_each_answer_has_the_tolerance_of_its_published_number(
    name: str, layer: str, metric: str, published: float, tolerance: float
) -> None:
    dataset = "voc2007" if name.startswith("voc07") else "in1k"
    off = (-tolerance - 0.01, -tolerance, tolerance, tolerance + 0.01)
    verdicts = [
        check([result(name, layer, metric, published + by, dataset=dataset)])[0] for by in off
    ]
    assert [verdict.passed for verdict in verdicts] == [False, True, True, False]
    assert {verdict.answer.tolerance for verdict in verdicts} == {tolerance}


@pytest.mark.parametrize(
    ("subjects", "evaluations", "batch_norms", "expected"),
    [
        ({"random": "resnet50"}, ["linear_in1k"], ["as_trained"], {("random", "linear_in1k"): 5}),
        (
            {"/a": "small", "random": "resnet50", "torchvision": "resnet50"},
            [
                "knn",
                "voc07_svm",
                "linear_in1k",
            ],  # of torchvision's weights linear_in1k is not known
            ["recalibrated", "as_trained"],
            {
                ("random", "voc07_svm"): 1,
                ("torchvision", "voc07_svm"): 1,
                ("random", "linear_in1k"): 5,
            },
        ),
        (
            {"torchvision": "resnet50"},
            ["linear_avgpool"],
            ["as_trained"],
            {("torchvision", "linear_avgpool"): 1},
        ),
        ({"random": "resnet18"}, ["linear_in1k"], ["as_trained"], {}),
        ({"/a": "resnet50"}, ["linear_in1k"], ["as_trained"], {}),
        ({"torchvision": "resnet50"}, ["linear_in1k"], ["as_trained"], {}),
        ({"random": "resnet50"}, ["linear", "knn"], ["as_trained"], {}),
        ({"random": "resnet50"}, ["linear_in1k"], ["recalibrated"], {}),
        ({}, [], [], {}),
    ],
)
def test_what_will_be_known_is_known_before_any_work(
    subjects: dict[str, str],
    evaluations: list[str],
    batch_norms: list[str],
    expected: dict[tuple[str, str], int],
) -> None:
    answers = applicable(subjects.items(), evaluations, batch_norms)
    assert (
        Counter(
            (answer.published.known_answer_of, answer.published.evaluation) for answer in answers
        )
        == expected
    )


@pytest.mark.parametrize(
    "other",
    [
        {"model": "small"},
        {"batch_norm": "recalibrated"},
        {"checkpoint": "/a/backbone.safetensors"},
        {"n": 300},
        {"dataset": "imagenette"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_rows_say_nothing(other: dict[str, object]) -> None:
    assert check([result("linear_in1k", "feature1", "top1", 90.0, **other)]) == []


def test_the_last_measurement_counts() -> None:
    rows = [result("linear_in1k", "feature1", "top1", value) for value in (90.0, 11.0)]
    assert [verdict.passed for verdict in check(rows)] == [True]
    assert check([]) == []


def test_another_view_has_no_known_answer() -> None:
    rows = {
        view: result("linear_in1k", "feature1", "top1", 11.0, view=f"center view {view} px")
        for view in ("256/224", "72/64")
    }
    assert len(check([rows["256/224"]])) == 1
    assert check([rows["72/64"]]) == []
