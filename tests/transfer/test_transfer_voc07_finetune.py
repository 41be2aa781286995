"""Fine-tuned classification of VOC2007: its loss, groups, rescaling, test, and small trainings."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import unpack_real_images
from contexts import context
from PIL import Image
from resumed import Saved, check_resumed
from sklearn.metrics import average_precision_score
from torch import nn

from relloc.data.image_set import Splits
from relloc.data.lists import voc
from relloc.data.views import RandomSquare
from relloc.errors import UsageError
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.results import Score
from relloc.transfer import voc07_finetune
from relloc.transfer.alexnet import FineTunedAlexNet
from relloc.transfer.classifier import Classifier
from relloc.transfer.iterations import ForwardSamples
from relloc.transfer.metrics.class_answers import draw_ap_by_class, draw_examples
from relloc.transfer.rescaling import rates_of_change
from relloc.transfer.voc07_finetune import MakeCrops, Voc07Finetune, multi_label_loss

CPU = torch.device("cpu")
RED, GREEN = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colored:
    """Noise in which red, green or both are strong, which are its classes."""

    rows: Sequence[tuple[int, int]]
    split: str = "trainval"
    name: str = "colored"
    labels: None = None
    classes: tuple[str, ...] = ("red", "green")

    def __len__(self) -> int:
        return len(self.rows)

    def presence(self) -> list[list[int]]:
        return [list(row) for row in self.rows]

    def read(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(0, 100, (80, 90, 3), dtype=np.uint8)
        for channel in (RED, GREEN):
            pixels[:, :, channel] += 120 * (self.rows[index][channel] >= 0)
        return Image.fromarray(pixels)

    def source(self, index: int) -> str:
        return f"{self.split} {index}"

    def digest(self) -> str:
        return "0"


ROWS = [(1, -1), (-1, 1), (1, 1), (-1, -1)] * 6


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures go below the working directory, where no test says otherwise."""
    monkeypatch.chdir(tmp_path)


def small_splits() -> Splits:
    return Splits(train=Colored(rows=ROWS), held_out=Colored(rows=ROWS[:9], split="test"))


def evaluation(**changes: Any) -> Voc07Finetune:
    settings: dict[str, Any] = {
        "iterations": 40,
        "batch": 8,
        "images_per_forward": None,
        "learning_rate": 0.02,
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "evaluate_every": 20,
        "trained": "all layers",
        "rescale": None,
        "view": RandomSquare(crop_px=64),
        "crops": 3,
        "clip_norm": 10.0,
        "milestones": [30],
        "gamma": 0.5,
    }
    return Voc07Finetune(**{**settings, **changes})


@pytest.mark.parametrize("milestones", [[30, 20], [10, 10]])
def test_milestones_that_do_not_rise_are_refused(milestones: list[int]) -> None:
    with pytest.raises(UsageError, match=r"eval\.voc07_finetune\.milestones is \["):
        evaluation(milestones=milestones)


def given(**changes: Any) -> Context:
    return context(**{"splits": small_splits(), **changes})


@functools.cache
def alexnet() -> AlexNetBackbone:
    """The same one for all tests, as its weights take seconds to draw; networks copy it."""
    torch.manual_seed(0)
    return AlexNetBackbone().eval()


def test_the_loss_is_a_sum_over_classes_without_difficult_ones() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], requires_grad=True)
    presence = torch.tensor([[1, -1, 0], [-1, 0, 1]])
    expected = 0.0
    for row, truths in zip(logits.tolist(), presence.tolist(), strict=True):
        for logit, truth in zip(row, truths, strict=True):
            if truth:
                share = 1 / (1 + math.exp(-logit))
                expected -= math.log(share if truth == 1 else 1 - share)
    loss = multi_label_loss(logits, presence)
    assert float(loss.detach()) == pytest.approx(expected / 2)
    loss.backward()
    assert logits.grad is not None
    assert [logits.grad[0, 2], logits.grad[1, 1]] == [0, 0]


