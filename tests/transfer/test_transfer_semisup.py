import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import context
from PIL import Image
from resumed import Saved, killed
from torch import Tensor
from torch.nn.functional import cross_entropy

from relloc.data.image_set import Splits
from relloc.data.loader import collate
from relloc.data.subsets import stratified
from relloc.data.views import Center, RandomResized, Views
from relloc.errors import DataError, UnreadableImage
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.patches.normalize import ByDataset
from relloc.results import Score
from relloc.seeds import Use, seed_for
from relloc.transfer import semisup
from relloc.transfer.classifier import Classifier, TrainingViews, count_top_hits
from relloc.transfer.semisup import SemiSupervised

PALETTE = [
    (220, 40, 40),
    (40, 220, 40),
    (40, 40, 220),
    (220, 220, 40),
    (40, 220, 220),
    (220, 40, 220),
]
READING = EncodeConfig(
    batch=16, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=0.0
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colors:
    """Noise around the color of the class, which is therefore easy to learn."""

    split: str
    n: int
    n_classes: int = 3
    labeled: bool = True
    name: str = "colors"

    @property
    def labels(self) -> Sequence[int] | None:
        return [index % self.n_classes for index in range(self.n)] if self.labeled else None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.n_classes)))

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Image.Image:
        noise = np.random.default_rng(index).integers(-60, 60, (40, 48, 3))
        return Image.fromarray(
            (noise + PALETTE[index % self.n_classes]).clip(0, 255).astype(np.uint8)
        )

    def source(self, index: int) -> str:
        return f"{self.split}/{index}.png"

    def digest(self) -> str:
        return f"{self.split}{self.n}"


SPLITS = Splits(train=Colors(split="train", n=90), held_out=Colors(split="val", n=31))


def trunk() -> SmallBackbone:
    torch.manual_seed(0)
    return SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()


def evaluation(**changes: Any) -> SemiSupervised:
    published = {"gamma": 0.2, "momentum": 0.9, "weight_decay": 5e-4}
    small = {"epochs": 3, "milestone_epochs": [1, 2], "batch": 5, "choosing_images": 12}
    setting = {"learning_rates": [0.05], "head_multipliers": [10]}
    views = {"augment": RandomResized(crop_px=32), "view": Center(short_px=36, crop_px=32)}
    settings: dict[str, Any] = {
        "share": 0.2,
        "list_file": None,
        **published,
        **small,
        **setting,
        **views,
    }
    return SemiSupervised(**{**settings, **changes})


def scores(
    run: SemiSupervised, state: Saved | None = None, splits: Splits = SPLITS, **changes: Any
) -> list[Score]:
    given = {
        "backbone": trunk(),
        "splits": splits,
        "encode_config": READING,
        "seed": 1,
        "state": state or Saved(),
    }
    return list(run.run(context(**{**given, **changes})))


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same_bits(value, other[name])
        elif isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def plainly_tuned(run: SemiSupervised, epochs: int) -> Classifier:
    """The same training written out, with OpenSelfSup's constants in the optimizer's own terms."""
    images = stratified(SPLITS.train, run.share, seed=1)
    network = Classifier(trunk(), 3, seed=1).train()
    rate = run.learning_rates[0]
    groups = [
        {"params": list(network.backbone.parameters()), "lr": rate},
        {"params": list(network.head.parameters()), "lr": rate * run.head_multipliers[0]},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, run.milestone_epochs, gamma=0.2)
    views = Views(images, run.augment)
    for epoch in range(epochs):
        order = (
            np.random.default_rng(seed_for(Use.FINE_TUNING_ORDER, 1, epoch))
            .permutation(len(images))
            .tolist()
        )
        for start in range(0, len(order), run.batch):
            chosen = order[start : start + run.batch]
            batch = collate(
                [views[index, seed_for(Use.FINE_TUNING_VIEW, 1, epoch, index)] for index in chosen]
            )
            if len(batch.pixels) > 1:
                optimizer.zero_grad()
                target = torch.tensor(images.labels)[batch.indices]
                cross_entropy(network(ByDataset()(batch.pixels.float())), target).backward()
                optimizer.step()
        decay.step()
    return network


