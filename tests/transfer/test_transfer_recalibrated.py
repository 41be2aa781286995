"""Fine-tuning that begins with batch-norm statistics as trained, or recalibrated, as named rows."""

import copy
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from relloc import ranks
from relloc.errors import UsageError
from relloc.evaluation.contract import (
    Context,
    EvalSettings,
    EvaluatedModel,
    NamedEvaluation,
    NullState,
    log_nothing,
)
from relloc.evaluation.run import evaluate, group_parts, split_evaluation
from relloc.features.batch_norm import recalibrate
from relloc.models.small import SmallBackbone
from relloc.results import Result
from relloc.transfer.iterations import IterativeFineTuning
from relloc.transfer.semisup import SemiSupervised

sys.path.insert(0, str(Path(__file__).parent / "segmentation"))
sys.path.insert(0, str(Path(__file__).parent))
import test_transfer_coco_mask_rcnn_fpn_1x as coco
import test_transfer_segmentation_evaluations as segmentation
import test_transfer_semisup as semi
import test_transfer_voc07_fast_rcnn as fast_rcnn
import test_transfer_voc07_finetune as classification
import test_transfer_voc0712_detection as detection

BOTH = ["as_trained", "recalibrated"]


def rows_of(evaluation: Any, where: Any, folder: Path, *of_run: str) -> list[Result]:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 16, 16)).eval()
    model = EvaluatedModel(backbone=backbone, checkpoint="one", model="small", weights="one")
    settings = EvalSettings(
        encode_config=where.encode_config,
        batch_norms=of_run or ["as_trained"],
        calibration_images=8,
        bank_gib=1.0,
        seed=0,
    )
    named = NamedEvaluation(name="some", evaluation=evaluation, splits=where.splits)
    rows = []
    for batch_norm in BOTH:
        parts = split_evaluation(named, batch_norm, model, settings)
        for part in parts:
            measured = evaluate(
                model,
                [part],
                settings,
                run_dir=folder,
                open_state=lambda _fingerprint: NullState(),
                log_of=lambda _part: log_nothing,
            )
            for _, of_part in measured:
                rows += of_part
    return rows


