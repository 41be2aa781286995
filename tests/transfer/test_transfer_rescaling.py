"""Rescaling before fine-tuning, beside its definition written out for a network of three layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from relloc.errors import UsageError
from relloc.transfer.rescaling import (
    equalize_rates,
    layers_in_order,
    normalize_outputs,
    rates_of_change,
)

SEED = 3


def badly_scaled(*, with_lrn: bool = False) -> nn.Sequential:
    """A network of ReLUs and max pooling whose layers differ in scale by factors of hundreds."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75) if with_lrn else nn.Identity(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4, 10),
    )
    for layer, scale in zip((network[0], network[4], network[7]), (30.0, 0.01, 5.0), strict=True):
        layer.weight.data.mul_(scale)
        layer.bias.data.normal_()
    return network.eval()


def images(n: int = 12) -> Tensor:
    return torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(1)) + 0.5


def outputs_of(network: nn.Sequential, layer: int, x: Tensor) -> Tensor:
    """The outputs of a layer by channel: (channels, everything else)."""
    with torch.no_grad():
        return network[: layer + 1](x).transpose(0, 1).flatten(1)


def plain_rates(network: nn.Sequential, x: Tensor) -> list[float]:
    """Root mean square of the gradient over that of the weights, by `backward`."""
    network = copy.deepcopy(network).requires_grad_(True)
    output = network(x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(SEED)))
    weights = [layer.weight for layer in (network[0], network[4], network[7])]
    ratios = [w.grad.square().mean() / w.detach().square().mean() for w in weights]
    return [float(ratio.sqrt()) for ratio in ratios]


@pytest.mark.parametrize("mean", [0.0, 0.1])
def test_outputs_of_all_layers_get_the_mean_and_deviation_one(mean: float) -> None:
    network = badly_scaled()
    batches = images().split(5)
    normalize_outputs(network, [network[0], network[4], network[7]], batches, mean=mean)
    for layer in (0, 4, 7):
        outputs = outputs_of(network, layer, images())
        torch.testing.assert_close(
            outputs.mean(1), torch.full((len(outputs),), mean), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(outputs.std(1, correction=0), torch.ones(len(outputs)))


def test_only_new_layers_are_normalized_and_a_constant_channel_is_only_shifted() -> None:
    network = badly_scaled()
    network[7].weight.data[2] = 0
    before = copy.deepcopy(network)
    normalize_outputs(network, [network[7]], [images()])
    assert torch.equal(network[0].weight, before[0].weight)
    assert torch.equal(network[4].bias, before[4].bias)
    outputs = outputs_of(network, 7, images())
    assert outputs[2].abs().max() == 0
    torch.testing.assert_close(outputs[1].std(correction=0), torch.tensor(1.0))


def test_rates_are_those_of_the_definition() -> None:
    network = badly_scaled()
    found = rates_of_change(network, images(), seed=SEED)
    assert list(found) == ["0", "4", "7"]
    assert list(found.values()) == pytest.approx(plain_rates(network, images()), rel=1e-5)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_layers_change_at_one_rate_and_the_function_stays_up_to_the_scale_of_its_output() -> None:
    network = badly_scaled()
    with torch.no_grad():
        before = network(images(30))
    rates = plain_rates(network, images())
    assert max(rates) / min(rates) > 100
    spread = equalize_rates(network, images(), seed=SEED)
    rates = plain_rates(network, images())
    assert spread == pytest.approx(max(rates) / min(rates), rel=1e-4)
    assert spread < 1.001
    with torch.no_grad():
        after = network(images(30))
        deviation = network(images()).std(0, correction=0).mean()
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-4, atol=1e-6)
    # One per cent of tolerance for each of three layers
    assert float(deviation) == pytest.approx(1, abs=0.031)


def test_weights_keep_their_directions_and_channels_of_a_layer_their_proportions() -> None:
    network = badly_scaled()
    before = copy.deepcopy(network)
    equalize_rates(network, images(), seed=SEED)
    for layer in (0, 4, 7):
        ratio = network[layer].weight / before[layer].weight
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_rates_come_close_also_through_response_normalization() -> None:
    network = badly_scaled(with_lrn=True)
    assert equalize_rates(network, images(), seed=SEED) < 1.05


def test_layers_are_found_in_the_order_in_which_they_compute() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(2, 1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    found = layers_in_order(Crossed(), torch.ones(1, 3))
    assert [layer.name for layer in found] == ["first", "last"]


def test_networks_that_have_no_such_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="batch norm"):
        layers_in_order(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.ones(2, 3))
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="twice"):
        layers_in_order(nn.Sequential(layer, layer), torch.ones(2, 3))
    dead = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    dead[0].bias.data.fill_(-1e6)
    with pytest.raises(UsageError, match="layer 0 "):
        equalize_rates(dead, torch.ones(2, 3), seed=SEED)