def test_the_network_is_trained_as_the_protocol_says() -> None:
    run = evaluation(share=0.19)  # 17 images: the last batch has two
    state = killed(lambda state: scores(run, state), 3)
    assert state.content is not None
    assert state.content["training"]["step"] == 3 * 4  # three epochs of 17 images, 5 at a time
    expected = plainly_tuned(run, 3).state_dict()
    for name, value in state.content["training"]["network"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    moved = [
        name
        for name, value in trunk().state_dict().items()
        if not torch.equal(value, expected[f"backbone.{name}"])
    ]
    assert len(moved) == len(trunk().state_dict())  # all weights, and the statistics of batch norm


def test_a_batch_of_one_is_passed_over() -> None:
    state = killed(lambda state: scores(evaluation(share=16 / 90), state))
    assert state.content is not None
    assert state.content["training"]["network"]["backbone.stem.1.num_batches_tracked"] == 3


def test_few_labels_are_enough_for_colors_and_the_given_backbone_stays() -> None:
    backbone = trunk()
    run = evaluation(share=0.4, epochs=10, milestone_epochs=[6, 8], head_multipliers=[1])
    found = scores(run, backbone=backbone)
    assert [(score.layer, score.metric, score.n) for score in found] == [("avgpool", "top1", 31)]
    assert found[0].value > 80
    assert_same_bits(dict(backbone.state_dict()), dict(trunk().state_dict()))
    assert not backbone.training


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6, 8])
def test_stopped_anywhere_it_ends_with_the_same_bits(stop: int) -> None:
    run = evaluation(learning_rates=[0.05, 0.01])
    whole, undisturbed = undisturbed_run()
    state = killed(lambda state: scores(run, state), stop)
    again = Saved(state.content)
    assert scores(run, again) == whole
    assert again.saves == undisturbed[0] - stop
    assert again.content == undisturbed[1]
    first = Saved(state.content, kill_after=1)
    if stop < 3:  # within the first setting: its weights are kept
        with pytest.raises(KeyboardInterrupt):
            scores(run, first)
        fresh = killed(lambda state: scores(run, state), stop + 1)
        assert first.content is not None
        assert fresh.content is not None
        assert_same_bits(first.content, fresh.content)


@functools.cache
def undisturbed_run() -> tuple[list[Score], tuple[int, dict[str, Any] | None]]:
    state = Saved()
    return scores(evaluation(learning_rates=[0.05, 0.01]), state), (state.saves, state.content)


def test_a_state_that_passes_over_calls_is_gone_on_from_as_well() -> None:
    run = evaluation(learning_rates=[0.05, 0.01])
    whole, _ = undisturbed_run()
    # All epochs of the first setting; what came of it was not kept.
    state = killed(lambda state: scores(run, state), 3)
    assert scores(run, Saved(state.content)) == whole


def test_a_state_is_loaded_once_however_many_settings_follow() -> None:
    run = evaluation(learning_rates=[0.05, 0.01], epochs=1, milestone_epochs=[])
    state = killed(lambda state: scores(run, state))
    again = Saved(state.content)
    scores(run, again)
    assert again.loads == 1


def test_of_several_settings_one_is_chosen_without_val_and_one_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = iter(
        [[10, 20, 31], [9, 11, 12], [25, 30, 31], [5, 11, 12], [12, 13, 31], [9, 10, 12]]
    )  # val, others, ...
    monkeypatch.setattr(semisup, "count_top_hits", lambda *_given: next(asked))
    colors = Splits(
        train=Colors(split="train", n=90, n_classes=6),
        held_out=Colors(split="val", n=31, n_classes=6),
    )
    run = evaluation(
        epochs=1, milestone_epochs=[], learning_rates=[0.001, 0.01, 0.1], head_multipliers=[1]
    )
    found = {score.metric: score for score in scores(run, splits=colors)}
    hits = {metric: round(score.value * 31 / 100) for metric, score in found.items()}
    assert hits == {"top1": 25, "top5": 30, "top1_tuned": 10, "top5_tuned": 20}
    assert "lr 0.001, of the head x1, one of 3 settings" in found["top5_tuned"].details
    assert found["top5_tuned"].choice == "chosen on 12 other training images"
    assert "lr 0.01, of the head x1, one of 3 settings" in found["top1"].details
    assert "on the images it is reported on" in found["top1"].choice
    assert {score.metric for score in found.values() if score.variant} == {
        "top1_tuned",
        "top5_tuned",
    }
    assert {score.column for score in found.values()} == {"20 % top-1", "20 % top-5"}
    assert [score.metric for score in found.values() if score.headline] == ["top1"]


