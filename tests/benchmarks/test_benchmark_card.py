"""`benchmarks/card.py`: the work of each row, from rates to hours, and one tiny run."""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from card_timing import N_CLASSES, Bench
from card_work import (
    COMPUTING,
    READING,
    Amount,
    Rate,
    evaluation_amounts,
    pretraining_amounts,
    timed_row,
)
from clock import Clock

from relloc.data.folder import FolderImages
from relloc.data.views import Center
from relloc.evaluation.contract import Evaluation
from relloc.reports.hours import PRETRAINING, rows_of_card
from relloc.runs import build, engine, settings
from relloc.runs.build import ChosenEvaluation

# By its path, since a notebook has the same name.
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "card.py"
_spec = importlib.util.spec_from_file_location("benchmark_card", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
card = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(card)

IN1K, VAL = 1_281_167, 50_000
EVALUATIONS = [name for name in rows_of_card() if name != PRETRAINING]


@pytest.fixture(scope="module")
def chosen() -> Mapping[str, ChosenEvaluation]:
    """The evaluations of the card at their own settings."""
    words = ["checkpoint=random", "model=resnet50", f"eval=[{','.join(EVALUATIONS)}]"]
    words += [f"eval.{name}.data.root=nowhere" for name in EVALUATIONS]
    words.append("eval.voc07_fast_rcnn.data.proposals=nowhere")
    config = build.evaluating(settings.compose("evaluate", words).config)
    return {each.name: each for each in config.evaluations}


# Epochs, iterations and images are those of docs/protocols.md 3; the numbers of tests and of
# labeled images follow from conf/eval and from shares of 1 % and 10 %.
WORK = {
    "voc07_svm": {"features": 5011 + 4952, "solving": 5},
    "voc07_low_shot": {"features": 5011 + 4952, "solving": 5},
    "linear_in1k": {"training": 90 * IN1K, "test": VAL + IN1K // 10},
    "linear_avgpool": {"training": 100 * IN1K, "test": 101 * VAL + IN1K // 10},
    "linear_places205": {"training": 28 * 2_448_873, "test": 20_500 + 244_887},
    "linear_inat18": {"training": 84 * 437_513, "test": 24_426 + 43_751},
    "knn_in1k": {"features": IN1K + VAL, "search": VAL},
    "semisup_1": {"training": 9 * 20 * 12_811, "test": 9 * (VAL + 10_000)},
    "semisup_10": {"training": 9 * 20 * 128_116, "test": 9 * (VAL + 10_000)},
    "voc0712_detection": {"training": 24_000, "test": 12 * 4952},
    "coco_mask_rcnn_fpn_1x": {"training": 87_960, "test": 12 * 5000},
    "voc12aug_fcn": {"training": 20_000, "test": 10 * 1449},
    "cityscapes_fcn": {"training": 40_000, "test": 10 * 500},
    "voc07_finetune_fc": {"training": 80_000, "test": 8 * 4952},
    "voc07_finetune": {"training": 80_000, "test": 8 * 4952},
    "voc07_fast_rcnn": {"training": 40_000, "test": 4 * 4952},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_work_of_a_row_is_that_of_its_protocol(
    chosen: Mapping[str, ChosenEvaluation], name: str
) -> None:
    of_row = chosen[name]
    assert of_row.data is not None
    n_images = card._published(of_row.data.source)
    amounts = evaluation_amounts(of_row.evaluation, *n_images)
    assert {each.work: each.n for each in amounts} == WORK[name]


def test_the_pretraining_has_the_images_of_its_steps() -> None:
    """docs/protocols.md 2.1: 70 epochs of 2,502 steps of 512 images."""
    (amount,) = pretraining_amounts(card._pretraining([], tiny=False), IN1K)
    assert (amount.n, amount.unit) == (70 * 2502 * 512, "images")


def test_every_row_can_be_tried_at_tiny_sizes() -> None:
    assert set(card._TINY_EVALUATIONS) == set(EVALUATIONS)
    assert set(card.ANNOTATED.values()) == set(card.WRITERS)


def test_work_that_is_not_known_is_an_error() -> None:
    class Unknown(Evaluation):
        def run(self, context):
            return iter(())

    with pytest.raises(TypeError, match="Unknown"):
        evaluation_amounts(Unknown(), 1, 1)


def test_hours_are_those_of_the_slower_rate() -> None:
    amounts = [
        Amount(work="training", n=7_200_000, unit="images"),
        Amount(work="test", n=3600, unit="images"),
    ]
    rates = {
        # Readers had more ready than they can keep up.
        "training": Rate(running=1500, computing=2000, reading=1000),
        "test": Rate(running=2),
    }
    row = timed_row("linear_in1k", amounts, rates)
    assert [each.hours for each in row.works] == pytest.approx([2.0, 0.5])
    assert row.hours == pytest.approx(2.5)
    assert row.limited_by == READING
    assert Rate(running=900, computing=950, reading=5000).limited_by == COMPUTING
    assert Rate(running=900).limited_by == ""
    decoded_on_device = Rate(running=1500, computing=2000, reading=1000, decodes_on_device=True)
    assert (decoded_on_device.limited_by, decoded_on_device.lasting) == ("", 1000)


@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_rates_know_whether_the_device_decodes(
    decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of evaluations; nothing is read or computed."""
    monkeypatch.setattr(Clock, "per_s", lambda *_: 2.0)
    words = ["checkpoint=random", "model=small", "eval=[knn]", "device=cpu", f"decode={decode}"]
    evaluating = build.evaluating(settings.compose("evaluate", words).config)
    how = engine.resolve_engine(evaluating.engine)
    images = FolderImages(name="made", split="train", paths=["a.jpg"])
    bench = Bench(
        backbone=card._network("small"),
        images=images,
        config=evaluating.encode_config(how, shown=False),
        sizes=card.TINY,
    )
    view = Center(short_px=36, crop_px=32)
    rate = bench.rate(lambda _config: None, images, view, batch=1, warm_up=0)
    assert rate.decodes_on_device == (decode == "device")


def test_numbers_of_classes_are_those_of_the_protocols() -> None:
    text = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text(encoding="utf-8")
    for data, paragraph in (("places205", "3.5"), ("inat18", "3.6")):
        (of_paragraph,) = re.findall(rf"^### {paragraph} .*?(?=^### )", text, re.M | re.S)
        assert f"{N_CLASSES[data]:,} classes" in of_paragraph


def test_a_clock_counts_what_comes_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock(torch.device("cpu"), warm_up=2)

    def work(n: int) -> None:
        nonlocal now
        for number in clock.progress(range(n)):
            # The first two take long.
            now += 100 if number < 2 else 0.5

    assert clock.per_s(lambda: work(10)) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"\b2\b"):
        clock.per_s(lambda: work(2))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_each_kind_run_at_tiny_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    rows = ["linear_in1k", "knn_in1k", "voc07_low_shot", "semisup_1", "voc07_finetune_fc"]
    rows.append(PRETRAINING)
    file = tmp_path / "card.json"
    engine = ["--", f"device={device}", "workers=0", "compile=false"]
    card.main(["--tiny", "--rows", *rows, "--json", str(file), *engine])
    found = json.loads(file.read_text())
    assert [line["row"] for line in found["rows"]] == [
        *(name for name in rows for _ in WORK.get(name, [PRETRAINING]))
    ]
    for line in found["rows"]:
        slower = min(line["rate"], line["reading"] or line["rate"])
        assert line["hours"] == pytest.approx(line["amount"] / slower / 3600, rel=1e-3)
        if line["reading"]:
            assert line["limited by"] in (COMPUTING, READING)
    by_row = [found["ratios"][f"hours of {name}"] for name in rows]
    assert found["ratios"]["hours of all"] == pytest.approx(sum(by_row))
    assert "hours" in capsys.readouterr().out


def test_tiny_hours_are_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        card.main(["--tiny", "--record", str(tmp_path / "hours.csv")])
    assert stopped.value.code == 2
    assert "--tiny" in capsys.readouterr().err
    assert not (tmp_path / "hours.csv").exists()
