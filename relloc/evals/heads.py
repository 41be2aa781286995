"""Many linear classifiers of one layer, trained side by side as if each were alone.

Features are frozen, so what the classifiers see does not depend on them. That makes several SGD
steps one: with the features of the next K batches at hand, the logits of all K steps follow from
one product with the weights (and one with the momentum), from products of features with features,
and from the gradients by logits as they come. After K steps the sum of their weight gradients is
added in one product. Nothing is approximated: SGD is linear in what it adds up, so weights after k
steps are a sum of the weights, the momentum and k gradients before, with coefficients that follow
from learning rate, decay and momentum alone.

It saves memory traffic. 55 heads on five layers of ImageNet are 1.9 GB; a step alone reads or
writes that much seven times at the least, 4.5 ms at 3 TB/s, and multiplies 0.5 TFLOP. K steps
together pass it 14 times in all and multiply 1 TFLOP a step: at K = 16 0.6 ms of traffic.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from relloc.seeds import Use, seed_for

_WEIGHT, _MOMENTUM, _GRADIENTS = 0, 1, 2  # what the columns of coefficients multiply; gradients are the rest
_LARGEST = float(np.finfo(np.float32).max)
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How one head differs from the others; `sees_all`: also the training images that choose among heads."""

    lr: float
    weight_decay: float
    sees_all: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd:
    """The rule that all heads of a layer follow, torch.optim.SGD's without dampening."""

    settings: tuple[Setting, ...]
    momentum: float
    nesterov: bool

    def coefficients(self, active: Bool[np.ndarray, "steps heads"], factor: float) -> "Coefficients":
        """What the weights are made of before each step and after the last, rates times `factor`.

        A head takes only the steps in which it is `active`.
        """
        steps, heads = active.shape
        lr = factor * np.array([[setting.lr] for setting in self.settings])
        decay = np.array([[setting.weight_decay] for setting in self.settings])
        weight, momentum = np.zeros((2, heads, _GRADIENTS + steps))
        weight[:, _WEIGHT], momentum[:, _MOMENTUM] = 1, 1
        weights = [weight]
        for step, takes_part in enumerate(active):
            pull = decay * weight
            pull[:, _GRADIENTS + step] += 1
            grown = self.momentum * momentum + pull
            moved = weight - lr * (pull + self.momentum * grown if self.nesterov else grown)
            momentum = np.where(takes_part[:, None], grown, momentum)
            weight = np.where(takes_part[:, None], moved, weight)
            weights.append(weight)
        # Of rates far too large; what they multiply still overflows, so that such a head is seen to diverge.
        before, weight, momentum = (
            np.clip(one, -_LARGEST, _LARGEST) for one in (np.stack(weights[:-1]), weight, momentum)
        )
        return Coefficients(before=before, weight=weight, momentum=momentum, active=active)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Weights `before` each step, and `weight` and `momentum` after the last, as sums over columns.

    Columns are: weights and momentum before the first step, and the gradient of each step.
    """

    before: Float64[np.ndarray, "steps heads columns"]
    weight: Float64[np.ndarray, "heads columns"]
    momentum: Float64[np.ndarray, "heads columns"]
    active: Bool[np.ndarray, "steps heads"]


class LayerHeads(nn.Module):
    """One linear head a setting on one layer's pooled features, behind one batch norm for all.

    Batch norm has no scale and shift and normalizes each channel over images and places (momentum
    0.1), as BatchNorm2d before the flattening does; it depends on no head. `channels` is None for
    none. Weights are N(0, 0.01) from `seed`, the same for each head and on each device, biases zero
    (protocols.md 3.3). They are made on `device`: those of all heads may be more than other memory holds.
    """

    weight: Tensor
    bias: Tensor
    weight_momentum: Tensor
    bias_momentum: Tensor

    def __init__(
        self, sgd: Sgd, *, dim: int, channels: int | None, n_classes: int, seed: int, device: torch.device = _CPU
    ) -> None:
        super().__init__()
        heads = len(sgd.settings)
        generator = torch.Generator().manual_seed(seed_for(Use.HEAD_WEIGHTS, seed))
        start = torch.empty(n_classes, dim).normal_(std=0.01, generator=generator)
        self.sgd = sgd
        self.norm = None if channels is None else nn.BatchNorm1d(channels, affine=False, device=device)
        self.register_buffer("weight", start.to(device).repeat(heads, 1, 1))
        self.register_buffer("bias", torch.zeros(heads, n_classes, device=device))
        self.register_buffer("weight_momentum", torch.zeros(heads, n_classes, dim, device=device))
        self.register_buffer("bias_momentum", torch.zeros(heads, n_classes, device=device))
        self.register_buffer("features_are_finite", torch.tensor(True, device=device))

    @torch.no_grad()
    def normalized(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Features as heads see them; in training mode they also move the running statistics."""
        self.features_are_finite = self.features_are_finite & rows.isfinite().all()
        if self.norm is None:
            return rows
        return self.norm(rows.unflatten(1, (self.norm.num_features, -1))).flatten(1)

    def forward(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b heads classes"]:
        """Logits of each head."""
        return self._products(self.normalized(rows), self.weight) + self.bias

    def finite(self) -> Bool[Tensor, "heads"]:
        """Which heads have not diverged."""
        return self.weight.isfinite().all(dim=(1, 2)) & self.bias.isfinite().all(dim=1)

    @torch.no_grad()
    def learn(
        self, batches: Sequence[Float[Tensor, "_b d"]], labels: Sequence[Int[Tensor, "_b"]], ways: Coefficients
    ) -> None:
        """One step for each batch of `normalized` features, all in one go."""
        rows = torch.cat(list(batches))
        sizes = [len(batch) for batch in batches]
        several = len(batches) > 1
        step_of_row = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(rows.device, non_blocking=True)
        # Products of all rows with what was there before, and with each other
        of_weight = self._products(rows, self.weight).transpose(0, 1)
        of_momentum = self._products(rows, self.weight_momentum).transpose(0, 1) if several else of_weight
        alike = rows @ rows.T
        before, after, momentum_after = (_like(rows, table) for table in (ways.before, ways.weight, ways.momentum))
        shares = _like(rows, ways.active / np.array(sizes)[:, None])  # losses are means over a batch
        gradients = torch.zeros_like(of_weight)  # by logits
        biases = [self.bias, self.bias_momentum]  # and their gradients: what biases are sums of
        end = 0
        for step, target in enumerate(labels):
            start, end = end, end + sizes[step]
            way = before[step]
            # Logits as they are before the step, given the gradients of the rows of earlier steps
            logits = way[:, _WEIGHT, None, None] * of_weight[:, start:end]
            if step:
                logits += way[:, _MOMENTUM, None, None] * of_momentum[:, start:end]
                moved = alike[start:end, :start] * way[:, _GRADIENTS + step_of_row[:start]][:, None]
                logits = torch.baddbmm(logits, moved, gradients[:, :start])
            logits += _combined(way[:, : len(biases)], torch.stack(biases, dim=1))[:, None]
            answers = nn.functional.one_hot(target, self.bias.shape[1])
            gradients[:, start:end] = (logits.softmax(dim=2) - answers) * shares[step, :, None, None]
            biases.append(gradients[:, start:end].sum(dim=1))
        parts = torch.stack(biases, dim=1)
        self.bias, self.bias_momentum = _combined(after, parts), _combined(momentum_after, parts)
        for head in np.flatnonzero(ways.active.any(axis=0)).tolist():
            of_rows = None
            if several:
                of_rows = [table[head, _GRADIENTS + step_of_row, None] for table in (after, momentum_after)]
            self._move(head, rows, gradients[head], of_rows, ways)

    def _move(
        self, head: int, rows: Tensor, gradients: Tensor, of_rows: list[Tensor] | None, ways: Coefficients
    ) -> None:
        """A head's weights and momentum after the steps, in place; of all heads at once it would take more room.

        `of_rows` are the coefficients of each row's gradient; None after a single step, where one product serves both.
        """
        weight, momentum = self.weight[head], self.weight_momentum[head]
        to_weight, to_momentum = ways.weight[head].tolist(), ways.momentum[head].tolist()
        if of_rows is None:
            gradient = gradients.T @ rows
            grown = torch.add(to_momentum[_MOMENTUM] * momentum, weight, alpha=to_momentum[_WEIGHT])
            grown.add_(gradient, alpha=to_momentum[_GRADIENTS])
            weight.mul_(to_weight[_WEIGHT]).add_(momentum, alpha=to_weight[_MOMENTUM])
            weight.add_(gradient, alpha=to_weight[_GRADIENTS])
        else:
            of_weight, of_momentum = (coefficients * gradients for coefficients in of_rows)
            grown = torch.addmm(momentum, of_momentum.T, rows, beta=to_momentum[_MOMENTUM])
            grown.add_(weight, alpha=to_momentum[_WEIGHT])
            weight.addmm_(of_weight.T, rows, beta=to_weight[_WEIGHT]).add_(momentum, alpha=to_weight[_MOMENTUM])
        momentum.copy_(grown)

    def _products(
        self, rows: Float[Tensor, "b d"], weight: Float[Tensor, "heads classes d"]
    ) -> Float[Tensor, "b heads classes"]:
        return (rows @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])


def _like(rows: Tensor, table: np.ndarray) -> Tensor:
    return torch.from_numpy(table).to(rows.dtype).to(rows.device, non_blocking=True)


def _combined(
    ways: Float[Tensor, "heads columns"], parts: Float[Tensor, "heads columns classes"]
) -> Float[Tensor, "heads classes"]:
    """Sums of parts, written out: a product might be rounded to 19 bits, and biases grow by small steps."""
    return (ways[:, :, None] * parts).sum(dim=1)
