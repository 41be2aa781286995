import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from contexts import context
from resumed import Saved, killed
from torch import Tensor

from relloc.errors import DataError, UsageError
from relloc.evals.heads import HeadSettings, Sgd
from relloc.evals.training import HeadTraining, count_hits, draw_held_back
from relloc.evaluation.contract import NullState
from relloc.features.bank import Bank
from relloc.features.source import FeatureBatch

CPU = torch.device("cpu")
N_CLASSES = 3
DIMS, CHANNELS = {"feature1": 12, "avgpool": 4}, {"feature1": 3, "avgpool": 4}
PUBLISHED = HeadSettings(lr=0.05, weight_decay=1e-3, sees_all=True)
GRID = tuple(HeadSettings(lr=lr, weight_decay=1e-3, sees_all=False) for lr in (0.1, 0.02))


def bank(n: int, *, seed: int = 0) -> Bank:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=rng)
    features = {
        layer: 4 * torch.randn(n, dim, generator=rng) + labels[:, None]
        for layer, dim in DIMS.items()
    }
    return Bank(features=features, labels=labels, n_classes=N_CLASSES, channels=CHANNELS)


def training(settings: Sequence[HeadSettings] = (PUBLISHED, *GRID), **changes: Any) -> HeadTraining:
    sgd = Sgd(settings=tuple(settings), momentum=0.9, nesterov=True)
    constants = {
        "layers": tuple(DIMS),
        "sgd": sgd,
        "epochs": 4,
        "milestone_epochs": (2, 3),
        "gamma": 0.1,
        "batch": 16,
    }
    return HeadTraining(**{**constants, "batch_norm": True, **changes})


def fit(one: HeadTraining, source: Any, state: Any = None, seed: int = 0) -> dict[str, Any]:
    tenth = draw_held_back(source.n, seed)
    return one.fit(
        source, context(state=state or NullState(), seed=seed), tenth=tenth, watched=None
    ).heads


