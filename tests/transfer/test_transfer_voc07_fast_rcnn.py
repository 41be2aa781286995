"""Fast R-CNN on VOC2007: settings, network, trainings that are stopped, and what rows say."""

import copy
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from annotated_sets import write_proposals, write_voc
from contexts import context
from resumed import Saved, check_resumed
from torch import nn

from relloc.data.image_set import Splits
from relloc.data.views import RandomSquare
from relloc.data.voc_objects import voc_detection
from relloc.data.voc_proposals import voc_with_proposals
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import Context
from relloc.features.batch_norm import recalibrate
from relloc.features.source import EncodeConfig
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.results import Score
from relloc.runs.resolvers import scaled_whole
from relloc.transfer.alexnet import FineTunedAlexNet
from relloc.transfer.detection.fast_rcnn import FastRcnn, pool_regions
from relloc.transfer.metrics.voc_ap import MMDET, average_precision, voc_image
from relloc.transfer.rescaled_alexnet import rescale_for_fine_tuning
from relloc.transfer.resize import FittedImage
from relloc.transfer.voc07_fast_rcnn import Voc07FastRcnn

sys.path.insert(0, str(Path(__file__).parent / "detection"))
from made_objects import ProposedRectangles, Rectangles

CPU = torch.device("cpu")
READING = EncodeConfig(batch=4, workers=0, device=CPU, precision="fp32", unreadable_share=0.0)
# What conf/eval/voc07_fast_rcnn.yaml has, apart from the images.
PUBLISHED: dict[str, Any] = {
    "iterations": 40_000,
    "batch": 2,
    "images_per_forward": None,
    "learning_rate": 0.001,
    "milestones": [30_000],
    "augment": FittedImage(box=[1000, 600]),
    "view": FittedImage(box=[1000, 600]),
    "rescaling_view": RandomSquare(crop_px=227),
}


def evaluation(**changes: Any) -> Voc07FastRcnn:
    settings: dict[str, Any] = {
        "iterations": 4,
        "batch": 4,
        "images_per_gpu": 2,
        "images_per_forward": None,
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "milestones": [3],
        "gamma": 0.1,
        "evaluate_every": 2,
        "rescale": None,
        "rescaling_view": RandomSquare(crop_px=96),
        "augment": FittedImage(box=[128, 64]),
        "view": FittedImage(box=[128, 64]),
        "test_batch": 3,
    }
    return Voc07FastRcnn(**{**settings, **changes})


def small_backbone() -> SmallBackbone:
    torch.manual_seed(0)
    return SmallBackbone(widths=(8, 8, 8, 16, 16)).eval()


def alexnet() -> AlexNetBackbone:
    torch.manual_seed(0)
    return AlexNetBackbone().eval()


def given(folder: Path, **changes: Any) -> Context:
    train, held_out = ProposedRectangles(n=12), ProposedRectangles(n=7, split="test")
    settings = {
        "backbone": small_backbone(),
        "splits": Splits(train=train, held_out=held_out),
        "encode_config": READING,
    }
    return context(folder=folder, **{**settings, **changes})


def test_scores_are_by_both_definitions_and_pictures_are_drawn(tmp_path: Path) -> None:
    backbone = small_backbone()
    before = copy.deepcopy(backbone.state_dict())
    scores = list(evaluation().run(given(tmp_path, backbone=backbone)))
    assert [score.metric for score in scores] == ["map", "map_area", "ap_red", "ap_green"]
    headline, by_area, red, green = scores
    assert (red.value + green.value) / 2 == pytest.approx(headline.value)
    assert (headline.headline, headline.column, headline.variant) == (True, "Fast R-CNN", "")
    assert (by_area.headline, by_area.table) == (False, "")
    assert all(score.n == 7 and score.protocol == "3.16" for score in scores)
    assert any("iterations 4 instead of 40000" in each for each in headline.deviations)
    assert any("fourth stage" in each for each in headline.deviations)
    assert any("12 images" in each and "mirror" in each for each in headline.details)
    assert len(list(tmp_path.glob("detections_*.png"))) == 7
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_each_epoch_has_each_image_and_its_mirror_image(tmp_path: Path) -> None:
    one = evaluation(batch=2, iterations=12)
    train = ProposedRectangles(n=12)
    seen = []
    for keys in one._keys(one.training_images(train), 0, 0, 12):
        (micro_batch,) = keys
        seen += [index for index, _ in micro_batch]
    # 24 images are 12 steps of 2.
    assert sorted(seen) == list(range(24))


