import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relloc.geometry import PatchGrid
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.patches.color import Drop
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.held_out import accuracy, confusion, count_hits, evaluating, predict_positions
from relloc.pretext.questions import POSITIONS
from relloc.pretext.relative_location import RelativeLocation
from relloc.seeds import Use, seed_for

CPU = torch.device("cpu")
GRID = PatchGrid(patch_px=32, gap_px=2, jitter_px=3, resize=None)
PATCHES = PatchPipeline(grid=GRID, color=Drop(noise="gaussian"), normalize=ByDataset())


def random_hits(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).binomial(8, 0.4, n))


def test_accuracy_is_right_answers_over_pairs() -> None:
    result = accuracy(torch.tensor([8, 0, 4, 1]), ["a", "a", "b", "c"])
    assert result.percent == pytest.approx(100 * 13 / 32)
    assert result.n_questions == 32
    assert result.low < result.percent < result.high


def test_the_interval_of_independent_images_is_the_normal_ones() -> None:
    hits = random_hits(600)
    result = accuracy(hits, [str(i) for i in range(600)])
    error = 100 * (hits / 8).std().item() / 600**0.5
    assert result.high - result.percent == pytest.approx(1.96 * error, rel=0.1)
    assert result.percent - result.low == pytest.approx(1.96 * error, rel=0.1)


def test_the_interval_is_wider_where_images_come_from_few_sources() -> None:
    rates = np.random.default_rng(1).uniform(0.2, 0.8, 10)  # images of one source are kin
    hits = torch.from_numpy(np.random.default_rng(2).binomial(8, np.repeat(rates, 40)))
    of_sources = accuracy(hits, [f"photo{i // 40}" for i in range(400)])
    alone = accuracy(hits, [f"tile{i}" for i in range(400)])
    assert of_sources.percent == alone.percent
    assert of_sources.high - of_sources.low > 3 * (alone.high - alone.low)


def test_the_interval_covers_the_truth_as_often_as_it_says_with_ten_sources() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        rates = np.clip(rng.normal(0.3, 0.05, 10), 0, 1)
        hits = torch.from_numpy(rng.binomial(8, np.repeat(rates, 20)))
        result = accuracy(hits, [f"photo{i // 20}" for i in range(200)])
        covered += result.low <= 30 <= result.high
    assert 0.92 < covered / 400 < 0.98


def test_one_source_alone_tells_nothing_of_others() -> None:
    result = accuracy(torch.tensor([3, 5, 6]), ["a", "a", "a"])
    assert (result.low, result.high) == (0, 100)


def test_the_order_of_images_changes_nothing() -> None:
    hits, sources = random_hits(40), [f"photo{i % 7}" for i in range(40)]
    result = dataclasses.astuple(accuracy(hits, sources))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert dataclasses.astuple(
        accuracy(hits[order], [sources[i] for i in order.tolist()])
    ) == pytest.approx(result)


@pytest.fixture
def model() -> RelativeLocation:
    torch.manual_seed(0)
    head = PairHead(
        embedding_dim=8,
        hidden_dim=16,
        batch_norm_momentum=0.1,
        dropout=0.5,
        neck_std=0.5,
        head_std=0.5,
    )
    return RelativeLocation(
        SmallBackbone(widths=(8, 8, 8, 10, 8)), head, batch_norm="separate", images_per_batch_norm=4
    )


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = GRID.span_px
    return [
        torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
        for size in sizes
    ]


Asker = Callable[..., Tensor]


@pytest.fixture
def asked(model: RelativeLocation) -> Asker:
    def ask(images: list[Tensor], seed: int = 0) -> Tensor:
        return predict_positions(model, iter(images), PATCHES, seed=seed, device=CPU, bf16=False)

    return ask


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_mode_statistics_and_gradients_as_they_were(
    model: RelativeLocation, asked: Asker, training: bool
) -> None:
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    asked(batches(4))
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_each_module_gets_its_own_mode_back_even_after_an_error(model: RelativeLocation) -> None:
    model.train()
    model.backbone.stem.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert set(before) == {True, False}


@torch.no_grad()
def test_answers_are_those_of_the_model_in_eval_mode_image_by_image(
    model: RelativeLocation, asked: Asker
) -> None:
    images = batches(5, 3)
    generator = torch.Generator().manual_seed(seed_for(Use.HELD_OUT_PATCHES, 9))
    logits = [copy.deepcopy(model).eval()(PATCHES(some, generator)) for some in images]
    expected = [[int(row.argmax()) for row in image] for batch in logits for image in batch]
    model.train()
    assert asked(images, seed=9).tolist() == expected
    assert asked(images, seed=9).tolist() == expected  # nothing random is left: dropout is off
    hits = [sum(answer == label for label, answer in enumerate(image)) for image in expected]
    assert count_hits(asked(images, seed=9)).tolist() == hits
    assert set(hits) != {0}


def test_the_seed_decides_which_questions_are_asked(asked: Asker) -> None:
    images = batches(64)
    assert not torch.equal(asked(images, seed=1), asked(images, seed=2))


class Knows(nn.Module):
    """Answers every pair right, and in bfloat16 where autocast is on."""

    def forward(
        self, parts: Sequence[Tensor], _combine: object, _mask: Tensor | None = None
    ) -> Tensor:
        self.seen = torch.eye(8) @ torch.eye(8)
        return self.seen.expand(len(parts[0]), 8, 8)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_head_that_knows_gets_all_eight_of_every_image(bf16: bool, dtype: torch.dtype) -> None:
    head = Knows()
    model = RelativeLocation(
        SmallBackbone(widths=(8, 8, 8, 10, 8)), head, batch_norm="separate", images_per_batch_norm=4
    )
    answered = predict_positions(model, batches(3, 2), PATCHES, seed=0, device=CPU, bf16=bf16)
    assert answered.tolist() == [list(range(8))] * 5
    assert count_hits(answered).tolist() == [8] * 5
    assert head.seen.dtype == dtype


def random_answers(n: int) -> Tensor:
    return torch.randint(8, (n, 8), generator=torch.Generator().manual_seed(4))


def test_confusion_counts_each_answer_at_its_true_position() -> None:
    answered = random_answers(30)
    expected = [[0] * 8 for _ in range(8)]
    for image in answered.tolist():
        for position, answer in enumerate(image):
            expected[position][answer] += 1
    assert confusion(answered).tolist() == expected


def test_the_diagonal_of_the_confusion_is_the_accuracy() -> None:
    answered = random_answers(30)
    counts = confusion(answered)
    assert counts.sum(dim=1).tolist() == [30] * 8
    result = accuracy(count_hits(answered), [str(image) for image in range(30)])
    assert result.percent == pytest.approx(100 * float(counts.diagonal().sum() / counts.sum()))


def test_positions_are_named_in_the_order_of_the_labels() -> None:
    assert POSITIONS == (
        "up_left",
        "up",
        "up_right",
        "left",
        "right",
        "down_left",
        "down",
        "down_right",
    )
