"""Trains many linear classifiers ("heads") on one layer side by side, each as if it were alone.

Features are frozen, so what the heads see does not depend on them. That allows to compute several
SGD steps at once. SGD is linear in what it adds up: the weights after k steps are a sum of the
weights before, the momentum before, and k gradients, with coefficients that follow from learning
rate, weight decay and momentum alone (`Sgd.coefficients`). So with the features of the next K
batches at hand (`LayerHeads.learn`):

1. The products of all features with the weights, with the momentum, and with one another are
   computed once.
2. For each step in turn, these products give the logits, without touching the weights: a
   gradient by weights is a product of gradients by logits with features, so its effect on later
   logits is a product of those gradients with inner products of features.
3. After K steps, the sum of all weight gradients is added in one product.

Nothing is approximated; results differ from single steps by rounding only.

The gain is memory traffic. 55 heads on five layers of ImageNet are 1.9 GB; a step alone reads or
writes that much at least seven times, which takes 4.5 ms at 3 TB/s, and multiplies 0.5 TFLOP. K
steps together read or write it 14 times in all and multiply 1 TFLOP per step: at K = 16 that is
0.6 ms of traffic per step.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from relloc.seeds import Use, seed_for

# Columns of the tables of coefficients: what the weights before the first step, the momentum before
# it, and the gradients of the steps (all columns from the third on) are multiplied with.
_WEIGHT = 0
_MOMENTUM = 1
_GRADIENTS = 2
_LARGEST = float(np.finfo(np.float32).max)
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """The hyperparameters in which the heads of a layer differ.

    `sees_all`: the head also trains on the held-back images that choose among heads.
    """

    lr: float
    weight_decay: float
    sees_all: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd:
    """The update rule of all heads of a layer: that of torch.optim.SGD without dampening."""

    settings: tuple[HeadSettings, ...]
    momentum: float
    nesterov: bool

    def coefficients(
        self,
        active: Bool[np.ndarray, "steps heads"],
        factor: float,
    ) -> "Coefficients":
        """Returns how the weights and the momentum of some steps are made up of what came before.

        Args:
            active: which head takes which step; a head stays as it is in the other steps.
            factor: multiplies all learning rates, such as 0.1 after a milestone.
        """
        steps, heads = active.shape
        rates = [setting.lr for setting in self.settings]
        decays = [setting.weight_decay for setting in self.settings]
        lr = factor * np.array(rates)[:, None]
        decay = np.array(decays)[:, None]

        # Before the first step, weights are once the weights, and momentum is once the momentum.
        weight = np.zeros((heads, _GRADIENTS + steps))
        momentum = np.zeros((heads, _GRADIENTS + steps))
        weight[:, _WEIGHT] = 1
        momentum[:, _MOMENTUM] = 1
        weights = [weight]
        for step, takes_step in enumerate(active):
            # The rule of torch.optim.SGD, applied to coefficients instead of to tensors.
            gradient = decay * weight
            gradient[:, _GRADIENTS + step] += 1
            next_momentum = self.momentum * momentum + gradient
            update = next_momentum
            if self.nesterov:
                update = gradient + self.momentum * next_momentum
            next_weight = weight - lr * update
            # Heads that do not take this step stay as they are.
            takes_step = takes_step[:, None]
            momentum = np.where(takes_step, next_momentum, momentum)
            weight = np.where(takes_step, next_weight, weight)
            weights.append(weight)

        # Far too large rates give coefficients that float32 cannot hold. They are clipped; what
        # they multiply still overflows, so that such a head is seen to diverge.
        before = np.stack(weights[:-1])
        return Coefficients(
            before=np.clip(before, -_LARGEST, _LARGEST),
            weight=np.clip(weight, -_LARGEST, _LARGEST),
            momentum=np.clip(momentum, -_LARGEST, _LARGEST),
            active=active,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The coefficients of some SGD steps of some heads, which `Sgd.coefficients` computes.

    The columns multiply the weights before the first step, the momentum before it, and the gradient
    of each step.
    """

    # Of the weights before each step, from which its logits follow.
    before: Float64[np.ndarray, "steps heads columns"]
    # Of the weights and the momentum after the last step.
    weight: Float64[np.ndarray, "heads columns"]
    momentum: Float64[np.ndarray, "heads columns"]
    active: Bool[np.ndarray, "steps heads"]  # which head takes which step


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Products:
    """Products of the features of several batches, whose rows follow one another."""

    times_weight: Float[Tensor, "heads rows classes"]  # with the weights before the first step
    times_momentum: Float[Tensor, "heads rows classes"]  # with the momentum before the first step
    gram: Float[Tensor, "rows rows"]  # with one another
    sizes: list[int]  # number of rows of each step
    step_of_row: Int[Tensor, "rows"]