@pytest.mark.parametrize(("trained", "frozen"), [("all layers", False), ("fc6-8", True)])
def test_biases_learn_at_twice_the_rate_and_frozen_layers_are_left_out(
    trained: str, frozen: bool
) -> None:
    network = FineTunedAlexNet(alexnet(), 2, seed=0)
    weights, biases = evaluation(trained=trained).parameter_groups(network)
    assert biases["lr"] == 2 * 0.02
    assert "lr" not in weights
    n_layers = 4 if frozen else 9
    assert (len(weights["params"]), len(biases["params"])) == (n_layers, n_layers)
    assert all(parameter.dim() > 1 for parameter in weights["params"])
    in_groups = {id(parameter) for group in (weights, biases) for parameter in group["params"]}
    assert frozen is not any(id(parameter) in in_groups for parameter in network.trunk.parameters())


def test_the_network_of_the_paper_is_rescaled_and_its_last_layer_drawn_again() -> None:
    view = RandomSquare(crop_px=96)
    rescaled = evaluation(view=view).make_network(given(backbone=alexnet()))
    plain = evaluation(view=view, rescale=False).make_network(given(backbone=alexnet()))
    assert isinstance(rescaled, FineTunedAlexNet)
    assert isinstance(plain, FineTunedAlexNet)
    images = torch.randn(16, 3, 96, 96)
    spreads = []
    for network in (plain, rescaled):
        rates = list(rates_of_change(network.eval(), images, seed=0).values())
        # fc8 is not as it was when layers were rescaled.
        spreads.append(max(rates[:-1]) / min(rates[:-1]))
    # Other images and another gradient than those of the rescaling.
    assert 8 * spreads[1] < spreads[0]
    ratio = rescaled.trunk[0][0].weight / plain.trunk[0][0].weight
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert float(rescaled.new_layers()[-1].weight.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_a_network_with_batch_norm_is_not_rescaled() -> None:
    network = evaluation().make_network(given())
    assert isinstance(network, Classifier)
    assert network.head.bias.tolist() == pytest.approx([0.1, 0.1])
    with pytest.raises(UsageError, match=r"rescale is true.*SmallBackbone"):
        evaluation(rescale=True).make_network(given())


@pytest.mark.parametrize("trained", ["all layers", "fc6-8"])
def test_it_learns_which_colors_are_there(trained: str) -> None:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    losses: list[float] = []
    given_context = given(
        backbone=backbone,
        log=lambda numbers, step: losses.extend([numbers["loss"]] if "loss" in numbers else []),
    )
    one = evaluation(trained=trained, iterations=160, milestones=[120], learning_rate=0.05)
    scores = {score.metric: score for score in one.run(given_context)}
    assert set(scores) == {"map", "map_area", "map_1crop"}
    headline = scores["map"]
    # Of nine images an untrained layer may order many by luck; that losses fall is no luck.
    assert headline.value > 75
    assert losses[-1] < 0.9 * losses[0]
    assert (headline.headline, headline.column, headline.variant) == (True, trained, "")
    assert headline.n == 9
    assert any("linear layer" in deviation for deviation in headline.deviations)
    assert any("64 px" in deviation for deviation in headline.deviations)
    assert scores["map_1crop"].table == ""
    trains_norm = any("batch norm" in detail for detail in headline.details)
    assert trains_norm == (trained == "all layers")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_average_precisions_and_the_strongest_answers_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def keep_bars(precisions: Any, counts: Any, path: Path, *, title: str) -> None:
        drawn.update(precisions=precisions, counts=counts, title=title)
        draw_ap_by_class(precisions, counts, path, title=title)

    def keep_examples(examples: Any, images: Any, path: Path, *, title: str) -> None:
        drawn.update(examples=examples, images=images)
        draw_examples(examples, images, path, title=title)

    monkeypatch.setattr(voc07_finetune, "draw_ap_by_class", keep_bars)
    monkeypatch.setattr(voc07_finetune, "draw_examples", keep_examples)
    # Difficult in the first test image, which says nothing of red.
    test = Colored(rows=[(0, -1), *ROWS[:8]], split="test")
    splits = Splits(train=Colored(rows=ROWS), held_out=test)
    scores = list(evaluation().run(given(splits=splits, folder=tmp_path / "pictures")))
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"ap_by_class.png", "examples.png"}
    assert drawn["counts"] == {"red": 4, "green": 4}
    mean = 100 * sum(drawn["precisions"].values()) / 2
    assert mean == pytest.approx(scores[0].value)
    assert f"{mean:.2f}" in drawn["title"]
    assert drawn["images"] is test
    presence = np.array(test.presence())
    for number, name in enumerate(("red", "green")):
        examples = drawn["examples"][name]
        for example, expected in (
            (examples.found, 1),
            (examples.missed, 1),
            (examples.false, -1),
        ):
            assert presence[example.image, number] == expected
        assert examples.found.probability >= examples.missed.probability


