import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import context

from relloc.data.image_set import Splits
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.transfer.detection.samples import FittedImage, RandomSizes
from relloc.transfer.metrics.voc_ap import MMDET, average_precision, voc_image
from relloc.transfer.voc0712_detection import Voc0712Detection

sys.path.insert(0, str(Path(__file__).parent / "detection"))
from made_objects import Rectangles

READING = EncodeConfig(
    batch=4, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=0.0
)


def evaluation(**changes: Any) -> Voc0712Detection:
    settings: dict[str, Any] = {
        "reference": "mmdet",
        "iterations": 4,
        "batch": 4,
        "images_per_gpu": 2,
        "images_per_forward": None,
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "milestones": [3],
        "gamma": 0.1,
        "warmup": 1,
        "warmup_from": 0.001,
        "evaluate_every": 2,
        "precise_batches": 2,
        "augment": RandomSizes(short_px=[64], long_px=128),
        "view": FittedImage(box=[128, 64]),
        "test_batch": 3,
    }
    return Voc0712Detection(**{**settings, **changes})


def given(folder: Path, *, train: Any = None, **changes: Any) -> Context:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 16, 16)).eval()
    splits = Splits(train=train or Rectangles(n=12), held_out=Rectangles(n=7, split="test"))
    settings = {"backbone": backbone, "splits": splits, "encode_config": READING}
    return context(folder=folder, **{**settings, **changes})


class Saved:
    """A state that keeps what was saved, and ends the process after one save."""

    def __init__(self, state: Any = None, *, kill: bool = False) -> None:
        self.state = state
        self.kill = kill

    def load(self) -> dict[str, Any] | None:
        return self.state

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)
        if self.kill:
            raise KeyboardInterrupt


def test_scores_are_those_of_the_reference_and_pictures_are_drawn(tmp_path: Path) -> None:
    scores = list(evaluation().run(given(tmp_path)))
    assert [score.metric for score in scores] == ["ap50", "ap", "ap75", "ap50_area"]
    assert [score.headline for score in scores] == [True, False, False, False]
    assert all(score.n == 7 and score.protocol == "3.8" for score in scores)
    assert any("iterations 4 instead of 24000" in each for each in scores[0].deviations)
    assert any("padded to the largest of 4" in each for each in scores[0].deviations)
    # mmdetection prints a share of three decimals
    assert scores[0].value == pytest.approx(round(scores[0].value, 1), abs=1e-9)
    assert len(list(tmp_path.glob("detections_*.png"))) == 7


def test_rows_of_the_other_reference_have_a_line_of_their_own(tmp_path: Path) -> None:
    scores = list(evaluation(reference="detectron2").run(given(tmp_path)))
    assert {score.variant for score in scores} == {"detectron2"}
    assert [score.metric for score in scores] == ["ap50", "ap", "ap75"]


def test_the_other_reference_has_no_weight_decay_on_norm_layers(tmp_path: Path) -> None:
    one = evaluation(reference="detectron2")
    network = one.make_network(given(tmp_path))
    others, norms = one.parameter_groups(network)
    n_norms = sum(
        parameter.numel()
        for module in network.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for parameter in module.parameters()
    )
    assert sum(parameter.numel() for parameter in norms["params"]) == n_norms
    assert norms["weight_decay"] == 0
    n_all = sum(parameter.numel() for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in others["params"]) == n_all - n_norms
    (group,) = evaluation().parameter_groups(network)
    assert len(group["params"]) == len(list(network.parameters()))


def test_the_other_reference_uses_all_anchors_and_difficult_objects(tmp_path: Path) -> None:
    for reference, is_used in (("mmdet", False), ("detectron2", True)):
        one = evaluation(reference=reference)
        network: Any = one.make_network(given(tmp_path))
        assert network.settings.rpn.use_crossing_anchors is is_used
        assert one.make_sample(Rectangles(n=6)).difficult is is_used


