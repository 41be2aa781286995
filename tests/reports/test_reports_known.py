from collections.abc import Callable

import pytest

from relloc.reports.known import can_match, check, known_answers, not_measured
from relloc.results import Result


@pytest.mark.parametrize(
    ("value", "passed"), [(73.11, False), (73.12, True), (75.0, True), (76.2, True), (77.2, True), (77.21, False)]
)
def test_supervised_weights_give_about_76(result: Callable[..., Result], value: float, passed: bool) -> None:
    row = result("linear_avgpool", "avgpool", "top1", value, checkpoint="torchvision")
    (verdict,) = check([row])
    assert (verdict.expected, verdict.tolerance, verdict.passed) == ((74.12, 76.2), 1.0, passed)
    word = "pass" if passed else "FAIL"
    what = "torchvision linear_avgpool avgpool top1 on in1k val"
    assert str(verdict).startswith(f"{word}  {what}: {value:.2f}, expected 74.12 to 76.2 ± 1 (OpenSelfSup")


def test_random_layers_are_held_against_the_published_row(result: Callable[..., Result]) -> None:
    published = dict(zip((f"feature{n}" for n in range(1, 6)), (11.37, 16.21, 13.47, 9.07, 6.54), strict=True))
    exact = [result("linear_in1k", layer, "top1", value) for layer, value in published.items()]
    verdicts = check([*exact, result("linear_avgpool", "avgpool", "top1_best", 4.35)])
    assert [verdict.value for verdict in verdicts] == [*published.values(), 4.35]
    assert all(verdict.passed and verdict.tolerance == 1.5 for verdict in verdicts)
    off = [result("linear_in1k", layer, "top1", value + 1.51) for layer, value in published.items()]
    assert not any(verdict.passed for verdict in check(off))


def test_svm_and_low_shot_are_checked_where_they_are(result: Callable[..., Result]) -> None:
    rows = [
        result("voc07_svm", "feature1", "map_best", 31.0, dataset="voc2007"),  # whatever layer is best
        result("voc07_low_shot", "feature2", "map_k1", 20.0, dataset="voc2007"),
        result("voc07_low_shot", "feature5", "map_k1", 9.0, dataset="voc2007"),  # not the published layer
        result("voc07_svm", "feature5", "map_best", 87.0, dataset="voc2007", checkpoint="torchvision"),
    ]
    verdicts = check(rows)
    assert [(verdict.value, verdict.expected[0], verdict.passed) for verdict in verdicts] == [
        (31.0, 30.54, True),
        (20.0, 9.15, False),
        (87.0, 87.17, True),
    ]
    assert len(verdicts) + len(not_measured(rows)) == len(known_answers())
    assert "random voc07_low_shot feature2 map_k96 on voc2007 test" in not_measured(rows)


@pytest.mark.parametrize(
    ("name", "layer", "metric", "published", "tolerance"),
    [
        ("voc07_svm", "feature1", "map_best", 30.54, 1.0),
        ("voc07_low_shot", "feature2", "map_k1", 9.15, 2.2),
        ("linear_in1k", "feature1", "top1", 11.37, 1.5),
    ],
)
def test_each_answer_has_the_tolerance_of_its_published_number(
    result: Callable[..., Result], name: str, layer: str, metric: str, published: float, tolerance: float
) -> None:
    dataset = "voc2007" if name.startswith("voc07") else "in1k"
    off = (-tolerance - 0.01, -tolerance, tolerance, tolerance + 0.01)
    verdicts = [check([result(name, layer, metric, published + by, dataset=dataset)])[0] for by in off]
    assert [verdict.passed for verdict in verdicts] == [False, True, True, False]
    assert {verdict.tolerance for verdict in verdicts} == {tolerance}


@pytest.mark.parametrize(
    ("asked", "possible"),
    [
        (("resnet50", ["random"], ["linear_in1k"], ["as_trained"]), True),
        (("resnet50", ["/a", "torchvision"], ["knn", "voc07_svm"], ["recalibrated", "as_trained"]), True),
        (("resnet50", ["torchvision"], ["linear_avgpool"], ["as_trained"]), True),
        (("resnet18", ["random"], ["linear_in1k"], ["as_trained"]), False),
        (("resnet50", ["/a"], ["linear_in1k"], ["as_trained"]), False),
        (("resnet50", ["torchvision"], ["linear_in1k"], ["as_trained"]), False),  # only random's is known
        (("resnet50", ["random"], ["linear", "knn"], ["as_trained"]), False),
        (("resnet50", ["random"], ["linear_in1k"], ["recalibrated"]), False),
        (("resnet50", [], [], []), False),
    ],
)
def test_what_can_match_nothing_is_known_before_any_work(asked: tuple, possible: bool) -> None:
    assert can_match(*asked) == possible


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
def test_other_rows_say_nothing(result: Callable[..., Result], other: dict[str, object]) -> None:
    assert check([result("linear_in1k", "feature1", "top1", 90.0, **other)]) == []


def test_the_last_measurement_counts(result: Callable[..., Result]) -> None:
    rows = [result("linear_in1k", "feature1", "top1", value) for value in (90.0, 11.0)]
    assert [verdict.passed for verdict in check(rows)] == [True]
    assert check([]) == []


def test_another_view_has_no_known_answer(result: Callable[..., Result]) -> None:
    protocol = "3.3 five heads; center view {} px, float32; batch norm: statistics as trained"
    rows = {
        view: result("linear_in1k", "feature1", "top1", 11.0, protocol=protocol.format(view))
        for view in ("256/224", "72/64")
    }
    assert len(check([rows["256/224"]])) == 1
    assert check([rows["72/64"]]) == []
