"""Weighted nearest neighbors, exact (protocols.md 3.7)."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from relloc import checks, ranks
from relloc.data.image_set import Splits
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import Bank, Batch, FeatureSource, bank_device, bank_gib, fill_bank, in_gib
from relloc.features.voting import vote
from relloc.results import Score, closest_to_20

_QUERY_BYTES = 2**29  # of features that meet the bank at once: it is walked through once for each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Top-1 of the weighted vote for each k that the bank allows, layer by layer.

    In a process group the bank is divided: all ranks call, and all get the scores.
    """

    kind = "frozen"
    labels = "class"
    version = 1
    across_ranks = True
    independent_layers = True
    keeps_features = True

    k: Sequence[int]
    temperature: float
    layers: Sequence[str]
    view: View
    batch: int
    bank_gib: float = dataclasses.field(repr=False)  # the fingerprint is of the repr, and memory decides no number

    def __post_init__(self) -> None:
        self.check_inputs("eval.knn")
        checks.wholes("eval.knn.k", self.k)
        checks.number("eval.knn.temperature", self.temperature, above=0)
        checks.number("eval.knn.bank_gib", self.bank_gib, at_least=0)

    def check(self, splits: Splits) -> None:
        """Raises `UsageError` where the bank has fewer images than every k."""
        if len(splits.train) < min(self.k):
            raise self._too_few(len(splits.train))

    def _too_few(self, n_images: int) -> UsageError:
        return UsageError(f"eval.knn.k {list(self.k)}: the bank has only {n_images} images")

    def run(self, context: Context) -> Iterator[Score]:
        """Scores of held-out images by their neighbors among training images. Nothing is random.

        Raises:
            UsageError: the bank would take more than `bank_gib` or than is free, has fewer images than every k, or
                features hold NaN or infinity.
        """
        bank = self._bank(context.train, context.device)
        n_images = int(ranks.total(torch.tensor(bank.n)))
        allowed = [k for k in self.k if k <= n_images]
        if not allowed:
            raise self._too_few(n_images)
        hits = {(layer, k): 0 for layer in self.layers for k in allowed}
        seen = 0
        for features, labels in self._queries(context.held_out):
            seen += len(labels)
            for layer in self.layers:
                found = vote(
                    features[layer].to(context.device),
                    bank.features[layer],
                    bank.labels,
                    k=allowed,
                    temperature=self.temperature,
                    n_classes=bank.n_classes,
                    across_ranks=True,
                    name=f"eval.knn at {layer}",
                )
                for k, classes in found.items():
                    hits[layer, k] += int((classes.cpu() == labels.cpu()).sum())
        details = [f"T={self.temperature}"]
        if beyond := [str(k) for k in self.k if k > n_images]:
            details.append(f"k={', '.join(beyond)} left out, the bank has {n_images} images")
        for (layer, k), right in hits.items():
            yield Score(
                table="Nearest neighbors, top-1",
                column=f"k={k}",
                variant=layer,
                layer=layer,
                metric=f"top1_k{k}",
                series="top1",
                k=k,
                headline=k == closest_to_20(allowed),
                value=100 * right / seen,
                n=seen,
                protocol="3.7",
                deviations=() if layer == "avgpool" else (f"features of {layer} pooled as in 3.1",),
                details=tuple(details),
            )

    def _bank(self, train: FeatureSource, device: torch.device) -> Bank:
        """The features of this rank's share of the images."""
        start, stop = (train.n * rank // ranks.world_size() for rank in (ranks.rank(), ranks.rank() + 1))
        needed = bank_gib(train, self.layers, stop - start)
        if needed > self.bank_gib:
            raise UsageError(
                f"eval.knn needs {in_gib(needed)} for {stop - start} images at {', '.join(self.layers)}, more than "
                f"bank_gib={self.bank_gib}: name fewer layers in eval.knn.layers or raise it"
            )
        if isinstance(train, Bank):  # its rows need no copy
            features = {layer: rows[start:stop] for layer, rows in train.features.items()}
            return dataclasses.replace(train, features=features, labels=train.labels[start:stop])
        return fill_bank(train, self.layers, self.batch, bank_device(needed, device), torch.arange(start, stop))

    def _queries(self, held_out: FeatureSource) -> Iterator[Batch]:
        """All of `held_out`, as many at once as `_QUERY_BYTES` hold."""
        most = max(1, _QUERY_BYTES // (4 * sum(held_out.dims[layer] for layer in self.layers)))
        size = most if isinstance(held_out, Bank) else self.batch
        gathered: list[Batch] = []
        for batch in held_out.batches(torch.arange(held_out.n), size, self.layers):
            gathered.append(batch)
            if sum(len(labels) for _, labels in gathered) >= most:
                yield _joined(gathered)
                gathered = []
        if gathered:
            yield _joined(gathered)


def _joined(batches: Sequence[tuple[dict[str, Tensor], Tensor]]) -> Batch:
    if len(batches) == 1:  # of a bank, and needs no copy
        return batches[0]
    features = {layer: torch.cat([of_batch[layer] for of_batch, _ in batches]) for layer in batches[0][0]}
    return features, torch.cat([labels for _, labels in batches])
