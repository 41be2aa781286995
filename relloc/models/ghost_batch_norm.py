"""Ghost batch norm: one large forward pass with the statistics of many small batches.

The name is that of Hoffer, Hubara, Soudry, "Train longer, generalize better" (NeurIPS 2017). The
published recipe (docs/protocols.md 2.1, 2.2) normalizes 64 images at a time, and neighbors apart
from centers, because it trains on eight GPUs and passes neighbors and centers in two calls. Here
the same groups are parts of one forward. So neither the number of GPUs nor the number of images
that pass at once changes anything beyond rounding.

Words used below: a *ghost batch* is a run of consecutive rows that one GPU of the published recipe
would see; it has one or more *groups*, which are normalized apart; and a group has one or more
*blocks* of as many rows as the ghost batch has images. For pretraining with separate statistics a
ghost batch has nine blocks: eight of neighbors (group 0), and one of centers (group 1).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _BatchNorm

GroupValues = Float[Tensor, "ghosts groups c"]  # one number for each group and channel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Says which rows of a batch share batch-norm statistics.

    A batch is a sequence of ghost batches of `images` images. In each of them,
    `rows_per_image[k]` x `images` rows make up group k, one group after the other.

    Raises:
        ValueError: `images` is less than 1.
    """

    images: int
    rows_per_image: Sequence[int]

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(
                f"a ghost batch of {self.images} images is not possible: it needs at least 1 image"
            )

    @property
    def blocks(self) -> int:
        """Blocks in a ghost batch; a block has `images` rows."""
        return sum(self.rows_per_image)

    def check_divides(self, rows: int) -> None:
        """Raises `ValueError` unless `rows` rows are a whole number of ghost batches."""
        rows_per_ghost = self.images * self.blocks
        if rows % rows_per_ghost:
            raise ValueError(
                f"{rows} rows are not a whole number of ghost batches "
                f"of {self.images} x {self.blocks} rows"
            )

    def values_per_channel(self, blocks: Tensor) -> list[int]:
        """Returns how many values of a channel each group has in `blocks` (blocks images c ...)."""
        values_per_block = blocks[0, :, 0].numel()
        return [values_per_block * rows for rows in self.rows_per_image]