def test_wide_and_high_images_share_a_batch(tmp_path: Path) -> None:
    one = evaluation()
    kinds = {one.kind_of(one.training_images(ProposedRectangles(n=12)), i) for i in range(24)}
    assert len(kinds) == 1


@pytest.mark.parametrize("backbone", [small_backbone, alexnet])
def test_the_first_stage_is_left_out_and_biases_learn_faster_without_decay(
    tmp_path: Path, backbone: Any
) -> None:
    one = evaluation(rescale=False)
    network = one.make_network(given(tmp_path, backbone=backbone()))
    assert isinstance(network, FastRcnn)
    weights, biases = one.parameter_groups(network)
    assert (biases["lr"], biases["weight_decay"]) == (0.02, 0)
    assert "lr" not in weights
    assert "weight_decay" not in weights
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    first = [m for m in network.first_stage.modules() if isinstance(m, nn.Conv2d)]
    assert len(first) == 1
    expected = [layer.bias for layer in layers if layer.bias is not None and layer not in first]
    assert {id(bias) for bias in biases["params"]} == {id(bias) for bias in expected}
    both = [*weights["params"], *biases["params"]]
    left = {id(parameter) for parameter in network.parameters()} - {id(each) for each in both}
    assert left == {id(parameter) for parameter in network.first_stage.parameters()}


def test_the_first_stage_stays_with_its_batch_norm_while_others_learn(tmp_path: Path) -> None:
    saved = Saved()
    list(evaluation().run(given(tmp_path, state=saved)))
    before = evaluation().make_network(given(tmp_path)).state_dict()
    for name, value in saved.content["network"].items():
        if name.startswith("trunk.0."):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(
        saved.content["network"]["head.0.conv1.weight"], before["head.0.conv1.weight"]
    )
    assert not torch.equal(
        saved.content["network"]["trunk.1.bn1.running_mean"], before["trunk.1.bn1.running_mean"]
    )


@torch.no_grad()
def test_recalibrated_outputs_of_conv6_have_mean_0_and_deviation_1_in_regions(
    tmp_path: Path,
) -> None:
    one = evaluation(rescale=False, augment=FittedImage(box=[256, 128]))
    backbone = alexnet()
    where = given(tmp_path, backbone=backbone)
    images = where.splits.train
    (batch,) = one.calibration_batches(images, n_images=4, seed=0, config=READING)
    assert recalibrate(backbone, [batch], one.calibration_forward(backbone)) == 4
    network = one.make_network(where).eval()
    assert isinstance(network, FastRcnn)
    cells = pool_regions(
        network.trunk(batch.images),
        batch.regions.boxes,
        batch.regions.images,
        side=network.side,
        stride=network.stride,
    )
    outputs = network.head[0](cells).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs.mean(dim=1), torch.zeros(4096), rtol=0, atol=0.05)
    torch.testing.assert_close(outputs.std(dim=1), torch.ones(4096), rtol=0, atol=0.05)
    # Other networks embed the images.
    other, twin = small_backbone(), small_backbone()
    recalibrate(other, [batch], one.calibration_forward(other))
    recalibrate(twin, [batch.images])
    for name, value in twin.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.slow