def test_a_setting_that_diverged_comes_last_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([[31, 31], [12, 12], [10, 31], [3, 12], [9, 31], [4, 12]])
    monkeypatch.setattr(semisup, "count_top_hits", lambda *_given: next(asked))
    monkeypatch.setattr(semisup, "TOP", (1,))
    state = Saved()
    run = evaluation(milestone_epochs=[], learning_rates=[1e30, 0.05, 0.01], head_multipliers=[1])
    found = {score.metric: score for score in scores(run, state)}
    assert (
        state.saves == 0 + 3 + 3 + 3
    )  # not trained further once it had diverged; then one for each setting
    assert {metric: round(score.value * 31 / 100) for metric, score in found.items()} == {
        "top1": 10,
        "top1_tuned": 9,
    }
    for score in found.values():
        assert "diverged and ranked last: lr 1e+30, of the head x1" in score.details


def test_where_all_diverged_that_is_said_also_after_a_stop() -> None:
    run = evaluation(learning_rates=[1e30], head_multipliers=[1])
    stopped = killed(lambda state: scores(run, state))
    for state in (Saved(), Saved(stopped.content)):
        (score,) = scores(run, state)
        assert "diverged: loss or weights are not finite" in score.details
        assert state.content == {"outcomes": [{"finite": False, "tallies": [[11, 31, 31]]}]}
    assert "diverged" not in " ".join(scores(evaluation(epochs=1, milestone_epochs=[]))[0].details)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Colors):
    """Images of which every `every`-th can't be read."""

    every: int = 5

    def read(self, index: int) -> Image.Image:
        if index % self.every == 0:
            raise UnreadableImage("cut off")
        return super().read(index)


def test_images_that_can_not_be_read_are_told_of_all_that_were_asked_for() -> None:
    splits = Splits(train=Broken(split="train", n=90), held_out=Broken(split="val", n=31))
    noted: dict[str, str] = {}
    reading = dataclasses.replace(READING, unreadable_share=0.9, note_unreadable=noted.update)
    run = evaluation(epochs=1, milestone_epochs=[], learning_rates=[0.05, 0.01])
    found = scores(run, splits=splits, encode_config=reading)
    assert {score.n for score in found} == {24}
    taken = stratified(splits.train, 0.2, seed=1)
    broken = {f"val/{index}.png" for index in range(0, 31, 5)}
    broken |= {taken.source(index) for index in range(len(taken)) if taken.indices[index] % 5 == 0}
    assert broken <= set(noted)
    assert set(noted.values()) == {"cut off"}
    assert len(noted) > len(broken)  # those that choose the setting, too


def test_without_two_images_to_train_on_or_one_to_ask_about_nothing_is_reported() -> None:
    gone, there = Broken(split="train", n=90, every=1), SPLITS.train
    reading = dataclasses.replace(READING, unreadable_share=1.0)
    run = evaluation(epochs=1, milestone_epochs=[])
    with pytest.raises(DataError, match=r"\bcolors, lr 0\.05.*\b2 or more images"):
        scores(run, splits=Splits(train=gone, held_out=there), encode_config=reading)
    with pytest.raises(DataError, match=r"none .*\bcolors train\b"):
        scores(run, splits=Splits(train=there, held_out=gone), encode_config=reading)


def test_the_protocol_names_images_and_constants() -> None:
    score = scores(evaluation(epochs=1, milestone_epochs=[]))[0]
    chosen = stratified(SPLITS.train, 0.2, seed=1)
    images, *constants, views = score.details
    assert (
        images == "fine-tuned on 18 labeled images "
        f"(0.2 of each class by seed 1, hash {chosen.list_hash()})"
    )
    assert constants == [
        *("lr 0.05, of the head x10", "momentum 0.9", "weight decay 0.0005", "1 epoch", "batch 5"),
        "batch norm trained",
    ]
    assert "random resized crops of 32 px" in views
    assert score.choice == ""
    assert score.deviations == (
        "the list is ours, not SimCLR's",
        "1 setting tried, published is the best of 9",
    )
    run = evaluation(
        epochs=1, milestone_epochs=[], learning_rates=[0.1, 0.2, 0.3], head_multipliers=[1, 2, 3]
    )
    assert "tried, published" not in " ".join(run._deviations())
    assert "3 epochs, x0.2 at 1, 2" in evaluation()._details(
        chosen, 1, [{"finite": True, "tallies": []}], 0
    )


