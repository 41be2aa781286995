"""The base class of detectors and segmenters, by a network that learns the mean color of images."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contexts import context
from PIL import Image
from resumed import Saved, killed
from torch import Tensor, nn

from relloc.data.image_set import ImageSet, Splits
from relloc.data.samples import MakeSample
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.results import Score
from relloc.transfer.iterations import ForwardSamples, IterativeFineTuning
from relloc.transfer.schedule import Milestones, Schedule

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gray:
    """Images of two sizes, each of one gray level."""

    n: int
    split: str = "train"
    name: str = "gray"
    broken: tuple[int, ...] = ()
    labels: None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImage("it is broken")
        return Image.new("RGB", (6, 4 + index % 2), (20 * index,) * 3)

    def source(self, index: int) -> str:
        return f"gray {index}"

    def digest(self) -> str:
        return "0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeGray:
    """A sample: the gray level of the image, and noise from the seed."""

    images: ImageSet

    def __call__(self, index: int, seed: int) -> tuple[float, float]:
        level = np.asarray(self.images.read(index)).mean() / 255
        return float(level), np.random.default_rng(seed).normal()


class Mean(nn.Module):
    """A linear function of two inputs, and a batch norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnGray(IterativeFineTuning):
    version = 1
    published: ClassVar = {"iterations": 40, "batch": 4, "learning_rate": 0.1}

    view: str = "as it is"
    freeze_norm: bool = False
    n_used: int | None = None
    tests: list[int] = dataclasses.field(default_factory=list, repr=False)
    seen: list[list[Any]] = dataclasses.field(default_factory=list, repr=False)
    groups: list[list[int]] = dataclasses.field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.check_settings("eval.gray")

    def make_network(self, context: Context) -> nn.Module:
        torch.manual_seed(context.seed)
        network = Mean()
        if self.freeze_norm:
            network.norm.momentum = 0.0
        return network

    def schedule(self, length: int) -> Schedule:
        return Milestones(milestones=[30], gamma=0.1, warmup=4, warmup_from=0.1)

    def training_indices(self, images: ImageSet) -> Sequence[int]:
        return range(len(images) if self.n_used is None else self.n_used)

    def kind_of(self, images: ImageSet, index: int) -> Hashable:
        return index % 2

    def make_sample(self, images: ImageSet) -> MakeSample[Any]:
        return MakeGray(images=images)

    def batch_of(self, forward: ForwardSamples[Any], device: torch.device) -> Tensor:
        self.seen.append(list(forward.samples))
        self.groups.append(list(forward.groups))
        return torch.tensor(forward.samples)

    def before_forward(self, network: nn.Module) -> None:
        if self.freeze_norm:
            network.norm.eval()  # type: ignore[union-attr]

    def loss(self, network: nn.Module, batch: Tensor) -> Tensor:
        return (network(batch)[:, 0] - batch[:, 0]).square().mean()

    def test(self, network: nn.Module, context: Context, *, final: bool) -> list[Score]:
        self.tests.append(len(self.seen))
        network.eval()
        error = float(network(torch.tensor([[0.5, 0.0]])).detach())
        return [Score(metric="answer", value=error, n=len(context.splits.held_out))]


def evaluation(**changes: Any) -> LearnGray:
    settings: dict[str, Any] = {
        "iterations": 40,
        "batch": 4,
        "images_per_gpu": 2,
        "images_per_forward": None,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "evaluate_every": 10,
    }
    return LearnGray(**{**settings, **changes})


def given(train: Gray | None = None, **changes: Any) -> Context:
    splits = Splits(train=train or Gray(n=9), held_out=Gray(n=3, split="val"))
    return context(splits=splits, **changes)


def test_it_trains_and_tests_every_so_often_and_writes_curves() -> None:
    curves: dict[str, list[int]] = {}

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name in numbers:
            curves.setdefault(name, []).append(step)

    one = evaluation()
    (score,) = one.run(given(log=log))
    assert one.tests == [10, 20, 30, 40]
    assert curves == {name: [10, 20, 30, 40] for name in ("loss", "lr", "answer")}
    assert score.metric == "answer"
    assert score.deviations == ()
    assert any("40 iterations of 4 images" in detail for detail in score.details)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 20}, "iterations 20 instead of 40"),
        ({"batch": 2}, "batch 2 instead of 4"),
        ({"learning_rate": 0.05}, "learning rate 0.05 instead of 0.1"),
    ],
)
def test_a_training_that_differs_from_the_published_one_says_so(
    changes: dict[str, Any], words: str
) -> None:
    (score,) = evaluation(**changes).run(given())
    assert score.deviations == (words,)


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_killed_training_that_goes_on_ends_with_the_same_bits(saves: int) -> None:
    (expected,) = evaluation().run(given())
    state = killed(lambda state: list(evaluation().run(given(state=state))), saves)
    (found,) = evaluation().run(given(state=Saved(state.content)))
    assert found == expected