def test_the_network_of_the_paper_is_rescaled_as_a_classifier(tmp_path: Path) -> None:
    where = given(tmp_path, backbone=alexnet())
    classifier = FineTunedAlexNet(alexnet(), 2, seed=0)
    drawn = copy.deepcopy(classifier.state_dict())
    rescale_for_fine_tuning(classifier, RandomSquare(crop_px=96), where)
    rescaled, plain = (
        evaluation(rescale=rescale).make_network(where).state_dict() for rescale in (None, False)
    )
    n_layers = 0
    for name, value in classifier.state_dict().items():
        # fc8 gives way to the two layers of a detector.
        if name.startswith("head.10."):
            assert name not in rescaled
            continue
        n_layers += 1
        assert torch.equal(rescaled[name], value), name
        assert torch.equal(plain[name], drawn[name]), name
        if name.endswith("weight"):
            assert not torch.equal(value, drawn[name]), name
    assert n_layers == 2 * 8
    for name in ("predictor.score.weight", "predictor.move.weight"):
        assert torch.equal(rescaled[name], plain[name])


def test_a_network_with_batch_norm_is_not_rescaled(tmp_path: Path) -> None:
    assert isinstance(evaluation().make_network(given(tmp_path)), FastRcnn)
    with pytest.raises(UsageError, match=r"voc07_fast_rcnn\.rescale is true.*SmallBackbone"):
        evaluation(rescale=True).make_network(given(tmp_path))


def resumed_scores(folder: Path, one: Voc07FastRcnn, **changes: Any) -> list[Score]:
    def run(state: Saved) -> list[Score]:
        return list(one.run(given(folder, state=state, **changes)))

    return check_resumed(run, first_save=one.evaluate_every)


def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    assert resumed_scores(tmp_path, evaluation())


@pytest.mark.slow
def test_so_does_one_of_the_papers_network_with_its_dropout(tmp_path: Path) -> None:
    one = evaluation(iterations=2, milestones=[1], evaluate_every=1, batch=2, learning_rate=0.001)
    few = ProposedRectangles(n=4, near=3, far=3)
    splits = Splits(train=few, held_out=dataclasses.replace(few, split="test"))
    headline, *_ = resumed_scores(tmp_path, one, backbone=alexnet(), splits=splits)
    assert headline.variant == "rescaled"
    assert any("rescaled by" in each for each in headline.details)
    assert any("96 px" in each for each in headline.deviations)


def losses_of(folder: Path, one: Voc07FastRcnn, **changes: Any) -> list[float]:
    """The losses of a training, as its curve has them."""
    losses = []

    def log(numbers: Mapping[str, float], _step: int) -> None:
        if "loss" in numbers:
            losses.append(numbers["loss"])

    list(one.run(given(folder, log=log, **changes)))
    return losses