def test_layers_that_are_not_trained_stay_with_their_batch_norm() -> None:
    networks: list[nn.Module] = []

    class Kept(Voc07Finetune):
        def make_network(self, context: Context) -> nn.Module:
            networks.append(super().make_network(context))
            return networks[-1]

    settings = {f.name: getattr(evaluation(), f.name) for f in dataclasses.fields(Voc07Finetune)}
    del settings["images_per_gpu"]
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()
    list(Kept(**{**settings, "trained": "fc6-8", "iterations": 3}).run(given(backbone=backbone)))
    (network,) = networks
    assert isinstance(network, Classifier)
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name]), name


def losses_of(one: Voc07Finetune) -> list[float]:
    """The losses of a training of a small backbone, as its curve has them."""
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()
    losses = []

    def log(numbers: Mapping[str, float], _step: int) -> None:
        if "loss" in numbers:
            losses.append(numbers["loss"])

    list(one.run(given(backbone=backbone, log=log)))
    return losses


def test_accumulation_changes_nothing_where_no_batch_norm_is_trained() -> None:
    settings: dict[str, Any] = {"trained": "fc6-8", "iterations": 6, "evaluate_every": 2}
    whole = losses_of(evaluation(**settings))
    assert len(whole) == 3
    assert losses_of(evaluation(**settings, images_per_forward=3)) == pytest.approx(whole, rel=1e-4)


def test_accumulation_changes_nothing_where_dropout_draws() -> None:
    network = FineTunedAlexNet(alexnet(), 2, seed=0)
    one = evaluation(view=RandomSquare(crop_px=96))
    make = one.make_sample(small_splits().train)
    samples = [make(index, 10 + index) for index in range(4)]
    gradients = []
    for size in (4, 2, 1):
        network.zero_grad()
        for start in range(0, 4, size):
            of_forward = samples[start : start + size]
            forward = ForwardSamples(samples=of_forward, groups=[0] * len(of_forward))
            part = one.batch_of(forward, CPU)
            (one.loss(network, part) * size / 4).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])  # type: ignore[union-attr]
    whole, *parted = gradients
    for parts in parted:
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_killed_training_of_the_papers_network_goes_on_to_the_same_bits() -> None:
    # Its dropout, rescaling and redrawn layer are all that is random beside images and views.
    one = evaluation(iterations=4, batch=4, evaluate_every=2, view=RandomSquare(crop_px=96))

    def run(state: Saved) -> list[Score]:
        return list(one.run(given(backbone=alexnet(), state=state)))

    assert check_resumed(run, first_save=2)


def test_gradients_beyond_the_limit_are_scaled_down() -> None:
    settings: dict[str, Any] = {"trained": "fc6-8", "iterations": 2, "evaluate_every": 1}
    first, limited = losses_of(evaluation(**settings, clip_norm=1e-9))
    # Nothing has moved, so that the loss differs by the images of the second step alone.
    assert limited == pytest.approx(first, rel=0.05)
    _, free = losses_of(evaluation(**settings, learning_rate=10.0, clip_norm=1e9))
    assert abs(free - limited) > 0.2


def test_ten_crops_are_averaged_and_map_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(40, 10, 2))).float()
    presence = torch.from_numpy(rng.choice([-1, -1, 0, 1], size=(40, 2)))
    found = evaluation()._precisions(logits, presence)
    for name, answers in (("map", logits.mean(1)), ("map_1crop", logits[:, 0])):
        expected = []
        for column in range(2):
            counted = presence[:, column] != 0
            truth = presence[counted, column] == 1
            expected.append(average_precision_score(truth, answers[counted, column]))
        assert found[name] == pytest.approx(np.mean(expected), abs=1e-6)