def test_samples_and_their_noise_do_not_depend_on_accumulation() -> None:
    whole, parts = (evaluation(images_per_forward=images, freeze_norm=True) for images in (None, 2))
    (expected,), (found,) = (one.run(given()) for one in (whole, parts))
    assert [len(samples) for samples in whole.seen] == [4] * 40
    assert [len(samples) for samples in parts.seen] == [2] * 80
    pairs = zip(parts.seen[::2], parts.seen[1::2], strict=True)
    assert [first + second for first, second in pairs] == whole.seen
    # The gradient of the whole is the mean of those of its parts.
    assert found.value == pytest.approx(expected.value, abs=1e-5)


@pytest.mark.parametrize(
    ("images_per_forward", "words"), [(None, "the 8 images"), (6, "the 4 images"), (2, "the 2 im")]
)
def test_results_tell_the_images_of_a_forward(images_per_forward: int | None, words: str) -> None:
    one = evaluation(batch=8, images_per_forward=images_per_forward)
    (score,) = one.run(given())
    assert any(words in detail for detail in score.details)
    assert {len(samples) for samples in one.seen} == {one.forward_images()[1]}


def test_forwards_of_two_sizes_are_told_as_a_range() -> None:
    one = evaluation(batch=16, images_per_forward=6)
    (score,) = one.run(given())
    assert {len(samples) for samples in one.seen} == {4, 6}
    assert one.forward_images() == (4, 6)
    assert any("the 4 to 6 images" in detail for detail in score.details)


def test_images_of_a_group_are_of_one_kind() -> None:
    one = evaluation(images_per_forward=2)
    list(one.run(given()))
    # Levels are 20 times the index, and kinds the parity of the index
    for samples in one.seen:
        assert len({round(level * 255 / 20) % 2 for level, _ in samples}) == 1


def test_an_image_that_can_not_be_read_is_left_out_and_counted() -> None:
    config = EncodeConfig(batch=4, workers=0, device=CPU, precision="fp32", unreadable_share=0.2)
    one = evaluation(freeze_norm=True)
    list(one.run(given(Gray(n=9, broken=(4,)), encode_config=config)))
    assert {len(samples) for samples in one.seen} >= {3, 4}
    strict = dataclasses.replace(config, unreadable_share=0.1)
    with pytest.raises(DataError, match=r"gray 4: it is broken"):
        list(evaluation().run(given(Gray(n=9, broken=(4,)), encode_config=strict)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_image_leaves_the_others_in_their_groups(workers: int) -> None:
    config = EncodeConfig(
        batch=4, workers=workers, device=CPU, precision="fp32", unreadable_share=0.2
    )
    one = evaluation(freeze_norm=True)
    list(one.run(given(Gray(n=9, broken=(4,)), encode_config=config)))
    for samples, groups in zip(one.seen, one.groups, strict=True):
        # Images of a group are of one kind, which is the parity of the index.
        kinds: dict[int, set[int]] = {}
        for (level, _), group in zip(samples, groups, strict=True):
            kinds.setdefault(group, set()).add(round(level * 255 / 20) % 2)
        assert all(len(of_group) == 1 for of_group in kinds.values())
    assert {tuple(groups) for groups in one.groups} >= {(0, 0, 1, 1), (0, 1, 1), (0, 0, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnGrayOfOneSize(LearnGray):
    one_size = True


@pytest.mark.parametrize(("kind", "is_compiled"), [(LearnGrayOfOneSize, True), (LearnGray, False)])
def test_full_batches_of_one_size_are_compiled(kind: type[LearnGray], is_compiled: bool) -> None:
    sizes = []

    def compiled(loss: Any) -> Any:
        def call(network: nn.Module, batch: Tensor) -> Tensor:
            sizes.append(len(batch))
            return loss(network, batch)

        return call

    config = EncodeConfig(
        batch=4,
        workers=0,
        device=CPU,
        precision="fp32",
        unreadable_share=0.2,
        compile=compiled,
    )
    one = evaluation(freeze_norm=True)
    one = kind(**{field.name: getattr(one, field.name) for field in dataclasses.fields(one)})
    list(one.run(given(Gray(n=9, broken=(4,)), encode_config=config)))
    n_full = sum(len(samples) == 4 for samples in one.seen)
    assert 0 < n_full < len(one.seen)
    assert sizes == [4] * (n_full if is_compiled else 0)


def test_workers_read_the_same_samples() -> None:
    config = EncodeConfig(batch=4, workers=2, device=CPU, precision="fp32", unreadable_share=0.0)
    (expected,) = evaluation().run(given())
    (found,) = evaluation().run(given(encode_config=config))
    assert found == expected


def test_images_that_the_protocol_leaves_out_are_not_trained_on() -> None:
    one = evaluation(n_used=4)
    list(one.run(given()))
    levels = {round(level * 255 / 20) for samples in one.seen for level, _ in samples}
    assert levels == {0, 1, 2, 3}
    with pytest.raises(DataError, match="gray train"):
        evaluation(n_used=0).check(given().splits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 0}, "eval.gray.iterations is 0"),
        ({"batch": 5}, "eval.gray.batch is 5: give a multiple of 2"),
        ({"images_per_forward": 3}, "eval.gray.images_per_forward is 3"),
        ({"learning_rate": -1.0}, "eval.gray.learning_rate is -1"),
        ({"evaluate_every": 0}, "eval.gray.evaluate_every is 0"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluation(**changes)