class WithoutNorm(Voc07FastRcnn):
    """All batch norms keep their statistics, so that images do not depend on each other."""

    def before_forward(self, network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def accumulated(folder: Path, backbone: Any, images_per_forward: int | None) -> list[float]:
    # Images of one size, as padding would depend on what else is in a forward.
    train = ProposedRectangles(n=9, portraits=False, near=3, far=3)
    splits = Splits(train=train, held_out=dataclasses.replace(train, n=2, split="test"))
    one = evaluation(
        iterations=3,
        batch=6,
        images_per_forward=images_per_forward,
        evaluate_every=1,
        learning_rate=0.001,
        rescale=False,
    )
    settings = {}
    for field in dataclasses.fields(one):
        if field.init:
            settings[field.name] = getattr(one, field.name)
    return losses_of(folder, WithoutNorm(**settings), splits=splits, backbone=backbone)


def test_accumulation_changes_nothing_but_batch_norm(tmp_path: Path) -> None:
    whole = accumulated(tmp_path, small_backbone(), None)
    assert len(whole) == 3
    for images_per_forward in (2, 4):
        found = accumulated(tmp_path, small_backbone(), images_per_forward)
        assert found == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_accumulation_does_not_change_dropout(tmp_path: Path) -> None:
    whole = accumulated(tmp_path, alexnet(), None)
    assert accumulated(tmp_path, alexnet(), 2) == pytest.approx(whole, rel=1e-4)


def test_tests_of_images_one_by_one_give_the_same_numbers(tmp_path: Path) -> None:
    where = given(tmp_path)
    network = evaluation().make_network(where)
    found = []
    for test_batch in (1, 3):
        values, n_read = evaluation(test_batch=test_batch).detect_all(network, where)
        assert n_read == 7
        found.append(values.evaluate(list))
    for alone, together in zip(*found, strict=True):
        assert len(alone.found_scores) == len(together.found_scores) > 0
        torch.testing.assert_close(
            torch.from_numpy(alone.found_boxes), torch.from_numpy(together.found_boxes)
        )


def test_proposals_are_looked_at_in_the_resized_image_and_moved_in_the_original_one(
    tmp_path: Path,
) -> None:
    calls: list[Any] = []

    class Told(FastRcnn):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def detect(self, images, regions, proposals, sizes):
            calls.append((images.shape, regions, proposals, sizes))
            return []

    where = given(tmp_path)
    one = evaluation(view=FittedImage(box=[256, 96]))
    image = one.make_test_image(where.splits.held_out)(4, 0)  # a portrait of 48 x 72 px
    assert list(one.detect(Told(), [image], where)) == []
    ((shape, regions, proposals, sizes),) = calls
    # Not padded to multiples of 32.
    assert shape == (1, 3, 144, 96)
    assert sizes == [(72, 48)]
    torch.testing.assert_close(regions[0], 2 * proposals[0])
    assert proposals[0].tolist() == where.splits.held_out.proposals(4).tolist()


@pytest.mark.slow
def test_it_learns_to_find_rectangles(tmp_path: Path) -> None:
    one = evaluation(
        iterations=250,
        milestones=[200],
        evaluate_every=250,
        batch=2,
        learning_rate=0.02,
        augment=FittedImage(box=[384, 288]),
        view=FittedImage(box=[384, 288]),
    )
    images = ProposedRectangles(n=5)
    splits = Splits(train=images, held_out=dataclasses.replace(images, split="test"))
    scores = {score.metric: score.value for score in one.run(given(tmp_path, splits=splits))}
    assert scores["map"] > 60
    assert scores["map_area"] > 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(ProposedRectangles):
    """Rectangles of which some can't be read."""

    broken: tuple[int, ...] = ()

    def read(self, index: int):
        if index in self.broken:
            raise UnreadableImage("it is broken")
        return super().read(index)


def test_an_image_that_can_not_be_read_counts_once(tmp_path: Path) -> None:
    splits = Splits(
        train=Broken(n=8, broken=(2,)), held_out=Broken(n=7, split="test", broken=(1, 4))
    )
    one = evaluation(iterations=8, evaluate_every=8)
    with pytest.raises(DataError, match=r"1 of 8 images .* trainval 2: it is broken"):
        list(one.run(given(tmp_path, splits=splits)))
    tolerant = dataclasses.replace(READING, unreadable_share=0.5)
    scores = list(one.run(given(tmp_path, splits=splits, encode_config=tolerant)))
    assert {score.n for score in scores} == {5}
    assert any("2 of 7 test images" in each for each in scores[0].deviations)


def test_a_wrong_annotation_counts_too(tmp_path: Path) -> None:
    splits = Splits(
        train=ProposedRectangles(n=8, wrong=(3,)), held_out=ProposedRectangles(n=2, split="test")
    )
    one = evaluation(iterations=2)
    assert {3, 11}.isdisjoint(one.training_indices(one.training_images(splits.train)))
    with pytest.raises(DataError, match=r"1 of 8 images .* trainval 3: its annotation is wrong"):
        list(one.run(given(tmp_path, splits=splits)))


def deviations_of(one: Voc07FastRcnn, folder: Path, rescaled: bool = False) -> list[str]:
    train = ProposedRectangles(n=5011, name="voc2007")
    where = given(folder, splits=Splits(train=train, held_out=train))
    _, *others = one._own_deviations(where, rescaled)
    return [*one.deviations(one.length(train)), *others]


def test_the_published_training_has_no_deviations_but_those_of_the_network(tmp_path: Path) -> None:
    assert deviations_of(evaluation(**PUBLISHED), tmp_path, rescaled=True) == []
    backbone = alexnet()
    own = list(evaluation(**PUBLISHED)._own_deviations(given(tmp_path, backbone=backbone), True))
    assert "not known" in own[0]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"momentum": 0.5}, "momentum 0.5"),
        ({"weight_decay": 0.0}, "weight decay 0"),
        ({"learning_rate": 0.01}, "learning rate 0.01"),
        ({"gamma": 0.5}, "gamma 0.5"),
        ({"milestones": [12_000]}, "[12000]"),
        ({"batch": 4, "images_per_forward": 2}, "batch 4"),
        ({"augment": FittedImage(box=[800, 600])}, "800"),
        ({"view": FittedImage(box=[800, 600])}, "800"),
        ({"rescaling_view": RandomSquare(crop_px=96)}, "96 px"),
    ],
)
def test_each_other_setting_is_named(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    one = evaluation(**{**PUBLISHED, **changes})
    (deviation,) = deviations_of(one, tmp_path, rescaled=True)
    assert name in deviation


@pytest.mark.parametrize("iterations", [1, 2, 7, 100, 12_345, 80_000])
def test_another_length_has_its_milestone_in_proportion(tmp_path: Path, iterations: int) -> None:
    milestones = scaled_whole([30_000], 40_000, iterations)
    one = evaluation(**{**PUBLISHED, "iterations": iterations, "milestones": milestones})
    (deviation,) = deviations_of(one, tmp_path)
    assert f"iterations {iterations}" in deviation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": 0}, "gamma is 0"),
        ({"batch": 3}, "batch is 3"),
        ({"milestones": [5, 3]}, "milestones is"),
        ({"test_batch": 0}, "test_batch is 0"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"eval.voc07_fast_rcnn.{words}"):
        evaluation(**changes)


def test_images_without_proposals_are_refused_with_what_to_give(tmp_path: Path) -> None:
    for splits in (context().splits, Splits(train=Rectangles(n=3), held_out=Rectangles(n=3))):
        with pytest.raises(UsageError, match="voc2007_proposals"):
            evaluation().check(splits)
    plain = voc_detection(
        root=str(write_voc(tmp_path)),
        years=[2007],
        train="trainval",
        held_out="test",
        held_out_year=2007,
        reference="mmdet",
    )
    with pytest.raises(UsageError, match="proposals"):
        evaluation().check(plain)


def test_it_runs_on_files_of_voc(tmp_path: Path) -> None:
    splits = voc_with_proposals(
        root=str(write_voc(tmp_path)),
        proposals=str(write_proposals(tmp_path / "boxes")),
        year=2007,
        train="trainval",
        held_out="test",
    )
    one = evaluation(iterations=2, milestones=[1])
    one.check(splits)
    for workers in (0, 1):
        config = dataclasses.replace(READING, workers=workers)
        headline, *_ = one.run(given(tmp_path, splits=splits, encode_config=config))
        assert headline.n == 1
        assert any("2 images of voc2007 trainval" in each for each in headline.deviations)


def test_the_metric_counts_the_last_pixels() -> None:
    """Boxes as they are read and found have a perfect overlap."""
    from relloc.transfer.detections import Detections

    truth = ProposedRectangles(n=7)
    images = []
    for index in range(7):
        objects = truth.objects(index)
        found = Detections(
            boxes=torch.from_numpy(objects.boxes),
            scores=torch.ones(1),
            classes=torch.from_numpy(objects.classes),
        )
        images.append(voc_image(found, objects))
    assert average_precision(images, n_classes=2, definition=MMDET).tolist() == [[1.0, 1.0]]
