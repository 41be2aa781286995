import copy
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_sets import write_voc
from contexts import context
from PIL import Image
from resumed import Saved, check_resumed

from relloc.data.annotations import Objects
from relloc.data.image_set import Splits
from relloc.data.voc_objects import voc_detection
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.results import Score
from relloc.runs.resolvers import scaled, scaled_whole
from relloc.transfer.detection.batch import DetectionBatch
from relloc.transfer.detection.samples import RandomSizes
from relloc.transfer.detections import Detections
from relloc.transfer.metrics.voc_ap import MMDET, average_precision, voc_image
from relloc.transfer.resize import FittedImage
from relloc.transfer.voc0712_detection import Voc0712Detection

sys.path.insert(0, str(Path(__file__).parent / "detection"))
from made_objects import Rectangles

# What conf/eval/voc0712_detection.yaml has, apart from the images.
CARD: dict[str, Any] = {
    "iterations": 24_000,
    "batch": 16,
    "images_per_forward": 2,
    "learning_rate": 0.02,
    "milestones": [18_000, 22_000],
    "warmup": 100,
    "precise_batches": 200,
    "augment": RandomSizes(short_px=tuple(range(480, 801, 32)), long_px=1333),
    "view": FittedImage(box=(1333, 800)),
}
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Rectangles):
    """Rectangles of which some can't be read, or with all objects difficult."""

    broken: tuple[int, ...] = ()
    all_difficult: bool = False

    def read(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImage("it is broken")
        return super().read(index)

    def objects(self, index: int) -> Objects:
        objects = super().objects(index)
        if not self.all_difficult:
            return objects
        return dataclasses.replace(objects, difficult=np.ones(len(objects), bool))


def test_scores_are_those_of_the_reference_and_pictures_are_drawn(tmp_path: Path) -> None:
    scores = list(evaluation().run(given(tmp_path)))
    metrics = ["ap50", "ap", "ap75", "ap50_area", "ap50_red", "ap50_green"]
    assert [score.metric for score in scores] == metrics
    assert [score.headline for score in scores] == [True, False, False, False, False, False]
    assert [score.table for score in scores[4:]] == ["", ""]
    assert all(score.n == 7 and score.protocol == "3.8" for score in scores)
    assert any("iterations 4 instead of 24000" in each for each in scores[0].deviations)
    assert any("padded to the largest of 4" in each for each in scores[0].deviations)
    # mmdetection prints a share of three decimals
    assert scores[0].value == pytest.approx(round(scores[0].value, 1), abs=1e-9)
    assert len(list(tmp_path.glob("detections_*.png"))) == 7
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert "none" in (tmp_path / "confusion.csv").read_text()


def test_rows_of_the_other_reference_have_a_line_of_their_own(tmp_path: Path) -> None:
    scores = list(evaluation(reference="detectron2").run(given(tmp_path)))
    assert {score.variant for score in scores} == {"detectron2"}
    assert [score.metric for score in scores] == ["ap50", "ap", "ap75", "ap50_red", "ap50_green"]


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


@pytest.mark.parametrize(("images_per_forward", "forwards"), [(None, [4, 4]), (2, [2, 2, 2, 2])])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_norm_is_estimated_in_forwards_like_those_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    images_per_forward: int | None,
    forwards: list[int],
    precision: str,
) -> None:
    labels = []

    def progress(batches: Any, what: str, n: int) -> Any:
        labels.append((what, n))
        return batches

    one = evaluation(reference="detectron2", images_per_forward=images_per_forward)
    config = dataclasses.replace(READING, precision=precision, progress=progress)
    where = given(tmp_path, encode_config=config)
    network: Any = one.make_network(where)
    seen = []

    def losses(batch: DetectionBatch) -> dict[str, torch.Tensor]:
        assert network.training
        assert not torch.is_grad_enabled()
        seen.append((len(batch.images), torch.is_autocast_enabled("cpu")))
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(network, "losses", losses)
    one._estimate_batch_norm(network, where)
    assert seen == [(n_images, precision == "bf16") for n_images in forwards]
    ((what, n_batches),) = labels
    assert what.startswith("estimating batch norm")
    assert n_batches == 2
    n_forwards, n_images = len(forwards), forwards[0]
    details = list(one._test_details(where))
    assert any(f"in {n_forwards} forwards of {n_images} images" in detail for detail in details)


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
        values, n_read = one.detect_all(network, where)
        assert n_read == 7
        found.append(values.evaluate(list))
    for alone, together in zip(*found, strict=True):
        assert len(alone.found_scores) == len(together.found_scores) > 0
        torch.testing.assert_close(
            torch.from_numpy(alone.found_boxes), torch.from_numpy(together.found_boxes)
        )


