"""Heads side by side against plain torch, one by one: nn.BatchNorm, nn.Linear, autograd, SGD."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc.evals.heads import HeadSettings, LayerHeads, Sgd
from relloc.seeds import Use, seed_for

DIM, CHANNELS, N_CLASSES = 12, 3, 4
SIZES = (8, 8, 8, 5, 8, 8, 8, 3, 8, 8, 8, 8)
SETTINGS = (
    HeadSettings(lr=0.1, weight_decay=0.01, sees_all=True),
    HeadSettings(lr=0.5, weight_decay=0.001, sees_all=False),
    HeadSettings(lr=0.01, weight_decay=0.0, sees_all=False),
)
Data = list[tuple[Tensor, Tensor]]


def data(seed: int = 1) -> Data:
    rng = torch.Generator().manual_seed(seed)
    return [
        (
            3 * torch.randn(size, DIM, generator=rng) + 1,
            torch.randint(N_CLASSES, (size,), generator=rng),
        )
        for size in SIZES
    ]


# The heads that must not see the tenth take no part in every third step.
ACTIVE = np.array(
    [[setting.sees_all or step % 3 != 0 for setting in SETTINGS] for step in range(len(SIZES))]
)
FACTORS = [1.0] * 6 + [0.1] * 6


def made(
    settings: Sequence[HeadSettings] = SETTINGS,
    *,
    nesterov: bool = True,
    channels: int | None = CHANNELS,
) -> LayerHeads:
    sgd = Sgd(settings=tuple(settings), momentum=0.9, nesterov=nesterov)
    return LayerHeads(sgd, dim=DIM, channels=channels, n_classes=N_CLASSES, seed=0).train()


def trained(
    heads: LayerHeads, batches: Data, *, at_once: int, active: np.ndarray = ACTIVE
) -> LayerHeads:
    for start in range(0, len(batches), at_once):
        part = batches[start : start + at_once]
        rows = [heads.normalized(features) for features, _ in part]
        ways = heads.sgd.coefficients(active[start : start + at_once], FACTORS[start])
        heads.learn(rows, [labels for _, labels in part], ways)
    return heads


def alone(
    index: int, batches: Data, *, nesterov: bool, normalized: bool = True
) -> tuple[nn.Linear, nn.Module]:
    """The head of one setting trained as anyone would."""
    setting = SETTINGS[index]
    norm = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.1) if normalized else nn.Identity()
    head = nn.Linear(DIM, N_CLASSES)
    generator = torch.Generator().manual_seed(seed_for(Use.HEAD_WEIGHTS, 0))
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    rule = {
        "lr": setting.lr,
        "momentum": 0.9,
        "nesterov": nesterov,
        "weight_decay": setting.weight_decay,
    }
    optimizer = torch.optim.SGD(head.parameters(), **rule)  # type: ignore[arg-type]
    for (features, labels), active, factor in zip(batches, ACTIVE, FACTORS, strict=True):
        rows = norm(features.reshape(len(features), CHANNELS, 2, 2)).flatten(1)
        if active[index]:
            optimizer.param_groups[0]["lr"] = factor * setting.lr
            optimizer.zero_grad()
            cross_entropy(head(rows), labels).backward()
            optimizer.step()
    return head, norm


@pytest.mark.parametrize("at_once", [1, 3, 6])
@pytest.mark.parametrize("nesterov", [True, False])
def test_each_head_is_what_torch_makes_of_it_alone(at_once: int, nesterov: bool) -> None:
    heads = trained(made(nesterov=nesterov), data(), at_once=at_once)
    for index in range(len(SETTINGS)):
        head, norm = alone(index, data(), nesterov=nesterov)
        torch.testing.assert_close(heads.weight[index], head.weight.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(heads.bias[index], head.bias.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(heads.norm.running_mean, norm.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(heads.norm.running_var, norm.running_var, rtol=1e-6, atol=1e-6)
        features = data(seed=2)[0][0]
        expected = head(norm.eval()(features.reshape(-1, CHANNELS, 2, 2)).flatten(1))
        torch.testing.assert_close(
            heads.eval()(features)[:, index], expected.detach(), rtol=1e-4, atol=1e-5
        )
    assert (heads.weight - made().weight).abs().amax(dim=(1, 2)).min() > 0.005  # all have moved
    assert not heads.eval()(features).requires_grad


def test_without_batch_norm_heads_see_features_as_they_are() -> None:
    heads = trained(made(channels=None), data(), at_once=2)
    for index in range(len(SETTINGS)):
        head, _ = alone(index, data(), nesterov=True, normalized=False)
        torch.testing.assert_close(heads.weight[index], head.weight.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_head_does_not_know_which_others_train_beside_it(at_once: int) -> None:
    together = trained(made(), data(), at_once=at_once)
    for index, setting in enumerate(SETTINGS):
        single = trained(
            made([setting]), data(), at_once=at_once, active=ACTIVE[:, index : index + 1]
        )
        torch.testing.assert_close(single.weight[0], together.weight[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 6])
def test_a_head_that_diverges_disturbs_no_other(at_once: int) -> None:
    wild = dataclasses.replace(SETTINGS[1], lr=1e30)
    beside = trained(made([SETTINGS[0], wild, SETTINGS[2]]), data(), at_once=at_once)
    calm = trained(made(), data(), at_once=at_once)
    assert beside.is_finite().tolist() == [True, False, True]
    torch.testing.assert_close(beside.weight[[0, 2]], calm.weight[[0, 2]], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(beside.bias[[0, 2]], calm.bias[[0, 2]], rtol=1e-6, atol=1e-7)


def test_labels_of_steps_that_a_head_does_not_take_do_not_matter() -> None:
    poisoned = [
        (features, labels if step % 3 else (labels + 1) % N_CLASSES)
        for step, (features, labels) in enumerate(data())
    ]
    clean, other = trained(made(), data(), at_once=2), trained(made(), poisoned, at_once=2)
    assert torch.equal(clean.weight[1:], other.weight[1:])
    assert torch.equal(clean.bias[1:], other.bias[1:])
    assert not torch.allclose(clean.weight[0], other.weight[0], atol=1e-3)


def test_what_is_saved_goes_on_bit_for_bit() -> None:
    whole = trained(made(), data(), at_once=2)
    begun = trained(made(), data()[:4], at_once=2, active=ACTIVE[:4])
    resumed = made()
    resumed.load_state_dict(begun.state_dict())
    for start in range(4, len(SIZES), 2):
        part = data()[start : start + 2]
        ways = resumed.sgd.coefficients(ACTIVE[start : start + 2], FACTORS[start])
        resumed.learn(
            [resumed.normalized(rows) for rows, _ in part], [labels for _, labels in part], ways
        )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_weights_start_normal_with_a_spread_of_a_hundredth_and_biases_at_zero() -> None:
    sgd = Sgd(settings=SETTINGS[:2], momentum=0.9, nesterov=True)
    heads = LayerHeads(sgd, dim=512, channels=64, n_classes=100, seed=0)
    for weight in heads.weight:
        assert weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert weight.abs().max() > 0.03
    assert torch.equal(heads.weight[0], heads.weight[1])
    assert not heads.bias.any()
    assert not torch.equal(
        heads.weight, LayerHeads(sgd, dim=512, channels=64, n_classes=100, seed=1).weight
    )


def test_nothing_of_the_size_of_all_heads_is_made_elsewhere_than_on_their_device() -> None:
    sgd = Sgd(settings=SETTINGS, momentum=0.9, nesterov=True)
    meta = torch.device("meta")
    heads = LayerHeads(sgd, dim=DIM, channels=CHANNELS, n_classes=N_CLASSES, seed=0, device=meta)
    assert {name for name, value in heads.state_dict().items() if value.device != meta} == set()
    assert heads.state_dict().keys() == made().state_dict().keys()


def test_features_that_are_not_finite_are_remembered() -> None:
    heads = made()
    rows = data()[0][0]
    heads.normalized(rows)
    assert heads.features_are_finite
    heads.normalized(rows.index_fill(1, torch.tensor([3]), float("inf")))
    heads.normalized(rows)
    assert not heads.features_are_finite


@pytest.mark.gpu
def test_a_gpu_computes_what_a_cpu_does() -> None:
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda")
    there = [(rows.to(device), labels.to(device)) for rows, labels in data()]
    found = trained(made().to(device), there, at_once=6)
    torch.testing.assert_close(
        found.weight.cpu(), trained(made(), data(), at_once=6).weight, rtol=1e-4, atol=1e-5
    )
