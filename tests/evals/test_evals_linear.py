import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc.evals.linear import Heads, Linear, count_hits
from relloc.features.source import Bank, Batch
from relloc.results import Score

CPU = torch.device("cpu")
DIMS = {"feature1": 12, "feature4": 8, "avgpool": 4}
CHANNELS = {"feature1": 3, "feature4": 2, "avgpool": 4}
N_CLASSES = 3


def bank(n: int, *, spread: float, seed: int, layers: Sequence[str] = tuple(DIMS), at_random: bool = False) -> Bank:
    """Classes around centers at distance ~1; `spread` blurs them, `at_random` unties the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    features = {}
    for place, layer in enumerate(layers):
        centers = torch.randn(N_CLASSES, DIMS[layer], generator=torch.Generator().manual_seed(90 + place))
        noise = torch.randn(n, DIMS[layer], generator=torch.Generator().manual_seed(1000 * seed + place))
        features[layer] = 5 + 10 * (centers[labels] + spread * noise)  # far from standardized
    if at_random:
        labels = torch.randint(N_CLASSES, (n,), generator=generator)
    return Bank(
        features=features, labels=labels, n_classes=N_CLASSES, channels={name: CHANNELS[name] for name in layers}
    )


def evaluation(**changes: object) -> Linear:
    settings = {"layers": tuple(DIMS), "epochs": 8, "milestone_epochs": (5, 7), "gamma": 0.1}
    settings |= {"learning_rates": (0.1,), "momentum": 0.9, "weight_decay": 1e-4, "batch": 32}
    return Linear(**{**settings, **changes})  # type: ignore[arg-type]


def scores(linear: Linear, train: Bank, held_out: Bank, seed: int = 0) -> dict[str, Score]:
    return {score.layer: score for score in linear(train, held_out, device=CPU, seed=seed)}


TRAIN, HELD_OUT = bank(200, spread=1.0, seed=1), bank(150, spread=1.0, seed=2)
CLEAR = {"train": bank(200, spread=0.05, seed=1), "held_out": bank(150, spread=0.05, seed=2)}


def test_heads_normalize_each_channel_over_images_and_places_without_scale_and_shift() -> None:
    torch.manual_seed(0)
    heads = Heads(DIMS, CHANNELS, 2, N_CLASSES, seed=0).train()
    rows = TRAIN.features["feature1"]
    logits = heads(TRAIN.features)
    twin = nn.BatchNorm2d(3, affine=False, momentum=0.1).train()
    normalized = twin(rows.reshape(-1, 3, 2, 2)).flatten(1)
    for head, found in zip(heads.heads["feature1"], logits["feature1"], strict=True):
        torch.testing.assert_close(found, normalized @ head.weight.T + head.bias)
    norm = heads.norms["feature1"]
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert {name.split(".")[0] for name, _ in heads.named_parameters()} == {"heads"}


def test_weights_start_normal_with_a_spread_of_a_hundredth_and_biases_at_zero() -> None:
    heads = Heads({"feature1": 512}, {"feature1": 64}, 2, 100, seed=0)
    for head in heads.heads["feature1"]:
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert head.weight.abs().max() > 0.03
        assert torch.all(head.bias == 0)


def test_one_step_is_sgd_with_nesterov_momentum_and_decay_of_the_summed_losses() -> None:
    linear = evaluation(learning_rates=(0.1, 0.01), weight_decay=0.05, epochs=3, batch=200, milestone_epochs=())
    heads = linear._heads(TRAIN, seed=0)
    weights = {
        (layer, place): [value.detach().clone().requires_grad_() for value in head.parameters()]
        for layer, of_layer in heads.heads.items()
        for place, head in enumerate(of_layer)
    }
    linear._fit(heads, TRAIN, torch.arange(TRAIN.n), CPU, seed=0)
    for (layer, place), (weight, bias) in weights.items():
        rows = standardized(TRAIN.features[layer], CHANNELS[layer])
        velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for step in range(3):
            loss = cross_entropy(rows @ weight.T + bias, TRAIN.labels)
            for number, (value, gradient) in enumerate(
                zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True)
            ):
                pull = gradient + 0.05 * value.detach()
                velocity[number] = pull if step == 0 else 0.9 * velocity[number] + pull
                with torch.no_grad():
                    value -= (0.1, 0.01)[place] * (pull + 0.9 * velocity[number])
        torch.testing.assert_close(heads.heads[layer][place].weight, weight, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(heads.heads[layer][place].bias, bias, rtol=1e-3, atol=1e-6)


def standardized(rows: Tensor, channels: int) -> Tensor:
    maps = rows.reshape(len(rows), channels, -1)
    mean = maps.mean(dim=(0, 2), keepdim=True)
    variance = (maps - mean).square().mean(dim=(0, 2), keepdim=True)
    return ((maps - mean) / torch.sqrt(variance + 1e-5)).flatten(1)


def objective(rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float) -> float:
    penalty = decay / 2 * (weight.square().sum() + bias.square().sum())
    return (cross_entropy(rows @ weight.T + bias, labels) + penalty).item()


def test_heads_trained_long_enough_reach_the_optimum_of_logistic_regression() -> None:
    decay = 0.01
    linear = evaluation(epochs=400, milestone_epochs=(300,), learning_rates=(0.3,), weight_decay=decay, batch=200)
    heads = linear._heads(TRAIN, seed=0)
    linear._fit(heads, TRAIN, torch.arange(TRAIN.n), CPU, seed=0)
    hits, seen = count_hits(heads.eval(), HELD_OUT, torch.arange(HELD_OUT.n), linear.layers, 64, CPU)
    with torch.no_grad():
        logits = heads(HELD_OUT.features)
    for layer, dim in DIMS.items():
        rows = standardized(TRAIN.features[layer], CHANNELS[layer])
        ones = np.ones((len(rows), 1))  # the bias decays like a weight, as SGD has it
        oracle = LogisticRegression(C=1 / (decay * len(rows)), fit_intercept=False, tol=1e-8, max_iter=10_000)
        oracle.fit(np.hstack([rows.double().numpy(), ones]), TRAIN.labels.numpy())
        best = torch.from_numpy(oracle.coef_).float()
        optimum = objective(rows, TRAIN.labels, best[:, :dim], best[:, dim], decay)
        head = heads.heads[layer][0]
        assert objective(rows, TRAIN.labels, head.weight, head.bias, decay) == pytest.approx(optimum, rel=1e-3)
        assert objective(rows, TRAIN.labels, 0 * best[:, :dim], 0 * best[:, dim], decay) > 1.05 * optimum
        torch.testing.assert_close(head.weight, best[:, :dim], rtol=0.02, atol=2e-3)
        norm = heads.norms[layer]
        maps = HELD_OUT.features[layer].reshape(HELD_OUT.n, CHANNELS[layer], -1)
        shifted = (maps - norm.running_mean.view(1, -1, 1)) / norm.running_var.view(1, -1, 1).sqrt()
        predicted = oracle.predict(np.hstack([shifted.flatten(1).numpy(), np.ones((HELD_OUT.n, 1))]))
        assert (logits[layer][0].argmax(dim=1).numpy() == predicted).mean() > 0.99
        assert hits[layer].item() / seen == pytest.approx((predicted == HELD_OUT.labels.numpy()).mean(), abs=0.01)


def test_separable_classes_are_told_apart_and_random_labels_are_not() -> None:
    assert {score.value for score in scores(evaluation(), **CLEAR).values()} == {100.0}
    train, held_out = (bank(n, spread=1, seed=seed, at_random=True) for n, seed in ((300, 3), (600, 4)))
    for score in scores(evaluation(), train, held_out).values():
        assert score.value == pytest.approx(100 / N_CLASSES, abs=8)  # four standard errors
        assert score.n == 600


@dataclasses.dataclass
class Watched:
    """A bank that notes which images were asked for, call by call."""

    bank: Bank
    asked: list[list[int]] = dataclasses.field(default_factory=list)

    n = property(lambda self: self.bank.n)
    n_classes = property(lambda self: self.bank.n_classes)
    dims = property(lambda self: self.bank.dims)
    channels = property(lambda self: self.bank.channels)

    def batches(self, places: Tensor, size: int, layers: Sequence[str]) -> Iterator[Batch]:
        self.asked.append(places.tolist())
        yield from self.bank.batches(places, size, layers)


def test_with_several_rates_a_tenth_is_held_back_to_choose_and_never_trained_on() -> None:
    watched = Watched(TRAIN)
    linear = evaluation(learning_rates=(0.1, 0.01))
    list(linear(watched, HELD_OUT, device=CPU, seed=0))
    *epochs, chosen_on = watched.asked
    assert len(epochs) == linear.epochs
    assert len(chosen_on) == TRAIN.n // 10 == 20
    for epoch in epochs:
        assert sorted(epoch + chosen_on) == list(range(TRAIN.n))
    assert epochs[0] != epochs[1]  # another order each epoch


def test_with_one_rate_all_images_train_and_none_is_held_back() -> None:
    watched = Watched(TRAIN)
    list(evaluation()(watched, HELD_OUT, device=CPU, seed=0))
    assert [sorted(epoch) for epoch in watched.asked] == [list(range(TRAIN.n))] * 8


def test_even_of_few_images_one_is_held_back_to_choose_the_rate() -> None:
    watched = Watched(bank(6, spread=0.05, seed=1))
    list(evaluation(learning_rates=(1e-9, 0.1))(watched, HELD_OUT, device=CPU, seed=0))
    assert [len(places) for places in watched.asked] == [5] * 8 + [1]


def test_what_is_reported_on_does_not_choose_the_rate() -> None:
    linear = evaluation(learning_rates=(1e-9, 0.1))
    wrong = dataclasses.replace(CLEAR["held_out"], labels=(CLEAR["held_out"].labels + 1) % N_CLASSES)
    for held_out, value in ((CLEAR["held_out"], 100.0), (wrong, 0.0)):
        for score in scores(linear, CLEAR["train"], held_out).values():
            # The other rate leaves heads at their start, which would do better than 0 % on wrong labels.
            assert score.value == value
            assert score.protocol.startswith("3.3 one head a stage, lr 0.1, 8 epochs, batch 32, rate chosen among 2")


def test_each_layer_gets_the_rate_that_does_best_on_its_own_held_back_images() -> None:
    linear = evaluation(learning_rates=(0.1, 0.1, 0.1))
    heads = linear._heads(TRAIN, seed=0)
    linear._fit(heads, TRAIN, torch.arange(100), CPU, seed=0)
    best = {"feature1": 2, "feature4": 0, "avgpool": 1}
    with torch.no_grad():
        for layer, place in best.items():
            for other in {0, 1, 2} - {place}:
                heads.heads[layer][other].weight.zero_()  # answers one class whatever it sees
    assert linear._choose(heads.eval(), TRAIN, torch.arange(100, 200), CPU) == best


def test_hits_are_counted_over_all_batches_of_the_images_asked() -> None:
    linear = evaluation()
    heads = linear._heads(TRAIN, seed=0)
    linear._fit(heads, TRAIN, torch.arange(100), CPU, seed=0)
    places = torch.arange(100, 200)
    hits, seen = count_hits(heads.eval(), TRAIN, places, linear.layers, 7, CPU)
    assert seen == 100
    for layer, (logits,) in heads({name: rows[places] for name, rows in TRAIN.features.items()}).items():
        assert hits[layer].tolist() == [(logits.argmax(dim=1) == TRAIN.labels[places]).sum().item()]


def test_a_layer_alone_gets_the_score_and_the_head_that_it_gets_among_others() -> None:
    linear = evaluation(learning_rates=(0.1, 0.01))
    together = scores(linear, TRAIN, HELD_OUT)
    backwards = scores(dataclasses.replace(linear, layers=tuple(DIMS)[::-1]), TRAIN, HELD_OUT)
    assert backwards == together
    for layer in DIMS:
        alone = scores(dataclasses.replace(linear, layers=(layer,)), TRAIN, HELD_OUT)
        assert alone.keys() == {layer}
        assert alone[layer].value == together[layer].value
    heads = []
    for layers in (("avgpool",), tuple(DIMS)):
        alone = dataclasses.replace(linear, layers=layers)
        heads.append(alone._heads(TRAIN, seed=0))
        alone._fit(heads[-1], TRAIN, torch.arange(TRAIN.n), CPU, seed=0)
    for one, other in zip(heads[0].heads["avgpool"], heads[1].heads["avgpool"], strict=True):
        assert torch.equal(one.weight, other.weight)


def test_renaming_classes_changes_no_score() -> None:
    linear = evaluation(epochs=150, milestone_epochs=(100,), weight_decay=0.01, batch=200)
    renamed = torch.tensor([2, 0, 1])
    train, held_out = (dataclasses.replace(one, labels=renamed[one.labels]) for one in (TRAIN, HELD_OUT))
    found, expected = scores(linear, train, held_out), scores(linear, TRAIN, HELD_OUT)
    for layer, score in found.items():
        assert score.value == pytest.approx(expected[layer].value, abs=0.7)  # one image of 150


def test_the_seed_alone_decides_whatever_was_drawn_before() -> None:
    linear = evaluation(epochs=2, learning_rates=(0.01, 0.02))
    torch.manual_seed(1)
    first = scores(linear, TRAIN, HELD_OUT)
    torch.manual_seed(2)
    assert scores(linear, TRAIN, HELD_OUT) == first
    assert scores(linear, TRAIN, HELD_OUT, seed=1) != first


def test_a_last_batch_of_one_image_is_passed_over_where_batch_norm_knows_no_variance() -> None:
    found = scores(evaluation(batch=199), TRAIN, HELD_OUT)  # 199 and 1
    assert all(score.value > 50 for score in found.values())


def test_rates_fall_at_the_milestones() -> None:
    far = evaluation(epochs=40, milestone_epochs=(), batch=200)
    frozen = evaluation(epochs=40, milestone_epochs=(10,), gamma=0.0, batch=200)
    short = evaluation(epochs=10, milestone_epochs=(), batch=200)
    weights = []
    for linear in (frozen, short, far):
        heads = linear._heads(TRAIN, seed=0)
        linear._fit(heads, TRAIN, torch.arange(TRAIN.n), CPU, seed=0)
        weights.append(heads.heads["avgpool"][0].weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights[0], weights[2], rtol=0.01)


def test_no_learning_rate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"eval\.linear\.learning_rates is empty: give at least one"):
        evaluation(learning_rates=())
