import copy
import dataclasses
from collections.abc import Callable

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
from relloc.pretext.held_out import accuracy, count_hits
from relloc.pretext.objective import RelativeLocation

CPU = torch.device("cpu")
GRID = PatchGrid(patch_px=32, gap_px=2, jitter_px=3, resize=None)
PATCHES = PatchPipeline(grid=GRID, color=Drop(noise="gaussian"), normalize=ByDataset())


def random_hits(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).binomial(8, 0.4, n))


def test_accuracy_is_right_answers_over_pairs() -> None:
    found = accuracy(torch.tensor([8, 0, 4, 1]), ["a", "a", "b", "c"])
    assert found.percent == pytest.approx(100 * 13 / 32)
    assert found.n_pairs == 32
    assert found.low < found.percent < found.high


def test_the_interval_of_independent_images_is_the_normal_ones() -> None:
    hits = random_hits(600)
    found = accuracy(hits, [str(i) for i in range(600)])
    error = 100 * (hits / 8).std().item() / 600**0.5
    assert found.high - found.percent == pytest.approx(1.96 * error, rel=0.1)
    assert found.percent - found.low == pytest.approx(1.96 * error, rel=0.1)


def test_the_interval_is_wider_where_images_come_from_few_sources() -> None:
    rates = np.random.default_rng(1).uniform(0.2, 0.8, 10)  # images of one source are kin
    hits = torch.from_numpy(np.random.default_rng(2).binomial(8, np.repeat(rates, 40)))
    of_sources = accuracy(hits, [f"photo{i // 40}" for i in range(400)])
    alone = accuracy(hits, [f"tile{i}" for i in range(400)])
    assert of_sources.percent == alone.percent
    assert of_sources.high - of_sources.low > 3 * (alone.high - alone.low)


def test_the_interval_covers_the_truth_as_often_as_it_says_with_ten_sources() -> None:
    chance = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        rates = np.clip(chance.normal(0.3, 0.05, 10), 0, 1)
        hits = torch.from_numpy(chance.binomial(8, np.repeat(rates, 20)))
        found = accuracy(hits, [f"photo{i // 20}" for i in range(200)])
        covered += found.low <= 30 <= found.high
    assert 0.92 < covered / 400 < 0.98


def test_one_source_alone_tells_nothing_of_others() -> None:
    found = accuracy(torch.tensor([3, 5, 6]), ["a", "a", "a"])
    assert (found.low, found.high) == (0, 100)


def test_the_order_of_images_changes_nothing() -> None:
    hits, sources = random_hits(40), [f"photo{i % 7}" for i in range(40)]
    found = dataclasses.astuple(accuracy(hits, sources))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert dataclasses.astuple(accuracy(hits[order], [sources[i] for i in order.tolist()])) == pytest.approx(found)


@pytest.fixture
def model() -> RelativeLocation:
    torch.manual_seed(0)
    head = PairHead(embedding_dim=8, hidden_dim=16, batch_norm_momentum=0.1, dropout=0.5, neck_std=0.5, head_std=0.5)
    return RelativeLocation(SmallBackbone(widths=(4, 4, 6, 8, 8)), head, batch_norm="separate")


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = GRID.span_px
    return [torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator) for size in sizes]


Counter = Callable[..., Tensor]


@pytest.fixture
def counted(model: RelativeLocation) -> Counter:
    def count(images: list[Tensor], seed: int = 0) -> Tensor:
        return count_hits(model, iter(images), PATCHES, seed=seed, device=CPU, bf16=False)

    return count


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_mode_statistics_and_gradients_as_they_were(
    model: RelativeLocation, counted: Counter, training: bool
) -> None:
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    counted(batches(4))
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


@torch.no_grad()
def test_hits_are_those_of_the_model_in_eval_mode_image_by_image(model: RelativeLocation, counted: Counter) -> None:
    images = batches(5, 3)
    generator = torch.Generator().manual_seed(9)
    logits = [copy.deepcopy(model).eval()(PATCHES(some, generator)) for some in images]
    expected = [
        sum(int(row.argmax()) == label for label, row in enumerate(image)) for batch in logits for image in batch
    ]
    model.train()
    assert counted(images, seed=9).tolist() == expected
    assert counted(images, seed=9).tolist() == expected  # no chance is left over: dropout is off
    assert set(expected) != {0}


def test_the_seed_decides_which_questions_are_asked(counted: Counter) -> None:
    images = batches(64)
    assert not torch.equal(counted(images, seed=1), counted(images, seed=2))


class Knows(nn.Module):
    """Answers every pair right, and in bfloat16 where autocast is on."""

    def forward(self, neighbors: Tensor, _centers: Tensor) -> Tensor:
        self.seen = torch.eye(8) @ torch.eye(8)
        return self.seen.expand(len(neighbors), 8, 8)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_head_that_knows_gets_all_eight_of_every_image(bf16: bool, dtype: torch.dtype) -> None:
    head = Knows()
    model = RelativeLocation(SmallBackbone(widths=(4, 4, 6, 8, 8)), head, batch_norm="separate")
    hits = count_hits(model, batches(3, 2), PATCHES, seed=0, device=CPU, bf16=bf16)
    assert hits.tolist() == [8] * 5
    assert head.seen.dtype == dtype