def test_a_given_list_decides_and_is_part_of_what_the_evaluation_is(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("".join(f"{index}.png\n" for index in range(12)))
    run = evaluation(list_file=str(path), epochs=1, milestone_epochs=[])
    score = scores(run)[0]
    assert score.details[0].startswith("fine-tuned on 12 labeled images (list 1percent.txt, hash ")
    assert "the list is ours" not in " ".join(score.deviations)
    path.write_text("0.png\n1.png\n")
    assert repr(evaluation(list_file=str(path), epochs=1, milestone_epochs=[])) != repr(run)
    with pytest.raises(DataError, match="nowhere.txt can't be read"):
        evaluation(list_file=str(tmp_path / "nowhere.txt"))


def test_hits_are_counted_on_still_views() -> None:
    network = Classifier(trunk(), 6, seed=0)
    images = Colors(split="val", n=31, n_classes=6)
    view = Center(short_px=36, crop_px=32)
    first, five, n = count_top_hits(network, images, view, READING)
    pixels = collate([Views(images, view)[index, 0] for index in range(31)]).pixels
    with torch.no_grad():
        ranked = network.eval()(ByDataset()(pixels.float())).argsort(dim=1, descending=True)
    right = ranked == torch.tensor(images.labels).unsqueeze(1)
    assert (first, five, n) == (int(right[:, 0].sum()), int(right[:, :5].sum()), 31)


def test_a_batch_of_which_nothing_could_be_read_changes_nothing() -> None:
    network = Classifier(trunk(), 3, seed=0)
    view = RandomResized(crop_px=32)
    views = TrainingViews(images=SPLITS.train, view=view, batch=4, encode_config=READING, seed=0)
    views.loss(network, collate([])).backward()
    assert all(
        float(value.grad.abs().max()) == 0
        for value in network.parameters()
        if value.grad is not None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, r"eval\.semisup\.share is 0\.0: .* above 0 .*\b1 or less"),
        ({"share": 1.5}, r"eval\.semisup\.share is 1\.5: .* above 0"),
        ({"share": "x"}, r"eval\.semisup\.share is x: .* above 0"),
        ({"list_file": 5}, r"eval\.semisup\.list_file is 5: .*\bfile\b.*\bnull\b"),
        ({"learning_rates": []}, r"eval\.semisup\.learning_rates is \[\]: .* above 0"),
        ({"learning_rates": 0.1}, r"eval\.semisup\.learning_rates is 0\.1: .*\[0\.1\]"),
        ({"head_multipliers": ["x"]}, r"eval\.semisup\.head_multipliers is \['x'\]: .* above 0"),
        ({"epochs": 0}, r"eval\.semisup\.epochs is 0: .* 1 or more"),
        ({"batch": 1}, r"eval\.semisup\.batch is 1: .*batch norm"),
        ({"batch": 2.5}, r"eval\.semisup\.batch is 2\.5: .*whole number"),
        (
            {"milestone_epochs": [3, 3]},
            r"eval\.semisup\.milestone_epochs is \[3, 3\]: .*increasing",
        ),
        ({"choosing_images": 0}, r"eval\.semisup\.choosing_images is 0: .* 1 or more"),
    ],
)
def test_constants_that_train_nothing_or_make_no_sense_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    one = evaluation()
    for name, value in changes.items():  # in a test, wrong types are not let into a constructor
        object.__setattr__(one, name, value)
    with pytest.raises(ValueError, match=f"^{message}"):
        one.__post_init__()


def test_mistakes_are_told() -> None:
    with pytest.raises(DataError, match=r"\bno images\b.*\bshare\b"):
        scores(evaluation(share=1.0, learning_rates=[0.1, 0.2]))
    unlabeled = Splits(
        train=Colors(split="train", n=90, labeled=False), held_out=Colors(split="val", n=9)
    )
    with pytest.raises(DataError, match="colors train .*no labels"):
        scores(evaluation(), splits=unlabeled)


def test_whole_batches_are_compiled_and_others_are_not() -> None:
    sizes = []

    def compiled(function: Any) -> Any:
        def call(network: Classifier, images: Tensor, labels: Tensor) -> Tensor:
            sizes.append(len(images))
            return function(network, images, labels)

        return call

    view = RandomResized(crop_px=32)
    config = dataclasses.replace(READING, compile=compiled)
    views = TrainingViews(images=SPLITS.train, view=view, batch=4, encode_config=config, seed=0)
    network = Classifier(trunk(), len(SPLITS.train.classes), seed=0)
    loss = views.loss_function(network)
    for n_images in (4, 3, 0):
        batch = collate([Views(SPLITS.train, view)[index, 0] for index in range(n_images)])
        torch.testing.assert_close(loss(batch), views.loss(network, batch), equal_nan=True)
    assert sizes == [4]