@dataclasses.dataclass
class Watched:
    """A bank that notes which images were asked for, and gives no features of unreadable ones."""

    bank: Bank
    unreadable: frozenset[int] = frozenset()
    asked: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)

    n = property(lambda self: self.bank.n)
    n_classes = property(lambda self: self.bank.n_classes)
    dims = property(lambda self: self.bank.dims)
    channels = property(lambda self: self.bank.channels)

    def batches(
        self, indices: Tensor, size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[FeatureBatch]:
        for chosen in indices.split(size):
            self.asked.append((epoch, chosen.tolist()))
            readable = torch.tensor(
                [index for index in chosen.tolist() if index not in self.unreadable]
            )
            if len(readable):
                yield from self.bank.batches(readable, size, layers)

    def of_epoch(self, number: int) -> list[list[int]]:
        return [indices for epoch, indices in self.asked if epoch == number]


@pytest.mark.parametrize("n", [14, 100, 167])
def test_each_epoch_asks_for_every_image_once_in_another_order(n: int) -> None:
    watched = Watched(bank(n))
    fit(training(), watched)
    orders = [[index for batch in watched.of_epoch(epoch) for index in batch] for epoch in range(4)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    tenth = set(draw_held_back(n, 0).tolist())
    assert len(tenth) == max(1, n // 10)
    for epoch in range(4):  # a batch is of the tenth or of the rest
        assert {
            len(tenth & set(batch)) in (0, len(batch)) for batch in watched.of_epoch(epoch)
        } == {True}


def test_batches_of_the_tenth_come_among_the_others() -> None:
    watched = Watched(bank(640))
    fit(training(epochs=1, milestone_epochs=()), watched)
    tenth = set(draw_held_back(640, 0).tolist())
    turns = [number for number, batch in enumerate(watched.of_epoch(0)) if set(batch) <= tenth]
    assert len(turns) == 4
    assert min(turns) < 30  # of 40; all at the end would be 36 and more
    assert turns != list(range(turns[0], turns[0] + 4))


@pytest.mark.parametrize("settings", [(PUBLISHED,), GRID])
def test_without_two_kinds_of_heads_batches_are_full_but_for_the_last(
    settings: Sequence[HeadSettings],
) -> None:
    watched = Watched(bank(100))
    fit(training(settings, epochs=1, milestone_epochs=()), watched)
    asked = [index for batch in watched.of_epoch(0) for index in batch]
    seen = (
        set(range(100))
        if settings == (PUBLISHED,)
        else set(range(100)) - set(draw_held_back(100, 0).tolist())
    )
    assert sorted(asked) == sorted(seen)
    assert [len(batch) for batch in watched.of_epoch(0)][:-1] == [16] * (len(seen) // 16)


@pytest.mark.parametrize("unreadable", [frozenset(), frozenset({3, 50, 99})])
def test_labels_of_the_tenth_reach_the_published_head_alone(unreadable: frozenset[int]) -> None:
    clean = bank(100)
    labels = clean.labels.clone()
    labels[draw_held_back(100, 0)] = (labels[draw_held_back(100, 0)] + 1) % N_CLASSES
    poisoned = dataclasses.replace(clean, labels=labels)
    found, other = (fit(training(), Watched(source, unreadable)) for source in (clean, poisoned))
    for layer in DIMS:
        assert torch.equal(found[layer].weight[1:], other[layer].weight[1:])
        assert torch.equal(found[layer].bias[1:], other[layer].bias[1:])
        assert not torch.allclose(found[layer].weight[0], other[layer].weight[0], atol=1e-3)


def test_where_a_whole_batch_is_missing_nothing_is_trained_on_by_mistake() -> None:
    one = training(epochs=1, milestone_epochs=())
    full = one.requests(100, draw_held_back(100, 0), 0)[0][0].indices
    gone = frozenset(full.tolist())
    source = Watched(bank(100), gone)
    with pytest.raises(DataError, match="batch of 5 images"):
        fit(training(batch=5), Watched(bank(100), frozenset(range(60))))
    fit(training([PUBLISHED], epochs=1, milestone_epochs=()), source)  # nothing is to be told apart


def test_a_stopped_training_goes_on_bit_for_bit() -> None:
    source = bank(100)
    whole = fit(training(), source)
    for stop_after in (1, 3, 4):
        state = killed(lambda state: fit(training(), source, state), stop_after)
        again = Watched(source)
        resumed = fit(training(), again, Saved(state.content))
        assert {epoch for epoch, _ in again.asked} == set(range(stop_after, 4))
        for layer in DIMS:
            for name, value in whole[layer].state_dict().items():
                assert torch.equal(resumed[layer].state_dict()[name], value), name


def test_the_best_epoch_is_kept_over_a_stop() -> None:
    given = {"tenth": draw_held_back(100, 0), "watched": bank(60, seed=9)}
    wild = training([dataclasses.replace(PUBLISHED, lr=3.0)], milestone_epochs=())
    whole = wild.fit(bank(100), context(), **given)
    state = killed(lambda state: wild.fit(bank(100), context(state=state), **given), 2)
    resumed = wild.fit(bank(100), context(state=Saved(state.content)), **given)
    assert resumed.best == whole.best
    hits, seen = count_hits(whole.heads, bank(60, seed=9), torch.arange(60), 16, CPU)
    assert seen == 60
    assert any(whole.best[layer] > hits[layer][0] for layer in DIMS)
    assert all(whole.best[layer] >= hits[layer][0] for layer in DIMS)


def test_layers_and_steps_at_once_change_nothing_but_rounding() -> None:
    source = bank(167)
    found = fit(training(), source)
    alone = fit(training(layers=("avgpool",)), source)
    assert torch.equal(alone["avgpool"].weight, found["avgpool"].weight)
    together = fit(training(steps_at_once=4), source)
    for layer in DIMS:
        torch.testing.assert_close(
            together[layer].weight, found[layer].weight, rtol=1e-4, atol=1e-6
        )


def test_rates_fall_at_the_milestones() -> None:
    far = training(epochs=8, milestone_epochs=())
    frozen = training(epochs=8, milestone_epochs=(2,), gamma=0.0)
    short = training(epochs=2, milestone_epochs=())
    weights = [fit(one, bank(100))["avgpool"].weight for one in (frozen, short, far)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(weights[0], weights[2], rtol=0.01)


def test_a_last_batch_of_one_image_is_passed_over_where_batch_norm_knows_no_variance() -> None:
    heads = fit(training([PUBLISHED], batch=99, epochs=1, milestone_epochs=()), bank(100))
    assert heads["feature1"].norm.num_batches_tracked == 1
    heads = fit(training([PUBLISHED], batch=99, batch_norm=False), bank(100))
    assert heads["feature1"].is_finite().all()


def test_an_epoch_in_which_no_head_would_learn_is_an_error() -> None:
    gone = frozenset(range(1, 100))
    with pytest.raises(DataError, match="100 training images too few"):
        fit(training([PUBLISHED]), Watched(bank(100), gone))
    with pytest.raises(DataError, match="too few"):
        fit(training([PUBLISHED], batch_norm=False), Watched(bank(100), gone | {0}))


def test_features_that_are_not_finite_are_named_by_layer() -> None:
    source = bank(40)
    source.features["feature1"][7, 2] = float("nan")
    with pytest.raises(UsageError, match="feature1 .*NaN or infinite"):
        fit(training(), source)
    clean = fit(training(), bank(40))
    with pytest.raises(UsageError, match="feature1 .*NaN or infinite"):
        count_hits(clean, source, torch.arange(40), 16, CPU)


def test_hits_are_counted_over_all_batches_of_the_images_asked() -> None:
    source = bank(100)
    heads = fit(training(), source)
    indices = torch.arange(30, 90)
    hits, seen = count_hits(heads, source, indices, 7, CPU)
    assert seen == 60
    for layer, of_layer in heads.items():
        right = (
            of_layer(source.features[layer][indices]).argmax(dim=2)
            == source.labels[indices][:, None]
        )
        assert hits[layer].tolist() == right.sum(dim=0).tolist()
