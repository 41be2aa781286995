"""Synchronized batch norm: statistics over the images of all processes of a training."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc import ranks


def synchronize(network: nn.Module, device: torch.device) -> None:
    """Replaces every batch norm inside `network` by a synchronized one; weights and names stay.

    On GPUs it is PyTorch's, with a guard. That one refuses to compute on CPUs, where
    `CpuSyncBatchNorm` is used.
    """
    kind = CudaSyncBatchNorm if device.type == "cuda" else CpuSyncBatchNorm
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm):
            setattr(network, name, kind(child))
        else:
            synchronize(child, device)


class CudaSyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's synchronized batch norm, with a guard for processes that have no value.

    Where no process has one, running statistics stay; PyTorch's would shrink towards 0. It takes
    over the weights and running statistics of `norm`. Processes may have different numbers of
    images, also none; they have to call `forward` the same number of times.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(**_settings(norm))
        _take_over(self, norm)

    def forward(self, input: Float[Tensor, "b c *hw"]) -> Float[Tensor, "b c *hw"]:
        if not self.training:
            return super().forward(input)
        # All of it happens on the device, which nobody waits for.
        statistics = list(self.buffers())
        before = [statistic.clone() for statistic in statistics]
        values = input
        if not input.numel():
            # Of no value PyTorch sends numbers of the input's type, and of others float32: in half
            # precision the processes would wait for each other's bytes (torch 2.11,
            # nn/modules/_functions.py).
            values = input.float()
        output = super().forward(values).to(input.dtype)
        # A sum of counts, not a maximum, as every backend can add.
        count = ranks.total(torch.full((), input.numel(), device=input.device))
        with torch.no_grad():
            for statistic, unchanged in zip(statistics, before, strict=True):
                statistic.copy_(torch.where(count > 0, statistic, unchanged))
        return output


class CpuSyncBatchNorm(_BatchNorm):
    """A batch norm that uses the statistics of all processes in training, for CPUs.

    It takes over the weights and running statistics of `norm`. Processes may have different numbers
    of images, also none; they have to call `forward` the same number of times. Where no process has
    a value, the input is returned as it is, and the running statistics stay.

    Raises:
        ValueError: all processes together have one value per channel, which has no variance.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(**_settings(norm))
        _take_over(self, norm)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # vectors and maps are both allowed

    def forward(self, input: Float[Tensor, "b c *hw"]) -> Float[Tensor, "b c *hw"]:
        if not self.training:
            return super().forward(input)
        channels = input.shape[1]
        reduced_dims = [0, *range(2, input.dim())]
        # The shape in which a number per channel broadcasts against the input.
        per_channel = (1, channels, *(1,) * (input.dim() - 2))
        # Half precision is too coarse for sums.
        values = input if input.dtype == torch.float64 else input.float()

        # Sums and counts of all processes, so that each image has the same weight.
        own_count = torch.tensor(input.numel() / channels, dtype=torch.float64)
        count = ranks.total(own_count).item()
        if count == 0:
            return self._of_no_values(input, per_channel)
        if count == 1:
            raise ValueError(
                "a batch norm has no variance of one value per channel: "
                "give more images for each step"
            )
        mean = _SumOverRanks.apply(values.sum(reduced_dims)) / count
        centered = values - mean.view(per_channel)
        # A second pass over centered values is exact where means of squares would cancel.
        variance = _SumOverRanks.apply(centered.square().sum(reduced_dims)) / count
        self._update_running_statistics(mean.detach(), variance.detach(), count)

        inverse_std = torch.rsqrt(variance + self.eps)
        normalized = centered * inverse_std.view(per_channel)
        if self.affine:
            scaled = normalized * self.weight.view(per_channel)
            normalized = scaled + self.bias.view(per_channel)
        return normalized.to(input.dtype)

    def _of_no_values(self, input: Tensor, per_channel: tuple[int, ...]) -> Tensor:
        """Returns an empty input, as a function of the weights."""
        if not self.affine:
            return input
        # Gradients are 0 and not missing, so that weight decay and momentum go on as in a single
        # process, where PyTorch's own batch norm does the same.
        scaled = input * self.weight.view(per_channel) + self.bias.view(per_channel)
        return scaled.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(
        self,
        mean: Tensor,
        variance: Tensor,
        count: float,
    ) -> None:
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            # PyTorch's meaning of no momentum: the average over all batches so far.
            momentum = 1 / self.num_batches_tracked.item()
        # As PyTorch does: normalize with the biased variance, and keep the unbiased one.
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def _settings(norm: _BatchNorm) -> dict[str, Any]:
    """Returns the arguments that make a batch norm of the same kind."""
    return {
        "num_features": norm.num_features,
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
    }


def _take_over(new: _BatchNorm, norm: _BatchNorm) -> None:
    """Gives a batch norm the mode, weights and running statistics of another one."""
    new.train(norm.training)
    # The same tensors, not copies: an optimizer may hold the weights already.
    new._parameters.update(norm._parameters)
    new._buffers.update(norm._buffers)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes, with its gradient.

    The loss of each process depends on the sum. So the gradient of one process's values is the sum
    of the gradients of all processes.
    """

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return ranks.total(values.clone())

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return ranks.total(gradient.clone())