def test_batch_norm_is_estimated_before_the_test_of_the_other_reference(tmp_path: Path) -> None:
    one = evaluation(reference="detectron2")
    where = given(tmp_path)
    network: Any = one.make_network(where)
    network.requires_grad_(True)
    weights = copy.deepcopy(dict(network.named_parameters()))
    one._estimate_batch_norm(network, where)
    assert network.norm.num_batches_tracked == 2
    assert network.norm.momentum == 0.1
    assert network.norm.running_var.ne(1).any()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_trunk_and_head_come_from_the_checkpoint(tmp_path: Path) -> None:
    where = given(tmp_path)
    network: Any = evaluation().make_network(where)
    stages = list(where.backbone.stages().values())
    for module, stage in ((network.trunk[3], stages[3]), (network.stage5, stages[4])):
        for own, loaded in zip(module.parameters(), stage.parameters(), strict=True):
            assert torch.equal(own, loaded)


def test_tests_of_images_one_by_one_give_the_same_numbers(tmp_path: Path) -> None:
    """Only images of one size are tested together, so that no padding enters."""
    network = None
    found = []
    for test_batch in (1, 3):
        one = evaluation(test_batch=test_batch)
        where = given(tmp_path)
        network = network or one.make_network(where)
        found.append(one.detect_all(network, where).evaluate(list))
    for alone, together in zip(*found, strict=True):
        assert len(alone.found_scores) == len(together.found_scores) > 0
        torch.testing.assert_close(
            torch.from_numpy(alone.found_boxes), torch.from_numpy(together.found_boxes)
        )


def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    expected = list(evaluation().run(given(tmp_path)))
    killed = Saved(kill=True)
    with pytest.raises(KeyboardInterrupt):
        list(evaluation().run(given(tmp_path, state=killed)))
    assert killed.state["step"] == 2
    saved = Saved(killed.state)
    assert list(evaluation().run(given(tmp_path, state=saved))) == expected
    whole = Saved()
    list(evaluation().run(given(tmp_path, state=whole)))
    for name, value in whole.state["network"].items():
        assert torch.equal(value, saved.state["network"][name]), name


def test_images_with_a_wrong_annotation_are_counted_as_unreadable(tmp_path: Path) -> None:
    train = Rectangles(n=12, wrong=(3,))
    evaluation_of_all = evaluation(iterations=2)
    assert 3 not in evaluation_of_all.training_indices(train)
    with pytest.raises(DataError, match=r"1 of 12 images .* trainval 3: its annotation is wrong"):
        list(evaluation_of_all.run(given(tmp_path, train=train)))
    tolerant = dataclasses.replace(READING, unreadable_share=0.1)
    list(evaluation_of_all.run(given(tmp_path, train=train, encode_config=tolerant)))


@pytest.mark.slow
def test_it_learns_to_find_rectangles(tmp_path: Path) -> None:
    one = evaluation(
        iterations=300, milestones=[240], warmup=20, evaluate_every=300, learning_rate=0.02
    )
    images = Rectangles(n=5)
    splits = Splits(train=images, held_out=dataclasses.replace(images, split="test"))
    scores = {score.metric: score.value for score in one.run(given(tmp_path, splits=splits))}
    assert scores["ap50_area"] > 85


def test_images_without_objects_are_refused_with_what_to_give(tmp_path: Path) -> None:
    where = given(tmp_path)
    plain = context().splits
    with pytest.raises(UsageError, match="voc0712"):
        evaluation().check(plain)
    evaluation().check(where.splits)
    with pytest.raises(DataError, match="rectangles trainval"):
        evaluation().check(dataclasses.replace(where.splits, train=Rectangles(n=0)))


def test_a_perfect_detector_has_an_ap_of_one() -> None:
    """The metric reads boxes of the data set as they are."""
    from relloc.transfer.detection.batch import Detections

    images = []
    truth = Rectangles(n=7)
    for index in range(7):
        objects = truth.objects(index)
        found = Detections(
            boxes=torch.from_numpy(objects.boxes),
            scores=torch.ones(1),
            classes=torch.from_numpy(objects.classes),
        )
        images.append(voc_image(found, objects))
    assert average_precision(images, n_classes=2, definition=MMDET).tolist() == [[1.0, 1.0]]
