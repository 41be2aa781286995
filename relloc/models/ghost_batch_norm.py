"""Ghost batch norm: one large forward, the statistics of many small batches.

Hoffer, Hubara, Soudry (NeurIPS 2017) gave the name. The published recipe (protocols.md 2.1, 2.2)
normalizes 64 images at a time, neighbors and centers apart, because it trains on eight GPUs in two
calls each. Here the same groups are parts of one forward, so that the number of GPUs, and how many
images pass at once, change nothing beyond rounding.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Which rows of a batch share statistics.

    Rows come in ghost batches of `images` images. In each, `rows_per_image[k]` x `images` rows make
    group k, one group after the other.
    """

    images: int
    rows_per_image: Sequence[int]

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"a ghost batch of {self.images} images: it needs at least 1")

    @property
    def blocks(self) -> int:
        """Rows of a ghost batch, counted in blocks of `images` rows."""
        return sum(self.rows_per_image)

    def check_divides(self, rows: int) -> None:
        """Raise `ValueError` unless `rows` rows are whole ghost batches."""
        if rows % (self.images * self.blocks):
            raise ValueError(f"{rows} rows are no whole number of ghost batches of {self.images} x {self.blocks}")

    def values(self, blocks: Tensor) -> list[int]:
        """How many values of a channel each group has of `blocks` (blocks images c ...)."""
        of_block = blocks[0, :, 0].numel()
        return [of_block * rows for rows in self.rows_per_image]


class GhostBatchNorm(_BatchNorm):
    """`norm` with the statistics of `groups` in training; as `norm` in evaluation, with its names.

    Running statistics move group by group, as if each had been a forward of its own. It is written
    for torch.compile, which makes a reduction and a pointwise kernel of it each way.
    """

    def __init__(self, norm: _BatchNorm, groups: Groups) -> None:
        if norm.momentum is None or norm.running_mean is None:
            raise ValueError("a batch norm without momentum or running statistics can't take ghost batches")
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.to(norm.running_mean).load_state_dict(norm.state_dict())
        self.groups = groups
        group_of_block = [group for group, rows in enumerate(groups.rows_per_image) for _ in range(rows)]
        self.register_buffer("group_of_block", torch.tensor(group_of_block), persistent=False)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # vectors and maps alike

    def forward(self, input: Float[Tensor, "rows c *hw"]) -> Float[Tensor, "rows c *hw"]:
        if not self.training:
            return super().forward(input)
        self.groups.check_divides(len(input))  # before shapes disagree
        with torch.no_grad():
            blocks = _blocks(input, self.groups)
            means, variances = _statistics(blocks, self.groups)
            self._move_running(means, variances, self.groups.values(blocks))
            inverse = torch.rsqrt(variances + self.eps)
        return _Normalize.apply(input, self.weight, self.bias, means, inverse, self.group_of_block, self.groups)

    def _move_running(self, means: Tensor, variances: Tensor, counts: list[int]) -> None:
        """Move the running statistics by (biased) ones (ghosts groups c) of so many values a group, first to last."""
        if min(counts) < 2:
            raise ValueError("batch norm knows no variance of one value: raise recipe.images_per_batch_norm")
        unbiased = _times(variances, [count / (count - 1) for count in counts])
        share, n = self.momentum or 0.0, means.shape[0] * means.shape[1]
        later = torch.arange(n - 1, -1, -1, device=means.device, dtype=means.dtype).unsqueeze(1)
        weights = share * (1 - share) ** later
        for running, moved in ((self.running_mean, means), (self.running_var, unbiased)):
            running.mul_((1 - share) ** n).add_((weights * moved.flatten(0, 1)).sum(0))  # pyright: ignore[reportOptionalMemberAccess]
        self.num_batches_tracked.add_(n)  # pyright: ignore[reportOptionalMemberAccess]


