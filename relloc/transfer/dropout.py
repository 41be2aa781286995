"""Dropout that depends on the sample alone, and not on the batch or process that it is in."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relloc.seeds import Use, seed_for
from relloc.to_device import to_device
from relloc.transfer.random_bits import random_bits

# Layers of a network number their values from multiples of this, so that no two share a number.
_MOST_VALUES = 1 << 24
_MOST_LAYERS = 1 << 7  # ids of random bits have 31 bits


def dropout_seeds(samples: Sequence[int], device: torch.device) -> Int[Tensor, "b"]:
    """Returns the seeds that `SampleDropout` takes, of the seeds of samples."""
    seeds = [seed_for(Use.FINE_TUNING_DROPOUT, seed) for seed in samples]
    return to_device(torch.tensor(seeds, dtype=torch.int64), device)


def apply_layers(
    layers: nn.Module, values: Float[Tensor, "b *_"], seeds: Int[Tensor, "b"] | None
) -> Float[Tensor, "b *_"]:
    """Returns the values after the children of `layers`, of which dropout takes the seeds."""
    for layer in layers.children():
        values = layer(values, seeds) if isinstance(layer, SampleDropout) else layer(values)
    return values


class SampleDropout(nn.Module):
    """In training sets each value to 0 with probability `p`, and scales the others by 1 / (1 - p).

    Args:
        p: the probability.
        layer: number of this layer among those of its network, from 0 on; each draws anew.
        whole_channels: whether all values of a channel are dropped or kept together.
    """

    def __init__(self, p: float, layer: int, *, whole_channels: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1 or not 0 <= layer < _MOST_LAYERS:
            raise ValueError(f"dropout of {p} in layer {layer}: give a probability below 1")
        self.p = p
        self.layer = layer
        self.whole_channels = whole_channels

    def forward(
        self, values: Float[Tensor, "b c *hw"], seeds: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b c *hw"]:
        """Returns the values; `seeds` are those of `dropout_seeds`, one for each sample.

        Raises:
            ValueError: in training, there are no seeds or too many values of a sample.
        """
        if not self.training or self.p == 0:
            return values
        if seeds is None:
            raise ValueError("dropout draws by the seed of each sample: give the seeds")
        drawn = values.shape[1:]
        if self.whole_channels:
            # All values of a channel have the number of the channel.
            drawn = torch.Size([values.shape[1], *(1,) * (values.dim() - 2)])
        n_values = drawn.numel()
        if n_values > _MOST_VALUES:
            raise ValueError(f"{n_values} values of a sample: dropout numbers {_MOST_VALUES}")
        first = self.layer * _MOST_VALUES
        ids = torch.arange(first, first + n_values, device=values.device)
        bits = random_bits(seeds, ids)
        # Of 2^32 equally likely numbers, a share of p is below the threshold.
        is_kept = bits >= round(self.p * 2**32)
        # The factor is a number of Python: as a tensor of bfloat16 it would be off by a thousandth.
        scaled = values * (1 / (1 - self.p))
        return scaled * is_kept.view(len(values), *drawn)

    def extra_repr(self) -> str:
        """Returns what `print` shows of the layer."""
        return f"p={self.p}, layer={self.layer}, whole_channels={self.whole_channels}"