def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def run(state: Saved) -> list[Score]:
        return list(evaluation().run(given(tmp_path, state=state)))

    assert check_resumed(run, first_save=2)


def test_images_with_a_wrong_annotation_are_counted_as_unreadable(tmp_path: Path) -> None:
    train = Rectangles(n=12, wrong=(3,))
    evaluation_of_all = evaluation(iterations=2)
    assert 3 not in evaluation_of_all.training_indices(train)
    with pytest.raises(DataError, match=r"1 of 12 images .* trainval 3: its annotation is wrong"):
        list(evaluation_of_all.run(given(tmp_path, train=train)))
    tolerant = dataclasses.replace(READING, unreadable_share=0.1)
    list(evaluation_of_all.run(given(tmp_path, train=train, encode_config=tolerant)))


def given_broken(folder: Path, *broken: int, wrong: tuple[int, ...] = ()) -> Context:
    held_out = Odd(n=7, split="test", broken=broken, wrong=wrong)
    tolerant = dataclasses.replace(READING, unreadable_share=1.0)
    splits = Splits(train=Rectangles(n=12), held_out=held_out)
    return given(folder, splits=splits, encode_config=tolerant)


def published_set(n: int = 16_551) -> Rectangles:
    return Rectangles(n=n, name="voc0712")


def deviations_of(one: Voc0712Detection, train: Rectangles) -> list[str]:
    return [*one.deviations(one.length(train)), *one.image_differences(train)]


@pytest.mark.parametrize("reference", ["mmdet", "detectron2"])
def test_the_published_training_has_no_deviations(reference: str) -> None:
    one = evaluation(**CARD, reference=reference)
    assert deviations_of(one, published_set()) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"momentum": 0.5}, "momentum 0.5"),
        ({"weight_decay": 0.0}, "weight decay 0"),
        ({"gamma": 0.5}, "gamma 0.5"),
        ({"warmup": 50}, "warmup 50"),
        ({"warmup_from": 0.1}, "warmup from 0.1"),
        ({"milestones": [12_000]}, "[12000]"),
        ({"images_per_gpu": 1}, "images per gpu 1"),
        ({"precise_batches": 20, "reference": "detectron2"}, "precise batches 20"),
        ({"augment": RandomSizes(short_px=[480, 800], long_px=1333)}, "480, 800 px"),
        ({"augment": dataclasses.replace(CARD["augment"], flip=0.0)}, "flip 0"),
        ({"view": FittedImage(box=[1000, 600])}, "1000"),
    ],
)
def test_each_other_setting_is_named(changes: dict[str, Any], name: str) -> None:
    (deviation,) = deviations_of(evaluation(**{**CARD, **changes}), published_set())
    assert name in deviation


def test_other_images_to_train_on_are_named() -> None:
    one = evaluation(**CARD)
    for train in (published_set(16_550), Rectangles(n=16_551)):
        (deviation,) = deviations_of(one, train)
        assert train.name in deviation
        assert f"{train.n:,}" in deviation


@pytest.mark.parametrize("iterations", [1, 2, 3, 7, 100, 12_345])
def test_a_shorter_training_has_milestones_and_warm_up_in_proportion(iterations: int) -> None:
    """Those that the config computes are no deviations of their own."""
    one = evaluation(
        **{
            **CARD,
            "iterations": iterations,
            "milestones": scaled_whole([18_000, 22_000], 24_000, iterations),
            "warmup": scaled(100, 24_000, iterations),
        }
    )
    (deviation,) = deviations_of(one, published_set())
    assert f"iterations {iterations}" in deviation


