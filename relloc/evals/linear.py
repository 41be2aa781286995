"""Linear classifiers on frozen features, all layers and learning rates in one pass (protocols.md 3.3)."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc.features.source import FeatureSource
from relloc.results import Score, check_layers

_HELD_BACK = 10  # one in ten training images chooses the learning rate


class Heads(nn.Module):
    """For each layer one batch norm without scale and shift, then one linear head a learning rate.

    Batch norm on pooled maps normalizes each channel over images and places (momentum 0.1), as
    BatchNorm2d before the flattening does. Weights are N(0, 0.01), biases zero; `seed` starts the
    weights of every head anew, so that no head depends on which others are trained beside it.
    """

    def __init__(
        self, dims: dict[str, int], channels: dict[str, int], n_heads: int, n_classes: int, *, seed: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.norms = nn.ModuleDict({layer: nn.BatchNorm1d(channels[layer], affine=False) for layer in dims})
        self.heads = nn.ModuleDict(
            {layer: nn.ModuleList(_head(dim, n_classes, seed) for _ in range(n_heads)) for layer, dim in dims.items()}
        )

    def forward(self, features: dict[str, Float[Tensor, "b _d"]]) -> dict[str, list[Float[Tensor, "b classes"]]]:
        """Logits by layer, one tensor a learning rate."""
        logits = {}
        for layer, heads in self.heads.items():
            rows = features[layer]
            maps = rows.unflatten(1, (self.channels[layer], -1))
            normalized = self.norms[layer](maps).flatten(1)
            logits[layer] = [head(normalized) for head in heads]  # pyright: ignore[reportGeneralTypeIssues]
        return logits


def _head(dim: int, n_classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(dim, n_classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """SGD with momentum and Nesterov, the rate times `gamma` at the milestones; losses summed.

    With one learning rate all training images train. With several, every tenth is held back to
    choose the rate of each layer, and is not trained on; val only reports.
    """

    layers: Sequence[str]
    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    learning_rates: Sequence[float]
    momentum: float
    weight_decay: float
    batch: int

    def __post_init__(self) -> None:
        check_layers("eval.linear.layers", self.layers)
        if not self.learning_rates:
            raise ValueError("eval.linear.learning_rates is empty: give at least one")

    def __call__(
        self, train: FeatureSource, held_out: FeatureSource, *, device: torch.device, seed: int
    ) -> Iterator[Score]:
        """Top-1 of the last epoch on `held_out`, one score a layer."""
        order = torch.randperm(train.n, generator=torch.Generator().manual_seed(seed))
        held_back = order[: max(1, train.n // _HELD_BACK)] if len(self.learning_rates) > 1 else order[:0]
        trained_on = order[len(held_back) :]
        heads = self._heads(train, seed).to(device)
        self._fit(heads, train, trained_on, device, seed)
        heads.eval()
        chosen = self._choose(heads, train, held_back, device)
        hits, seen = count_hits(heads, held_out, torch.arange(held_out.n), self.layers, self.batch, device)
        for layer in self.layers:
            value = 100 * hits[layer][chosen[layer]].item() / seen
            rate = self.learning_rates[chosen[layer]]
            yield Score(layer=layer, metric="top1", value=value, n=seen, protocol=self._protocol(rate))

    def _heads(self, train: FeatureSource, seed: int) -> Heads:
        dims = {layer: train.dims[layer] for layer in self.layers}
        channels = {layer: train.channels[layer] for layer in dims}
        return Heads(dims, channels, len(self.learning_rates), train.n_classes, seed=seed)

    def _fit(self, heads: Heads, train: FeatureSource, places: Tensor, device: torch.device, seed: int) -> None:
        optimizer = self._optimizer(heads)
        base = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(seed)
        heads.train()
        for epoch in range(self.epochs):
            factor = self.gamma ** bisect.bisect_right(self.milestone_epochs, epoch)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            shuffled = places[torch.randperm(len(places), generator=generator)]
            for features, labels in train.batches(shuffled, self.batch, self.layers):
                if len(labels) > 1:  # batch norm knows no variance of one
                    self._step(heads, optimizer, features, labels, device)

    def _optimizer(self, heads: Heads) -> torch.optim.SGD:
        groups = []
        for place, rate in enumerate(self.learning_rates):
            at_rate = [heads.heads[layer][place] for layer in self.layers]  # pyright: ignore[reportIndexIssue]
            groups.append({"params": [p for head in at_rate for p in head.parameters()], "lr": rate})
        return torch.optim.SGD(
            groups, lr=groups[0]["lr"], momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )

    def _step(
        self,
        heads: Heads,
        optimizer: torch.optim.SGD,
        features: dict[str, Tensor],
        labels: Tensor,
        device: torch.device,
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = heads({layer: rows.to(device) for layer, rows in features.items()})
        target = labels.to(device)
        losses = [cross_entropy(one, target) for of_layer in logits.values() for one in of_layer]
        torch.stack(losses).sum().backward()
        optimizer.step()

    def _choose(self, heads: Heads, train: FeatureSource, held_back: Tensor, device: torch.device) -> dict[str, int]:
        if not len(held_back):
            return dict.fromkeys(self.layers, 0)
        hits, _ = count_hits(heads, train, held_back, self.layers, self.batch, device)
        return {layer: int(right.argmax()) for layer, right in hits.items()}

    def _protocol(self, rate: float) -> str:
        how = f"lr {rate}, {self.epochs} epochs, batch {self.batch}"
        if len(self.learning_rates) > 1:
            how += f", rate chosen among {len(self.learning_rates)} on a held-back tenth of train"
        return f"3.3 one head a stage, {how}; deviation: one fixed center view, no augmentation"


@torch.no_grad()
def count_hits(
    heads: Heads,
    source: FeatureSource,
    places: Int[Tensor, "m"],
    layers: Sequence[str],
    size: int,
    device: torch.device,
) -> tuple[dict[str, Int[Tensor, "rates"]], int]:
    """Right answers of each head by layer, and how many images were asked."""
    hits: dict[str, Tensor] = {}
    seen = 0
    for features, labels in source.batches(places, size, layers):
        logits = heads({layer: rows.to(device) for layer, rows in features.items()})
        target = labels.to(device)
        for layer, of_layer in logits.items():
            right = torch.stack([(one.argmax(dim=1) == target).sum() for one in of_layer]).cpu()
            hits[layer] = hits.get(layer, torch.zeros_like(right)) + right
        seen += len(labels)
    return hits, seen