class GhostBatchNorm(_BatchNorm):
    """A batch norm that uses the statistics of each group of `groups` in training.

    It takes over weights, statistics and parameter names of `norm`, and computes in evaluation mode
    what `norm` does. Running statistics move group by group, as if each group had been a forward
    of its own. The code is written for torch.compile, which turns it into one reduction and one
    pointwise kernel in each direction. On a GPU without torch.compile kernels take its place
    (`relloc.models.ghost_batch_norm_kernel`).

    Raises:
        ValueError: `norm` has no momentum or no running statistics; in training, rows that are no
            whole number of ghost batches, or groups of one value per channel.
    """

    def __init__(self, norm: _BatchNorm, groups: Groups) -> None:
        if norm.momentum is None or norm.running_mean is None:
            raise ValueError(
                "a batch norm without momentum or running statistics "
                "can't be replaced by a ghost batch norm"
            )
        super().__init__(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
        )
        self.to(norm.running_mean)
        self.load_state_dict(norm.state_dict())
        self.groups = groups
        group_of_block = []
        for group, rows in enumerate(groups.rows_per_image):
            group_of_block.extend([group] * rows)
        # A buffer moves to the GPU with the module; not persistent, it stays out of checkpoints.
        self.register_buffer(
            "group_of_block",
            torch.tensor(group_of_block, device=norm.running_mean.device),
            persistent=False,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # vectors and maps are both allowed

    def forward(self, input: Float[Tensor, "rows c *hw"]) -> Float[Tensor, "rows c *hw"]:
        if not self.training:
            return super().forward(input)
        # Checked first: afterwards torch would complain of shapes, in words that help nobody.
        self.groups.check_divides(len(input))
        if kernels_take(input):
            return self._by_kernels(input)
        # Gradients through the statistics are part of `_Normalize.backward`.
        with torch.no_grad():
            blocks = _to_blocks(input, self.groups)
            means, variances = _group_statistics(blocks, self.groups)
            counts = self.groups.values_per_channel(blocks)
            self._update_running_statistics(means, variances, counts)
            inverse_std = torch.rsqrt(variances + self.eps)
        return _Normalize.apply(
            input,
            self.weight,
            self.bias,
            means,
            inverse_std,
            self.group_of_block,
            self.groups,
        )

    def with_relu(
        self,
        input: Float[Tensor, "rows c *hw"],
        residual: Float[Tensor, "rows c *hw"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns ReLU of the normalized rows, plus `residual` if there is one, in training.

        Two tensors are returned, which may share memory and must not be written to. What reads the
        result at two places takes one for each: then their gradients are added where they are
        read, which spares autograd a pass of its own.
        """
        self.groups.check_divides(len(input))
        if kernels_take(input):
            return self._by_kernels(input, residual, relu=True, twice=True)
        normalized = self(input)
        if residual is not None:
            normalized = normalized + residual
        result = relu(normalized)
        return result, result

    def _by_kernels(self, input: Tensor, residual: Tensor | None = None, **how: bool) -> Any:
        # Triton is there on GPUs alone, and takes a while to import.
        from relloc.models import ghost_batch_norm_kernel

        _check_counts(self.groups.values_per_channel(_split_blocks(input, self.groups)))
        running = ghost_batch_norm_kernel.RunningStatistics(
            mean=self.running_mean,  # pyright: ignore[reportArgumentType]
            variance=self.running_var,  # pyright: ignore[reportArgumentType]
            n_tracked=self.num_batches_tracked,  # pyright: ignore[reportArgumentType]
            momentum=self.momentum or 0.0,
        )
        return ghost_batch_norm_kernel.normalize(
            input,
            residual,
            self.weight,
            self.bias,
            running=running,
            group_of_block=self.group_of_block,  # pyright: ignore[reportArgumentType]
            groups=self.groups,
            eps=self.eps,
            **how,
        )

    def _update_running_statistics(
        self,
        means: GroupValues,
        variances: GroupValues,
        counts: list[int],
    ) -> None:
        """Moves the running statistics by those of each group, from the first group to the last.

        `variances` are biased; `counts` has the number of values per channel of each group.
        """
        _check_counts(counts)
        # Running variances are unbiased, as PyTorch's are.
        corrections = [count / (count - 1) for count in counts]
        unbiased = _scale_groups(variances, corrections)
        momentum = self.momentum or 0.0
        n_updates = means.shape[0] * means.shape[1]
        # n updates r = (1 - m) r + m x, one after the other, are one weighted sum: an update with j
        # others after it has the weight m (1 - m)^j, and the old value (1 - m)^n.
        later_updates = torch.arange(
            n_updates - 1,
            -1,
            -1,
            device=means.device,
            dtype=means.dtype,
        )
        weights = momentum * (1 - momentum) ** later_updates.unsqueeze(1)
        old_weight = (1 - momentum) ** n_updates
        for running, new in ((self.running_mean, means), (self.running_var, unbiased)):
            update = (weights * new.flatten(0, 1)).sum(0)
            running.mul_(old_weight).add_(update)  # pyright: ignore[reportOptionalMemberAccess]
        self.num_batches_tracked.add_(n_updates)  # pyright: ignore[reportOptionalMemberAccess]


class _Normalize(torch.autograd.Function):
    """Batch norm with given statistics of groups, and its backward through these statistics.

    Left to autograd, the compiler would keep a float32 copy of every map beside the one it needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        means: Tensor,
        inverse_std: Tensor,
        group_of_block: Tensor,
        groups: Groups,
    ) -> Tensor:
        """Returns the normalized rows; `means` and `inverse_std` are (ghosts groups c)."""
        ctx.save_for_backward(x, weight, means, inverse_std, group_of_block)
        ctx.groups = groups
        # (x - mean) / std * weight + bias, as x * scale + shift.
        scale = inverse_std if weight is None else inverse_std * weight
        shift = -means * scale if bias is None else bias - means * scale
        blocks = _to_blocks(x, groups)
        scale, shift = _broadcast_to_blocks((scale, shift), group_of_block, blocks)
        rows = (blocks * scale + shift).flatten(0, 1)
        # A tensor of its own and no view: ReLU writes into it, and autograd copies the gradient of
        # a view that is written into, in a memory order that convolutions have to copy once more.
        return rows.clone() if rows.dtype == x.dtype else rows.to(x.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad_output: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, means, inverse_std, group_of_block = ctx.saved_tensors
        groups: Groups = ctx.groups
        blocks = _to_blocks(x, groups)
        grad = _to_blocks(grad_output, groups)
        # The two means of a group that the gradient needs: of g, and of g (x - mean).
        (block_means,) = _broadcast_to_blocks((means,), group_of_block, blocks)
        mean_grad = _group_means(grad, groups)
        mean_grad_x = _group_means(grad * (blocks - block_means), groups)
        # The gradient scale (g - mean(g) - (x - mean) mean(g (x - mean)) / variance), written as
        # scale g + slope x + offset: three numbers a group and channel are all that is fetched.
        scale = inverse_std if weight is None else inverse_std * weight
        slope = -scale * inverse_std.square() * mean_grad_x
        offset = -scale * mean_grad - slope * means
        scale, slope, offset = _broadcast_to_blocks((scale, slope, offset), group_of_block, blocks)
        grad_blocks = scale * grad + slope * blocks + offset
        grad_x = _cast(grad_blocks, x.dtype).flatten(0, 1)
        if weight is None:
            return grad_x, *(None,) * 6
        # Means times counts are the sums over the rows of each group.
        counts = groups.values_per_channel(blocks)
        grad_weight = _scale_groups(mean_grad_x * inverse_std, counts)
        grad_bias = _scale_groups(mean_grad, counts)
        # Weight and bias are shared by all groups. Nothing else that `forward` takes is learned.
        ghosts_and_groups = (0, 1)
        grad_weight = grad_weight.sum(ghosts_and_groups)
        grad_bias = grad_bias.sum(ghosts_and_groups)
        return grad_x, grad_weight, grad_bias, *(None,) * 4


def kernels_take(x: Tensor) -> bool:
    """Returns whether rows are normalized by `relloc.models.ghost_batch_norm_kernel`.

    These are rows on a GPU whose channels lie beside one another. torch.compile makes its own
    kernels of the code here.
    """
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype == torch.float64:
        return False
    return x.movedim(1, -1).is_contiguous()


def _check_counts(counts: list[int]) -> None:
    """Raises `ValueError` if a group has one value per channel."""
    if min(counts) < 2:
        raise ValueError(
            "a batch norm has no variance of one value per channel: "
            "raise recipe.images_per_batch_norm"
        )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Where nothing is to be converted, `to` returns what it was given, and a compiled Function that
    # returns that has zero gradients (torch 2.11; a test looks).
    return x if x.dtype == dtype else x.to(dtype)


def _to_blocks(x: Tensor, groups: Groups) -> Tensor:
    """Returns rows as (blocks images c ...), in float32, or in float64 where they are float64."""
    blocks = _split_blocks(x, groups)
    return blocks if blocks.dtype == torch.float64 else blocks.float()


def _split_blocks(x: Tensor, groups: Groups) -> Tensor:
    """Returns rows as (blocks images c ...)."""
    return x.unflatten(0, (-1, groups.images))


def _group_statistics(blocks: Tensor, groups: Groups) -> tuple[GroupValues, GroupValues]:
    """Returns means and biased variances of each group.

    Variances are means of squares minus squares of means, which takes one pass over the data.
    This form loses digits where the mean is far from zero. So one value of each channel is
    subtracted from all others first, which leaves numbers of about the size of the deviations.
    """
    first_values = blocks[0, 0]
    if blocks.dim() > 3:
        first_values = first_values.flatten(1)[:, 0]
    pixel_dims = (1,) * (blocks.dim() - 3)
    shifted = blocks - first_values.view(-1, *pixel_dims)
    shifted_means = _group_means(shifted, groups)
    mean_squares = _group_means(shifted.square(), groups)
    # Rounding may give a variance just below zero.
    variances = (mean_squares - shifted_means.square()).clamp(min=0)
    return shifted_means + first_values, variances


def _group_means(blocks: Tensor, groups: Groups) -> GroupValues:
    """Returns the means over all rows and pixels of each group."""
    images_and_pixels = (1, *range(3, blocks.dim()))
    block_means = blocks.mean(images_and_pixels)
    # All blocks have as many values, so the mean of a group is the mean of its blocks' means.
    per_ghost = block_means.unflatten(0, (-1, groups.blocks))
    means = []
    for group in per_ghost.split(list(groups.rows_per_image), 1):
        means.append(group.mean(1, keepdim=True))
    return torch.cat(means, 1)


def _scale_groups(values: Tensor, factors: Sequence[float]) -> GroupValues:
    """Returns `values` (ghosts groups c) times one factor for each group."""
    scaled = []
    for group, factor in zip(values.split(1, 1), factors, strict=True):
        scaled.append(group * factor)
    return torch.cat(scaled, 1)


def _broadcast_to_blocks(
    values: Sequence[Tensor],
    group_of_block: Tensor,
    blocks: Tensor,
) -> Sequence[Tensor]:
    """Returns each of `values` (ghosts groups c) in a shape that broadcasts against `blocks`."""
    # One indexing for all of them is one kernel, and the compiler fuses what follows.
    per_block = torch.stack(tuple(values))[:, :, group_of_block].flatten(1, 2)
    pixel_dims = (1,) * (blocks.dim() - 3)
    broadcastable = per_block.view(*per_block.shape[:2], 1, -1, *pixel_dims)
    return broadcastable.unbind()


def use_ghost_batches(module: nn.Module, groups: Groups) -> None:
    """Replaces every batch norm inside `module` by a `GhostBatchNorm`; weights and names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, GhostBatchNorm(child, groups))
        else:
            use_ghost_batches(child, groups)