def cases(folder: Path, batch_norm: str | Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Each evaluation, short and small, and a context with its images."""
    little = {"iterations": 2, "evaluate_every": 2, "batch_norm": batch_norm}
    one_rate = {"learning_rates": (0.01,), "head_multipliers": (1,)}
    return {
        "detection": (detection.evaluation(**little), detection.given(folder)),
        "coco": (coco.evaluation(**little), coco.given(folder)),
        "fast_rcnn": (fast_rcnn.evaluation(**little, milestones=[1]), fast_rcnn.given(folder)),
        "segmentation": (segmentation.evaluation(**little), segmentation.given()),
        "classification": (
            classification.evaluation(**little, trained="fc6-8"),
            classification.given(),
        ),
        "semisup": (
            semi.evaluation(epochs=1, milestone_epochs=[], batch_norm=batch_norm, **one_rate),
            dataclasses.replace(
                classification.given(), splits=semi.SPLITS, encode_config=semi.READING
            ),
        ),
    }


NAMES = ("detection", "coco", "fast_rcnn", "segmentation", "classification", "semisup")


@pytest.mark.parametrize("name", NAMES)
def test_both_are_named_rows(name: str, tmp_path: Path) -> None:
    one, where = cases(tmp_path, BOTH)[name]
    rows = rows_of(one, where, tmp_path)
    first = [row for row in rows if row.batch_norm == "as_trained"]
    second = [row for row in rows if row.batch_norm == "recalibrated"]
    assert [row.metric for row in first] == [row.metric for row in second]
    assert first[0].fingerprint != second[0].fingerprint
    words = "batch-norm statistics re-estimated on"
    is_told = [any(words in each for each in of[0].details) for of in (first, second)]
    assert is_told == [False, True]
    # As trained it is what it is without the choice, whatever frozen evaluations have.
    plain, _ = cases(tmp_path, "as_trained")[name]
    assert rows_of(plain, where, tmp_path, "recalibrated") == first


# The batches of these two are no tensors of images, or come from elsewhere.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("semisup", "fast_rcnn")])
def test_the_backbone_has_the_statistics_of_training_samples(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    one, where = cases(tmp_path, "recalibrated")[name]
    assert isinstance(one, IterativeFineTuning)
    seen = []

    def remember(_evaluation: Any, context: Context) -> Sequence[Any]:
        seen.append(copy.deepcopy(context.backbone))
        return ()

    monkeypatch.setattr(type(one), "run", remember)
    rows_of(one, where, tmp_path)
    torch.manual_seed(0)
    twin = SmallBackbone(widths=(8, 8, 8, 16, 16)).eval()
    before = copy.deepcopy(twin.state_dict())
    images = where.splits.train
    config = where.encode_config
    batches = list(one.calibration_batches(images, n_images=8, seed=0, config=config))
    assert 4 <= sum(len(batch) for batch in batches) <= 8
    assert {len(batch) for batch in batches} == {one.forward_images()[1]}
    recalibrate(twin, batches)
    (backbone,) = seen
    changed = 0
    for name_of_norm, module in backbone.named_modules():
        if isinstance(module, _BatchNorm):
            expected = twin.get_submodule(name_of_norm)
            torch.testing.assert_close(module.running_mean, expected.running_mean)
            torch.testing.assert_close(module.running_var, expected.running_var)
            before_it = before[f"{name_of_norm}.running_var"]
            changed += int(not torch.allclose(module.running_var, before_it))  # type: ignore[arg-type]
    assert changed
    assert not backbone.training


def test_layers_that_are_not_trained_are_changed_by_them(tmp_path: Path) -> None:
    one, where = cases(tmp_path, BOTH)["classification"]
    values = {row.batch_norm: row.value for row in rows_of(one, where, tmp_path)}
    assert values["as_trained"] != values["recalibrated"]


@pytest.mark.parametrize("wrong", ["fresh", [], ["as_trained", "fresh"]])
def test_an_unknown_batch_norm_is_named(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"voc0712_detection\.batch_norm is"):
        detection.evaluation(batch_norm=wrong)
    with pytest.raises(UsageError, match=r"semisup\.batch_norm is"):
        semi.evaluation(batch_norm=wrong)


def test_a_semi_supervised_training_is_of_the_same_kind() -> None:
    assert semi.evaluation(batch_norm=BOTH).batch_norms(["as_trained"]) == BOTH
    assert isinstance(semi.evaluation(), SemiSupervised)
    assert semi.evaluation().batch_norms(BOTH) == ["as_trained"]


def test_trainings_of_the_same_images_are_recalibrated_each_for_itself(tmp_path: Path) -> None:
    where = classification.given()
    settings = EvalSettings(
        encode_config=where.encode_config,
        batch_norms=["as_trained"],
        calibration_images=8,
        bank_gib=1.0,
        seed=0,
    )
    model = EvaluatedModel(
        backbone=SmallBackbone(widths=(8, 8, 8, 16, 16)), checkpoint="one", model="s", weights="w"
    )
    parts = []
    # Statistics are of batches of a forward, so those of one are not those of the other.
    for name, images_per_forward in (("one", 1), ("two", 2)):
        changes = {"images_per_forward": images_per_forward, "batch_norm": BOTH}
        one = classification.evaluation(**changes)
        named = NamedEvaluation(name=name, evaluation=one, splits=where.splits)
        for batch_norm in BOTH:
            parts += split_evaluation(named, batch_norm, model, settings)
    names = []
    for group in group_parts(parts):
        names.append([f"{part.named.name} {part.batch_norm}" for part in group])
    assert names == [
        ["one as_trained", "two as_trained"],
        ["one recalibrated"],
        ["two recalibrated"],
    ]


def test_calibration_is_the_same_in_any_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = classification.given()

    def shapes(**changes: Any) -> list[torch.Size]:
        one = classification.evaluation(batch=8, **changes)
        batches = one.calibration_batches(
            where.splits.train, n_images=8, seed=0, config=where.encode_config
        )
        return [batch.shape[:1] for batch in batches]

    settings = ({}, {"images_per_forward": 2}, {"images_per_forward": 5})
    expected = [[(8,)], [(2,)] * 4, [(4,)] * 2]
    assert [shapes(**changes) for changes in settings] == expected
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert [shapes(**changes) for changes in settings] == expected