class LayerHeads(nn.Module):
    """One linear head per setting on the pooled features of one layer, behind a shared batch norm.

    Batch norm has no scale and shift and normalizes each channel over images and positions
    (momentum 0.1), like a BatchNorm2d before the features are flattened; no head influences it.
    Weights are drawn from N(0, 0.01), equal for all heads and on all devices; biases are zero
    (protocols.md 3.3).

    Args:
        sgd: the update rule, with one setting per head.
        dim: number of features, all positions of all channels.
        channels: number of channels for batch norm; None for no batch norm.
        n_classes: number of outputs of each head.
        seed: of the weights.
        device: where the weights are created; those of all heads may exceed other memory.
    """

    weight: Tensor
    bias: Tensor
    weight_momentum: Tensor
    bias_momentum: Tensor

    def __init__(
        self,
        sgd: Sgd,
        *,
        dim: int,
        channels: int | None,
        n_classes: int,
        seed: int,
        device: torch.device = _CPU,
    ) -> None:
        super().__init__()
        n_heads = len(sgd.settings)
        # Drawn on the CPU, as a GPU would draw other numbers from the same seed.
        generator = torch.Generator().manual_seed(seed_for(Use.HEAD_WEIGHTS, seed))
        start = torch.empty(n_classes, dim).normal_(std=0.01, generator=generator)
        start = start.to(device)
        self.sgd = sgd
        self.norm = None
        if channels is not None:
            self.norm = nn.BatchNorm1d(channels, affine=False, device=device)
        # Buffers, as `learn` moves them itself, without autograd and an optimizer.
        self.register_buffer("weight", start.repeat(n_heads, 1, 1))
        no_bias = torch.zeros(n_heads, n_classes, device=device)
        no_momentum = torch.zeros(n_heads, n_classes, dim, device=device)
        self.register_buffer("bias", no_bias)
        self.register_buffer("weight_momentum", no_momentum)
        self.register_buffer("bias_momentum", no_bias.clone())
        # Kept on the device and read once per epoch: to look each time would wait for the GPU.
        self.register_buffer("features_are_finite", torch.tensor(True, device=device))

    @torch.no_grad()
    def normalized(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Returns features after batch norm, which in training mode updates its statistics."""
        self.features_are_finite = self.features_are_finite & rows.isfinite().all()
        if self.norm is None:
            return rows
        n_channels = self.norm.num_features
        by_channel = rows.unflatten(1, (n_channels, -1))  # (b channels positions)
        normalized = self.norm(by_channel)
        return normalized.flatten(1)

    def forward(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b heads classes"]:
        """Returns the logits of each head for features before batch norm."""
        normalized = self.normalized(rows)
        return self._multiply(normalized, self.weight) + self.bias

    def is_finite(self) -> Bool[Tensor, "heads"]:
        """Returns which heads have finite weights and biases, so have not diverged."""
        weight_is_finite = self.weight.isfinite().all(dim=(1, 2))
        bias_is_finite = self.bias.isfinite().all(dim=1)
        return weight_is_finite & bias_is_finite

    @torch.no_grad()
    def learn(
        self,
        batches: Sequence[Float[Tensor, "_b d"]],
        labels: Sequence[Int[Tensor, "_b"]],
        coefficients: Coefficients,
    ) -> None:
        """Takes one step of SGD on the cross-entropy for each batch, all steps at once.

        The module's docstring explains the method.

        Args:
            batches: features from `normalized`.
            labels: the classes of each batch.
            coefficients: of these steps, from `Sgd.coefficients`.
        """
        rows = torch.cat(list(batches))
        sizes = [len(batch) for batch in batches]
        has_several = len(batches) > 1
        step_of_row = np.repeat(np.arange(len(sizes)), sizes)
        step_of_row = torch.from_numpy(step_of_row).to(rows.device, non_blocking=True)

        # 1. Products of all features with what was there before, and with one another.
        times_weight = self._multiply(rows, self.weight)
        times_weight = times_weight.transpose(0, 1)
        times_momentum = times_weight
        if has_several:  # the logits of the first step do not depend on the momentum
            times_momentum = self._multiply(rows, self.weight_momentum)
            times_momentum = times_momentum.transpose(0, 1)
        products = _Products(
            times_weight=times_weight,
            times_momentum=times_momentum,
            gram=rows @ rows.T,
            sizes=sizes,
            step_of_row=step_of_row,
        )

        # 2. Gradients by logits, step by step.
        weight_after = _to_tensor(coefficients.weight, rows)
        momentum_after = _to_tensor(coefficients.momentum, rows)
        gradients, bias_terms = self._logit_gradients(products, labels, coefficients)

        # 3. Biases and weights after all steps.
        self.bias = _weighted_sum(weight_after, bias_terms)
        self.bias_momentum = _weighted_sum(momentum_after, bias_terms)
        took_a_step = coefficients.active.any(axis=0)
        for head in np.flatnonzero(took_a_step).tolist():
            if has_several:
                columns = _GRADIENTS + step_of_row
                of_weight = weight_after[head, columns, None]
                of_momentum = momentum_after[head, columns, None]
                self._take_steps(head, rows, gradients[head], of_weight, of_momentum, coefficients)
            else:
                self._take_step(head, rows, gradients[head], coefficients)

    def _logit_gradients(
        self,
        products: "_Products",
        labels: Sequence[Int[Tensor, "_b"]],
        coefficients: Coefficients,
    ) -> tuple[Float[Tensor, "heads rows classes"], Float[Tensor, "heads columns classes"]]:
        """Returns the loss's gradients by the logits of all steps, and what biases are sums of.

        The latter are the bias before the first step, its momentum, and its gradient in each step.
        """
        before = _to_tensor(coefficients.before, products.gram)
        # Losses are means over a batch, and nothing is learned in steps that a head does not take.
        sizes = np.array(products.sizes)
        row_weights = coefficients.active / sizes[:, None]
        row_weights = _to_tensor(row_weights, products.gram)
        gradients = torch.zeros_like(products.times_weight)
        bias_terms = [self.bias, self.bias_momentum]
        end = 0
        for step, target in enumerate(labels):
            start = end
            end = start + products.sizes[step]
            now = before[step]  # (heads columns)
            weight_share = now[:, _WEIGHT, None, None]
            logits = weight_share * products.times_weight[:, start:end]
            if step:
                momentum_share = now[:, _MOMENTUM, None, None]
                logits += momentum_share * products.times_momentum[:, start:end]
                # What the gradients of earlier steps have changed about these logits: the inner
                # products of both steps' features, times the gradients by logits.
                earlier_columns = _GRADIENTS + products.step_of_row[:start]
                gradient_shares = now[:, earlier_columns]
                inner_products = products.gram[start:end, :start]
                influence = inner_products * gradient_shares[:, None]
                logits = torch.baddbmm(logits, influence, gradients[:, :start])
            bias_shares = now[:, : len(bias_terms)]
            bias = _weighted_sum(bias_shares, torch.stack(bias_terms, dim=1))
            logits += bias[:, None]

            # The gradient of cross-entropy by logits is the probabilities minus the answer.
            one_hot = nn.functional.one_hot(target, self.bias.shape[1])
            errors = logits.softmax(dim=2) - one_hot
            step_weights = row_weights[step, :, None, None]
            gradients[:, start:end] = errors * step_weights
            bias_gradient = gradients[:, start:end].sum(dim=1)
            bias_terms.append(bias_gradient)
        return gradients, torch.stack(bias_terms, dim=1)

    def _take_step(
        self,
        head: int,
        rows: Float[Tensor, "b d"],
        gradients: Float[Tensor, "b classes"],
        coefficients: Coefficients,
    ) -> None:
        """Updates a head's weights and momentum by a single step, in place.

        One product is the gradient for both.
        """
        weight = self.weight[head]
        momentum = self.weight_momentum[head]
        to_weight = coefficients.weight[head].tolist()
        to_momentum = coefficients.momentum[head].tolist()
        gradient = gradients.T @ rows
        # Both are needed from before the step, so the momentum is written last.
        next_momentum = to_momentum[_MOMENTUM] * momentum
        next_momentum = torch.add(next_momentum, weight, alpha=to_momentum[_WEIGHT])
        next_momentum.add_(gradient, alpha=to_momentum[_GRADIENTS])
        weight.mul_(to_weight[_WEIGHT])
        weight.add_(momentum, alpha=to_weight[_MOMENTUM])
        weight.add_(gradient, alpha=to_weight[_GRADIENTS])
        momentum.copy_(next_momentum)

    def _take_steps(
        self,
        head: int,
        rows: Float[Tensor, "b d"],
        gradients: Float[Tensor, "b classes"],
        of_weight: Float[Tensor, "b 1"],
        of_momentum: Float[Tensor, "b 1"],
        coefficients: Coefficients,
    ) -> None:
        """Updates a head's weights and momentum by several steps, in place.

        `of_weight` and `of_momentum` are the coefficients of each row's gradient. It is called head
        by head, as temporary results for all heads at once would take too much memory.
        """
        weight = self.weight[head]
        momentum = self.weight_momentum[head]
        to_weight = coefficients.weight[head].tolist()
        to_momentum = coefficients.momentum[head].tolist()
        for_weight = of_weight * gradients
        for_momentum = of_momentum * gradients
        # Both are needed from before the steps, so the momentum is written last.
        next_momentum = torch.addmm(
            momentum,
            for_momentum.T,
            rows,
            beta=to_momentum[_MOMENTUM],
        )
        next_momentum.add_(weight, alpha=to_momentum[_WEIGHT])
        weight.addmm_(for_weight.T, rows, beta=to_weight[_WEIGHT])
        weight.add_(momentum, alpha=to_weight[_MOMENTUM])
        momentum.copy_(next_momentum)

    def _multiply(
        self,
        rows: Float[Tensor, "b d"],
        weight: Float[Tensor, "heads classes d"],
    ) -> Float[Tensor, "b heads classes"]:
        """Returns the products of features with the weights of all heads, in one matrix product."""
        all_heads = weight.flatten(0, 1)  # (heads x classes, d)
        products = rows @ all_heads.T
        return products.unflatten(1, weight.shape[:2])


def _to_tensor(table: np.ndarray, like: Tensor) -> Tensor:
    """Returns the table with the number format and on the device of `like`."""
    tensor = torch.from_numpy(table).to(like.dtype)
    return tensor.to(like.device, non_blocking=True)


def _weighted_sum(
    coefficients: Float[Tensor, "heads columns"],
    terms: Float[Tensor, "heads columns classes"],
) -> Float[Tensor, "heads classes"]:
    """Returns the sum of coefficients times terms over the columns.

    It is written out because a matrix product in TF32 rounds to 10 bits, and biases grow by small
    steps.
    """
    return (coefficients[:, :, None] * terms).sum(dim=1)
