"""Weighted nearest neighbors, exact (protocols.md 3.7)."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from relloc.errors import UsageError
from relloc.features.source import Bank, FeatureSource, bank_device, bank_gib, fill_bank
from relloc.results import Score, check_layers


def vote(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    *,
    k: Sequence[int],
    temperature: float,
    n_classes: int,
    chunk: int = 65536,
) -> dict[int, Int[Tensor, "q"]]:
    """Predicted class of each query, for each k: neighbors vote with exp(cosine / temperature).

    Rows are L2-normalized here. The bank is read in chunks of rows, so memory is bounded by
    queries x chunk. Equal similarities go to the earlier row, equal votes to the lower class.
    """
    queries = normalize(queries, dim=1)
    best = queries.new_full((len(queries), 0), 0.0)
    places = labels.new_zeros((len(queries), 0)).to(queries.device)
    for start in range(0, len(bank), chunk):
        rows = normalize(bank[start : start + chunk].to(queries), dim=1)
        similar = torch.cat([best, queries @ rows.T], dim=1)
        here = torch.arange(start, start + len(rows), device=queries.device).expand(len(queries), -1)
        order = similar.argsort(dim=1, descending=True, stable=True)[:, : max(k)]
        best = similar.gather(1, order)
        places = torch.cat([places, here], dim=1).gather(1, order)
    weights = torch.exp((best - best[:, :1]) / temperature)  # a common factor: nothing overflows, votes stay
    classes = labels.to(queries.device)[places]
    return {count: _winner(weights[:, :count], classes[:, :count], n_classes) for count in k}


def _winner(weights: Float[Tensor, "q k"], classes: Int[Tensor, "q k"], n_classes: int) -> Int[Tensor, "q"]:
    votes = weights.new_zeros((len(weights), n_classes))
    return votes.scatter_add_(1, classes, weights).argmax(dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn:
    """Top-1 of the weighted vote for each k that the bank allows, layer by layer."""

    k: Sequence[int]
    temperature: float
    layers: Sequence[str]
    batch: int
    bank_gib: float

    def __post_init__(self) -> None:
        check_layers("eval.knn.layers", self.layers)
        if not self.k or min(self.k) < 1:
            raise ValueError(f"eval.knn.k is {list(self.k)}: give numbers of neighbors of 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"eval.knn.temperature is {self.temperature}, not above 0")

    def __call__(
        self, train: FeatureSource, held_out: FeatureSource, *, device: torch.device, seed: int
    ) -> Iterator[Score]:
        """Scores of `held_out` by the neighbors in `train`. Nothing is random: `seed` is not used.

        Raises:
            UsageError: the bank would take more than `bank_gib`, or has fewer images than every k.
        """
        needed = bank_gib(train, self.layers)
        if needed > self.bank_gib:
            raise UsageError(
                f"eval.knn needs {needed:.1f} GiB for {train.n} images at {', '.join(self.layers)}, more than "
                f"bank_gib={self.bank_gib}: name fewer layers in eval.knn.layers or raise it"
            )
        bank = (
            train if isinstance(train, Bank) else fill_bank(train, self.layers, self.batch, bank_device(needed, device))
        )
        allowed = [k for k in self.k if k <= bank.n]
        if not allowed:
            raise UsageError(f"eval.knn.k {list(self.k)}: the bank has only {bank.n} images")
        hits = {(layer, k): 0 for layer in self.layers for k in allowed}
        seen = 0
        for features, labels in held_out.batches(torch.arange(held_out.n), self.batch, self.layers):
            seen += len(labels)
            for layer in self.layers:
                found = self._vote(bank, layer, features[layer].to(device), allowed)
                for k, classes in found.items():
                    hits[layer, k] += int((classes.cpu() == labels).sum())
        for (layer, k), right in hits.items():
            yield Score(
                layer=layer, metric=f"top1_k{k}", value=100 * right / seen, n=seen, protocol=self._protocol(layer)
            )

    def _vote(self, bank: Bank, layer: str, queries: Tensor, k: Sequence[int]) -> dict[int, Tensor]:
        return vote(
            queries, bank.features[layer], bank.labels, k=k, temperature=self.temperature, n_classes=bank.n_classes
        )

    def _protocol(self, layer: str) -> str:
        if layer == "avgpool":
            return f"3.7 weighted kNN, T={self.temperature}"
        return f"3.7 weighted kNN, T={self.temperature}; deviation: features of {layer} pooled as in 3.1"
