"""Rescales a network by data before it is fine-tuned (Krähenbühl et al. 2015, arXiv:1511.06856).

Two steps: the outputs of layers are brought to mean 0 and standard deviation 1 (within layers), and
layers are scaled so that all change at the same relative rate (between layers). Constants are those
of the authors' code, philkr/magic_init, magic_init.py at commit 90551ed. It leaves layers that have
weights to the second step, and takes the first one for new layers (docs/protocols.md 3.15).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from relloc.errors import UsageError

Images = Float[Tensor, "_ _ *_"]  # or vectors, for a network of linear layers
# `calibrateGradientRatio` ends after so many rounds, or when no rate is off by more than this.
_MOST_ROUNDS = 10
_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A layer with weights and biases, and its name in the network."""

    name: str
    module: nn.Conv2d | nn.Linear

    @property
    def bias(self) -> Tensor:
        bias = self.module.bias
        if bias is None:
            raise ValueError(f"layer {self.name} has no biases, so its outputs can't be shifted")
        return bias


def layers_in_order(network: nn.Module, images: Images) -> list[Layer]:
    """Returns the convolutions and linear layers of a network in the order of their computation.

    Raises:
        ValueError: the network has a batch norm, which undoes every scale, or a layer is used
            twice.
    """
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(f"{name} is a batch norm: fold it into the layer before it")
    layers = []

    # Modules are listed in the order of their definition, which need not be that of a forward. So
    # each layer notes itself when its turn comes.
    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Conv2d | nn.Linear, _inputs: tuple[Tensor, ...]) -> None:
            is_noted = any(layer.module is module for layer in layers)
            if is_noted:
                raise ValueError(f"layer {name} is used twice, so its rate has no meaning")
            layers.append(Layer(name=name, module=module))

        return hook

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handle = module.register_forward_pre_hook(note(name))
            handles.append(handle)
    with _removed(handles), torch.no_grad():
        network(images)
    return layers


@torch.no_grad()
def normalize_outputs(
    network: nn.Module,
    new: Collection[nn.Module],
    batches: Sequence[Images],
    *,
    mean: float = 0.0,
) -> None:
    """Brings each channel of the outputs of the `new` layers to `mean` and standard deviation 1.

    Weights are divided by the standard deviation that the channel has on `batches`, and the bias is
    set to give the mean. One layer is treated after the other, as each changes the inputs of the
    next. A channel whose output does not vary is only shifted. `network` is in evaluation mode.
    """
    for layer in layers_in_order(network, batches[0]):
        if layer.module not in new:
            continue
        means, stds = _output_statistics(network, layer, batches)
        scales = torch.where(stds > 0, 1 / stds, torch.ones_like(stds))

        # One scale for each output channel, which is the first axis of the weights.
        weight = layer.module.weight
        other_axes = (1,) * (weight.dim() - 1)
        channel_scales = scales.view(-1, *other_axes)
        weight.mul_(channel_scales.to(weight.dtype))

        # (b - m) / s + mean: the outputs had the old bias in them.
        centered = layer.bias.double() - means
        layer.bias.copy_(centered * scales + mean)


def equalize_rates(network: nn.Module, images: Images, *, seed: int) -> float:
    """Scales layers so that all change at the same relative rate, and outputs have deviation 1.

    Weights and biases of a layer are multiplied by one number, and biases in addition by as much as
    the inputs of their layer have grown. So a network of ReLUs and max pooling computes the same as
    before, up to the scale of its output. `network` is in evaluation mode; `images` are one batch;
    `seed` is that of the random gradient at the outputs.

    Returns:
        How many times the highest rate is as large as the lowest one in the end.

    Raises:
        UsageError: a layer does not change the output.
    """
    layers = layers_in_order(network, images)
    input_sizes = _input_sizes(network, layers, images)
    # To scale one layer changes the rates of all others, so that it takes several rounds.
    for _ in range(_MOST_ROUNDS):
        rates = rates_of_change(network, images, seed=seed)
        output_std = _output_std(network, images)
        target = _target(rates, output_std)
        # How far each rate is off, as a logarithm: too high and too low count alike.
        errors = [abs(math.log(rate / target)) for rate in rates.values()]
        if max(errors) < _TOLERANCE:
            break
        # The rate of a layer falls with the square of its scale, and rises with all scales'
        # product, as gradients pass through the other layers.
        scales = {}
        for name, rate in rates.items():
            scales[name] = math.sqrt(rate / target)
        input_sizes = _scale(network, layers, images, scales, input_sizes)
    # The last round changed the rates once more.
    rates = rates_of_change(network, images, seed=seed)
    highest = max(rates.values())
    lowest = min(rates.values())
    return highest / lowest


