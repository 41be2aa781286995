"""Batch norm with the statistics of the images of all processes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc import ranks


def synchronize(network: nn.Module, device: torch.device) -> None:
    """Put a synchronized batch norm in the place of every one inside `network`; weights and names stay.

    On GPUs it is PyTorch's, which refuses to compute on CPUs; there it is ours.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm):
            setattr(network, name, CpuSyncBatchNorm(child))
        else:
            synchronize(child, device)


class CpuSyncBatchNorm(_BatchNorm):
    """`norm`, whose weights and statistics it takes over, with the statistics of all processes in training.

    Processes may have different numbers of images, also none.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.train(norm.training)
        # The same tensors, not copies: an optimizer may hold the weights already.
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # vectors and maps alike

    def forward(self, input: Float[Tensor, "b c *hw"]) -> Float[Tensor, "b c *hw"]:
        if not self.training:
            return super().forward(input)
        channels = input.shape[1]
        axes = [0, *range(2, input.dim())]
        along_channels = (1, channels, *(1,) * (input.dim() - 2))
        # Half precision is too coarse for sums.
        values = input if input.dtype == torch.float64 else input.float()
        count = ranks.total(torch.tensor(input.numel() / channels, dtype=torch.float64)).item()
        if count == 1:
            raise ValueError("batch norm knows no variance of one value a channel: give more images a step")
        mean = _SumOverRanks.apply(values.sum(axes)) / count
        centered = values - mean.view(along_channels)
        variance = _SumOverRanks.apply(centered.square().sum(axes)) / count
        self._move_running_statistics(mean.detach(), variance.detach(), count)
        normalized = centered * torch.rsqrt(variance + self.eps).view(along_channels)
        if self.affine:
            normalized = normalized * self.weight.view(along_channels) + self.bias.view(along_channels)
        return normalized.to(input.dtype)

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, variance: Tensor, count: float) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        # PyTorch's meaning of no momentum: a cumulative average.
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes; so is its gradient, as each process's loss depends on the sum."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return ranks.total(values.clone())

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return ranks.total(gradient.clone())