def test_padding_is_compared_with_the_published_pairs() -> None:
    one = evaluation(**{**CARD, "images_per_gpu": 1, "images_per_forward": 1})
    padded = [each for each in one.deviations(24_000) if "padded" in each]
    assert len(padded) == 1
    assert "of 1, and of 2 as published" in padded[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": 0}, "gamma is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup_from": 2}, "warmup_from is 2"),
        ({"milestones": [5, 3]}, "milestones is"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"eval.voc0712_detection.{words}"):
        evaluation(**changes)


def find_all(self: Any, network: Any, images: Any, context: Context) -> Iterator[Detections]:
    """Finds what is annotated."""
    for image in images:
        n = len(image.objects)
        boxes = torch.from_numpy(image.objects.boxes)
        classes = torch.from_numpy(image.objects.classes)
        yield Detections(boxes=boxes, scores=torch.ones(n), classes=classes)


def test_objects_of_images_that_can_not_be_read_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Voc0712Detection, "detect", find_all)
    # Images 1 and 3 are of the second class, as is 5, which is difficult.
    whole, broken = (
        {score.metric: score for score in evaluation(iterations=1).run(where)}
        for where in (given_broken(tmp_path), given_broken(tmp_path, 1))
    )
    assert {score.n for score in whole.values()} == {7}
    assert {score.n for score in broken.values()} == {6}
    assert whole["ap50_green"].value == whole["ap50_red"].value == 100
    # At recalls of 0 to .5 precision is 1, and beyond it is 0.
    assert broken["ap50_green"].value == pytest.approx(100 * 6 / 11)
    assert broken["ap50_red"].value == 100
    (deviation,) = set(broken["ap50"].deviations) - set(whole["ap50"].deviations)
    assert "1 of 7 test images" in deviation


def test_images_with_a_wrong_annotation_are_not_tested(tmp_path: Path) -> None:
    scores = list(evaluation(iterations=1).run(given_broken(tmp_path, 1, wrong=(4,))))
    assert {score.n for score in scores} == {5}
    # Which objects the wrong annotation should have had is not known, so none counts as missed.
    named = [text for text in scores[0].deviations if "of 7 test images" in text]
    assert [text.split(" of 7 ")[0] for text in named] == ["objects of 1", "without 1"]


@pytest.mark.parametrize("reference", ["mmdet", "detectron2"])
def test_images_without_an_object_that_is_trained_on_are_refused(reference: str) -> None:
    one = evaluation(reference=reference)
    held_out = Rectangles(n=7, split="test")
    difficult = Odd(n=12, all_difficult=True)
    crowds = Rectangles(n=12, crowd=tuple(range(12)))
    few = Odd(n=12, crowd=tuple(range(11)))
    one.check(Splits(train=few if reference == "detectron2" else Odd(n=12), held_out=held_out))
    refused = [crowds]
    if reference == "mmdet":
        # The other reference trains on difficult objects.
        refused += [difficult, few]
    else:
        one.check(Splits(train=difficult, held_out=held_out))
    for train in refused:
        with pytest.raises(DataError, match="rectangles trainval has no object"):
            one.check(Splits(train=train, held_out=held_out))


def test_a_test_of_no_image_that_can_be_read_has_no_score(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 7 images of rectangles test"):
        list(evaluation(iterations=1).run(given_broken(tmp_path, *range(7))))


def test_a_test_without_an_object_that_counts_is_refused_before_the_training() -> None:
    for changes in ({"all_difficult": True}, {"crowd": tuple(range(7))}, {"n": 0}):
        held_out = Odd(**{"n": 7, "split": "test", **changes})
        with pytest.raises(DataError, match="rectangles test has no object"):
            evaluation().check(Splits(train=Rectangles(n=12), held_out=held_out))


def test_boxes_of_the_other_reference_are_refused(tmp_path: Path) -> None:
    splits = voc_detection(
        root=str(write_voc(tmp_path)),
        years=[2007, 2012],
        train="trainval",
        held_out="test",
        held_out_year=2007,
        reference="mmdet",
    )
    evaluation().check(splits)
    with pytest.raises(UsageError, match=r"data.source.reference is mmdet"):
        evaluation(reference="detectron2").check(splits)


@pytest.mark.slow
def test_it_learns_to_find_rectangles(tmp_path: Path) -> None:
    one = evaluation(
        iterations=300, milestones=[240], warmup=20, evaluate_every=300, learning_rate=0.02
    )
    images = Rectangles(n=5)
    splits = Splits(train=images, held_out=dataclasses.replace(images, split="test"))
    scores = {score.metric: score.value for score in one.run(given(tmp_path, splits=splits))}
    assert scores["ap50_area"] > 60


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
    from relloc.transfer.detections import Detections

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