def rates_of_change(network: nn.Module, images: Images, *, seed: int) -> dict[str, float]:
    """Returns for each layer the size of its gradient relative to that of its weights.

    Both are root mean squares over the weights. The gradient is that of a random loss: at each
    output it is drawn from N(0, 1).

    Raises:
        UsageError: a layer does not change the output, or its rate is not finite.
    """
    layers = layers_in_order(network, images)
    weights = [layer.module.weight for layer in layers]
    # Frozen layers have a rate too.
    needed_gradients = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)

    with torch.enable_grad():
        outputs = network(images)
        # Drawn on the CPU, so that the noise is the same on each device.
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(outputs.shape, generator=generator)
        # The gradient of this sum at the outputs is the noise itself.
        loss = (outputs * noise.to(outputs)).sum()
        gradients = torch.autograd.grad(loss, weights)
    for weight, needed in zip(weights, needed_gradients, strict=True):
        weight.requires_grad_(needed)

    rates = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        weight = layer.module.weight.detach()
        # In double precision, as squares of small gradients fall below what float32 holds.
        mean_square_weight = weight.double().square().mean()
        mean_square_gradient = gradient.double().square().mean()
        ratio = mean_square_gradient / mean_square_weight
        rate = float(ratio.sqrt())
        if not (math.isfinite(rate) and rate > 0):
            raise UsageError(
                f"layer {layer.name} can't be rescaled: its relative rate of change is {rate}. Its "
                "weights are zero or not finite, or the network answers the same for all images. "
                "Give other weights, or fine-tune without rescaling"
            )
        rates[layer.name] = rate
    return rates


def _target(rates: dict[str, float], output_std: float) -> float:
    """Returns the rate that all layers are brought to.

    The geometric mean would leave the scale of the outputs as it is. The factor brings their
    standard deviation closer to 1 in each round.
    """
    logs = [math.log(rate) for rate in rates.values()]
    geometric_mean = math.exp(sum(logs) / len(logs))
    # Each of n layers takes the n-th root of what the outputs are off by.
    factor = output_std ** (1 / len(logs))
    return geometric_mean * factor


@torch.no_grad()
def _output_std(network: nn.Module, images: Images) -> float:
    """Returns the mean over channels of the standard deviation of the network's outputs."""
    outputs = network(images).double()
    by_channel = outputs.transpose(0, 1).flatten(1)
    stds = by_channel.std(dim=1, correction=0)
    return float(stds.mean())


@torch.no_grad()
def _input_sizes(network: nn.Module, layers: Sequence[Layer], images: Images) -> dict[str, float]:
    """Returns the mean magnitude of the inputs of each layer."""
    # Scales of 1 leave the layers as they are.
    no_change = {layer.name: 1.0 for layer in layers}
    return _scale(network, layers, images, no_change, {})


@torch.no_grad()
def _scale(
    network: nn.Module,
    layers: Sequence[Layer],
    images: Images,
    scales: dict[str, float],
    former_sizes: dict[str, float],
) -> dict[str, float]:
    """Scales each layer, and its biases also by as much as its inputs have grown.

    Returns the mean magnitude of the inputs of each layer now. It takes a single forward, in which
    each layer is changed as soon as the inputs arrive that the changed layers before it give.
    """
    sizes = {}

    def change(layer: Layer) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (layer_inputs,) = inputs
            size = float(layer_inputs.double().abs().mean())
            sizes[layer.name] = size
            former_size = former_sizes.get(layer.name, size)
            # Inputs that are all zero have no size to grow from; such a layer has no rate either.
            growth = 1.0
            if former_size:
                growth = size / former_size
            # A bias is to keep its share in the outputs, which grow with inputs and weights.
            scale = scales[layer.name]
            layer.module.weight.mul_(scale)
            if layer.module.bias is not None:
                layer.module.bias.mul_(growth * scale)

        return hook

    handles = []
    for layer in layers:
        handle = layer.module.register_forward_pre_hook(change(layer))
        handles.append(handle)
    with _removed(handles):
        network(images)
    return sizes


def _output_statistics(
    network: nn.Module, layer: Layer, batches: Sequence[Images]
) -> tuple[Float[Tensor, "out"], Float[Tensor, "out"]]:
    """Returns mean and standard deviation of each output channel of a layer over all batches."""
    outputs_by_channel = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        # Channels by images and positions together.
        by_channel = outputs.double().transpose(0, 1).flatten(1)
        outputs_by_channel.append(by_channel)

    handle = layer.module.register_forward_hook(keep)
    with _removed([handle]):
        for images in batches:
            network(images)
    outputs = torch.cat(outputs_by_channel, dim=1)
    means = outputs.mean(dim=1)
    stds = outputs.std(dim=1, correction=0)
    return means, stds


@contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
