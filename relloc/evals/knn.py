"""Classifies images by a weighted vote of their exact nearest neighbors (protocols.md 3.7).

The neighbors are training images, whose features form the "bank". With several processes the bank
is divided among them, and every process votes on all queries.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from relloc import checks, ranks
from relloc.data.image_set import Splits
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.bank import Bank, bank_device, bank_gib, fill_bank, format_gib
from relloc.features.source import FeatureBatch, FeatureSource
from relloc.features.voting import vote
from relloc.results import Score, closest_to_20
from relloc.terminal import quantity

# Memory of the queries that are compared with the bank at once. The whole bank is read once for
# each such group, so larger groups save time.
_QUERY_BYTES = 2**29


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Top-1 accuracy of the weighted vote of k nearest neighbors, for each k and layer.

    In a process group all ranks call `run`, and all get the same scores.

    `k`: the numbers of neighbors. `temperature`: a neighbor votes with exp(cosine / temperature).
    `layers`: the layers to measure. `view`: how images are cropped and resized.
    `batch`: the number of images that are read at once.
    `bank_gib`: the most memory, in GiB, for the bank of each process.

    Raises:
        UsageError: one of these is wrong.
    """

    kind = "frozen"
    labels = "class"
    may_decode_on_device = True
    version = 1
    across_ranks = True  # the bank is divided
    independent_layers = True
    keeps_features = True  # other evaluations may read the same ones

    k: Sequence[int]
    temperature: float
    layers: Sequence[str]
    view: View
    batch: int
    # Not in the repr, which is hashed to recognize results: memory decides no number.
    bank_gib: float = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        self.check_inputs("eval.knn")
        checks.wholes("eval.knn.k", self.k)
        checks.number("eval.knn.temperature", self.temperature, above=0)
        checks.number("eval.knn.bank_gib", self.bank_gib, at_least=0)

    def check(self, splits: Splits) -> None:
        """Raises `UsageError` if there are fewer training images than every k."""
        n_images = len(splits.train)
        if n_images < min(self.k):
            raise self._too_few(n_images)

    def _too_few(self, n_images: int) -> UsageError:
        return UsageError(
            f"eval.knn.k {list(self.k)}: the bank has only {quantity(n_images, 'image')}. "
            f"Give a k of {n_images} or less, or more training images"
        )

    def run(self, context: Context) -> Iterator[Score]:
        """Yields the accuracy on held-out images for each layer and k. Nothing is random.

        Raises:
            UsageError: the bank would take more memory than `bank_gib` or than is free, there are
                fewer images than every k, or features hold NaN or infinity.
        """
        # Every rank has a part of the bank; counts and messages are about all of it.
        bank = self._fill_bank(context.train, context.device)
        n_images = int(ranks.total(torch.tensor(bank.n)))
        possible = [k for k in self.k if k <= n_images]
        if not possible:
            raise self._too_few(n_images)

        hits: dict[tuple[str, int], int] = {}
        for layer in self.layers:
            for k in possible:
                hits[layer, k] = 0
        n_queries = 0
        for features, labels in self._queries(context.held_out):
            n_queries += len(labels)
            for layer in self.layers:
                # One search for the largest k serves all of them.
                predictions = vote(
                    features[layer].to(context.device),
                    bank.features[layer],
                    bank.labels,
                    k=possible,
                    temperature=self.temperature,
                    n_classes=bank.n_classes,
                    across_ranks=True,
                    name=f"eval.knn at {layer}",
                )
                for k, classes in predictions.items():
                    is_right = classes.cpu() == labels.cpu()
                    hits[layer, k] += int(is_right.sum())

        details = [f"T={self.temperature}"]
        too_many = [str(k) for k in self.k if k > n_images]
        if too_many:
            names = ", ".join(too_many)
            details.append(f"k={names} left out, the bank has {n_images} images")
        for (layer, k), n_right in hits.items():
            # The protocol is for avgpool; other layers are measured the same way.
            deviations = () if layer == "avgpool" else (f"features of {layer} pooled as in 3.1",)
            yield Score(
                table="Nearest neighbors, top-1",
                column=f"k={k}",
                variant=layer,
                layer=layer,
                metric=f"top1_k{k}",
                series="top1",
                k=k,
                headline=k == closest_to_20(possible),
                value=100 * n_right / n_queries,
                n=n_queries,
                protocol="3.7",
                deviations=deviations,
                details=tuple(details),
            )

    def _fill_bank(
        self,
        train: FeatureSource,
        device: torch.device,
    ) -> Bank:
        """Returns the features of this rank's share of the training images."""
        # Shares are contiguous, and as equal as possible.
        rank = ranks.rank()
        world_size = ranks.world_size()
        start = train.n * rank // world_size
        stop = train.n * (rank + 1) // world_size
        n_images = stop - start
        needed = bank_gib(train, self.layers, n_images)
        if needed > self.bank_gib:
            layers = ", ".join(self.layers)
            raise UsageError(
                f"eval.knn needs {format_gib(needed)} for {quantity(n_images, 'image')} at "
                f"{layers}, more than "
                f"bank_gib={self.bank_gib}: name fewer layers in eval.knn.layers or raise bank_gib"
            )
        if isinstance(train, Bank):
            # Features are in memory already: slices of them need no copy.
            features = {}
            for layer, rows in train.features.items():
                features[layer] = rows[start:stop]
            labels = train.labels[start:stop]
            return dataclasses.replace(train, features=features, labels=labels)
        # A bank that would fill the GPU is kept in other memory, and compared part by part.
        return fill_bank(
            train,
            self.layers,
            self.batch,
            bank_device(needed, device),
            torch.arange(start, stop),
        )

    def _queries(self, held_out: FeatureSource) -> Iterator[FeatureBatch]:
        """Yields all held-out features and labels, in groups that fill about `_QUERY_BYTES`."""
        n_values = sum(held_out.dims[layer] for layer in self.layers)
        group_size = max(1, _QUERY_BYTES // (4 * n_values))
        # Images are encoded in batches of the usual size; features in memory need no batches.
        size = group_size if isinstance(held_out, Bank) else self.batch
        group: list[FeatureBatch] = []
        n_in_group = 0
        indices = torch.arange(held_out.n)
        for features, labels in held_out.batches(indices, size, self.layers):
            group.append((features, labels))
            n_in_group += len(labels)
            if n_in_group >= group_size:
                yield _join(group)
                group = []
                n_in_group = 0
        if group:
            yield _join(group)


def _join(batches: Sequence[tuple[dict[str, Tensor], Tensor]]) -> FeatureBatch:
    """Returns several batches as one."""
    if len(batches) == 1:  # as from a bank: it needs no copy
        return batches[0]
    by_layer: dict[str, list[Tensor]] = {}
    all_labels = []
    for features, labels in batches:
        all_labels.append(labels)
        for layer, rows in features.items():
            by_layer.setdefault(layer, []).append(rows)
    joined = {}
    for layer, rows in by_layer.items():
        joined[layer] = torch.cat(rows)
    return joined, torch.cat(all_labels)