def test_crops_of_an_image_differ_and_depend_on_its_seed_alone() -> None:
    make = MakeCrops(images=Colored(rows=ROWS), view=RandomSquare(crop_px=32), crops=4)
    one, same, other = make(3, 5), make(3, 5), make(3, 6)
    assert one.pixels.shape == (4, 32, 32, 3)
    assert np.array_equal(one.pixels, same.pixels)
    assert not np.array_equal(one.pixels, other.pixels)
    assert not np.array_equal(one.pixels[0], one.pixels[1])


def test_a_class_without_images_is_left_out_and_named() -> None:
    train = Colored(rows=[(1, -1), (-1, -1)] * 8)
    splits = Splits(train=train, held_out=Colored(rows=ROWS[:9], split="test"))
    headline = next(iter(evaluation(iterations=2).run(given(splits=splits))))
    assert any("without green" in deviation for deviation in headline.deviations)
    none = Splits(train=Colored(rows=[(-1, -1)] * 8), held_out=Colored(rows=ROWS[:9]))
    with pytest.raises(UsageError, match=r"eval\.voc07_finetune"):
        evaluation().check(none)


PUBLISHED: dict[str, Any] = {
    "iterations": 80_000,
    "batch": 16,
    "learning_rate": 0.001,
    "view": RandomSquare(crop_px=227),
    "crops": 10,
    "milestones": list(range(10_000, 80_000, 10_000)),
}


def deviations_of(one: Voc07Finetune, train: Colored) -> list[str]:
    splits = Splits(train=train, held_out=Colored(rows=ROWS[:9], split="test"))
    every_class = torch.ones(2, dtype=torch.bool)
    _network, *own = one._own_deviations(given(splits=splits), every_class)
    return [*own, *one.deviations(one.iterations)]


PUBLISHED_IMAGES = Colored(rows=[(1, -1)] * 5011, name="voc2007")


def test_the_published_training_has_no_deviations_but_those_of_the_network() -> None:
    assert deviations_of(evaluation(**PUBLISHED), PUBLISHED_IMAGES) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"milestones": [40_000]}, "[40000]"),
        ({"gamma": 0.1}, "gamma 0.1"),
        ({"clip_norm": 1.0}, "clip norm 1"),
        ({"view": RandomSquare(crop_px=227, scale=(0.5, 2.001))}, "random squares"),
    ],
)
def test_each_other_setting_is_named(changes: dict[str, Any], name: str) -> None:
    one = evaluation(**{**PUBLISHED, **changes})
    (deviation,) = deviations_of(one, PUBLISHED_IMAGES)
    assert name in deviation


def test_other_images_are_named() -> None:
    few = dataclasses.replace(PUBLISHED_IMAGES, rows=[(1, -1)] * 36)
    for train in (few, dataclasses.replace(PUBLISHED_IMAGES, name="voc2012")):
        (deviation,) = deviations_of(evaluation(**PUBLISHED), train)
        assert f"{len(train):,} images of {train.name} trainval instead of 5,011" in deviation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained": "fc7"}, r"trained is fc7"),
        ({"crops": 0}, r"crops is 0"),
        ({"clip_norm": 0}, r"clip_norm is 0"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluation(**changes)


@pytest.mark.data
def test_real_images_are_learned_by_the_network_of_the_paper(tmp_path: Path) -> None:
    root = str(unpack_real_images("voc_tiny", tmp_path))
    splits = voc(name="voc2012", root=root, year=2012, train="trainval", held_out="test")
    losses: list[float] = []
    config = EncodeConfig(batch=8, workers=2, device=CPU, precision="fp32", unreadable_share=0.0)
    given_context = context(
        splits=splits,
        backbone=alexnet(),
        encode_config=config,
        log=lambda numbers, step: losses.extend([numbers["loss"]] if "loss" in numbers else []),
    )
    one = evaluation(
        iterations=20, learning_rate=0.001, evaluate_every=5, view=RandomSquare(crop_px=96)
    )
    scores = {score.metric: score for score in one.run(given_context)}
    assert losses[-1] < losses[0]
    assert 0 < scores["map"].value < 100
    assert scores["map"].variant == "rescaled"
    assert scores["map"].n == 28