class _Normalize(torch.autograd.Function):
    """Batch norm with given statistics of groups (ghosts groups c), and its backward through them to x.

    Left to autograd, the compiler would keep a float32 copy of every map beside the one it needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        means: Tensor,
        inverse: Tensor,
        group_of_block: Tensor,
        groups: Groups,
    ) -> Tensor:
        """Normalized rows; `inverse` is one over the standard deviation."""
        ctx.save_for_backward(x, weight, means, inverse, group_of_block)
        ctx.groups = groups
        scale = inverse if weight is None else inverse * weight
        shift = -means * scale if bias is None else bias - means * scale
        blocks = _blocks(x, groups)
        scale, shift = _to_blocks((scale, shift), group_of_block, blocks)
        rows = (blocks * scale + shift).flatten(0, 1)
        # A tensor of its own, no view: ReLU writes into it, and autograd copies the gradient of a view that is
        # written into, in an order of memory that convolutions have to copy once more.
        return rows.clone() if rows.dtype == x.dtype else rows.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, means, inverse, group_of_block = ctx.saved_tensors
        groups: Groups = ctx.groups
        blocks = _blocks(x, groups)
        gradient = _blocks(gradient, groups)
        (center,) = _to_blocks((means,), group_of_block, blocks)
        even, along = _group_means(gradient, groups), _group_means(gradient * (blocks - center), groups)
        scale = inverse if weight is None else inverse * weight
        # scale (g - mean(g) - (x - mean) mean(g (x - mean)) / variance), as a line in x: few values to fetch.
        slope = -scale * inverse.square() * along
        offset = -scale * even - slope * means
        scale, slope, offset = _to_blocks((scale, slope, offset), group_of_block, blocks)
        of_x = _as(scale * gradient + slope * blocks + offset, x.dtype).flatten(0, 1)
        if weight is None:
            return of_x, *(None,) * 6
        counts = groups.values(blocks)
        of_weight, of_bias = _times(along * inverse, counts), _times(even, counts)
        return of_x, of_weight.sum((0, 1)), of_bias.sum((0, 1)), *(None,) * 4


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Where nothing is to be converted, `to` returns what it was given, and a compiled Function that returns
    # that has zero gradients (torch 2.11; a test looks).
    return x if x.dtype == dtype else x.to(dtype)


def _blocks(x: Tensor, groups: Groups) -> Tensor:
    """(blocks images c ...) in float32, or in float64 as it came."""
    blocks = x.unflatten(0, (-1, groups.images))
    return blocks if blocks.dtype == torch.float64 else blocks.float()


def _statistics(blocks: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """(ghosts groups c) means and biased variances.

    Variances are means of squares minus squares of means, which one pass gives, both after a value
    that lies among the others is subtracted, so that little cancels.
    """
    guess = blocks[0, 0].flatten(1)[:, 0] if blocks.dim() > 3 else blocks[0, 0]
    left = blocks - guess.view(-1, *(1,) * (blocks.dim() - 3))
    off = _group_means(left, groups)
    return off + guess, (_group_means(left.square(), groups) - off.square()).clamp(min=0)


def _group_means(blocks: Tensor, groups: Groups) -> Float[Tensor, "ghosts groups c"]:
    """Means over the rows and places of each group."""
    inner = (1, *range(3, blocks.dim()))
    of_blocks = blocks.mean(inner).unflatten(0, (-1, groups.blocks))
    return torch.cat([part.mean(1, keepdim=True) for part in of_blocks.split(list(groups.rows_per_image), 1)], 1)


def _times(of_groups: Tensor, factors: Sequence[float]) -> Float[Tensor, "ghosts groups c"]:
    """Values (ghosts groups c) times a factor for each group."""
    parts = zip(of_groups.split(1, 1), factors, strict=True)
    return torch.cat([part * factor for part, factor in parts], 1)


def _to_blocks(of_groups: Sequence[Tensor], group_of_block: Tensor, blocks: Tensor) -> Sequence[Tensor]:
    """Values (ghosts groups c), each shaped to meet the blocks."""
    spread = torch.stack(tuple(of_groups))[:, :, group_of_block].flatten(1, 2)
    return spread.view(*spread.shape[:2], 1, -1, *(1,) * (blocks.dim() - 3)).unbind()


def use_ghost_batches(module: nn.Module, groups: Groups) -> None:
    """Put a `GhostBatchNorm` in the place of every batch norm inside `module`; weights and names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, GhostBatchNorm(child, groups))
        else:
            use_ghost_batches(child, groups)
