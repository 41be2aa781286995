"""Classifies images by a weighted vote of their nearest neighbors (docs/protocols.md 3.7)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import pad

from relloc import ranks
from relloc.features.nearest import nearest

# Votes are counted as whole multiples of 2^-40. So their sum is the same in any order, and equal
# votes are equal to the bit.
_VOTE_GRID = 2**40
_VOTE_BYTES = 2**28  # memory for the votes that are counted at once
_BYTES_PER_VOTE = 8


def vote(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    *,
    k: Sequence[int],
    temperature: float,
    n_classes: int,
    chunk: int | None = None,
    tile: int | None = None,
    across_ranks: bool = False,
    name: str = "features",
) -> dict[int, Int64[Tensor, "q"]]:
    """Returns the predicted class of each query, for each number `k` of neighbors.

    A neighbor votes for its class with the weight exp(cosine / temperature). All rows of the bank
    vote where there are fewer than k. Equal votes, to 2^-40 of the nearest neighbor's, go to the
    lower class.

    Memory, ties between neighbors, `across_ranks`, `chunk`, `tile` and `name` are as in `nearest`.
    With `across_ranks`, `labels` are those of this rank's part of the bank.

    Example:
        predicted = vote(val, train, train_labels, k=(20, 200), temperature=0.07, n_classes=1000)
        top1 = (predicted[20] == val_labels).double().mean()

    Raises:
        UsageError: features contain NaN or infinity.
    """
    neighbors = nearest(
        queries,
        bank,
        max(k),
        chunk=chunk,
        tile=tile,
        across_ranks=across_ranks,
        name=name,
    )
    # Rows are numbered through the banks of all ranks, and so labels have to be.
    all_labels = _gather_labels(labels) if across_ranks else labels
    labels_on_device = all_labels.to(queries.device)
    classes = labels_on_device[neighbors.rows]
    # Weights relative to the nearest neighbor's: a common factor changes no vote, and without it
    # the exponential of a low temperature overflows.
    similarities = neighbors.similarities
    differences = similarities - similarities[:, :1]
    weights = torch.exp(differences / temperature)
    predictions = {}
    for n_neighbors in k:
        predictions[n_neighbors] = _winning_classes(
            weights[:, :n_neighbors],
            classes[:, :n_neighbors],
            n_classes,
        )
    return predictions


def _gather_labels(labels: Int[Tensor, "mine"]) -> Int[Tensor, "n"]:
    """Returns the labels of all ranks, in the order of ranks."""
    counts = ranks.gathered(torch.tensor([len(labels)]))
    n_labels = counts.flatten().tolist()
    # A collective needs tensors of one size.
    padding = max(n_labels) - len(labels)
    padded_labels = pad(labels, (0, padding))
    gathered = ranks.gathered(padded_labels)
    parts = []
    for padded, n in zip(gathered, n_labels, strict=True):
        parts.append(padded[:n])
    return torch.cat(parts)


def _winning_classes(
    weights: Float64[Tensor, "q k"],
    classes: Int[Tensor, "q k"],
    n_classes: int,
) -> Int64[Tensor, "q"]:
    """Returns the class with the largest sum of weights for each query."""
    votes = weights.mul(_VOTE_GRID).round().long()
    winners = classes.new_empty(len(classes), dtype=torch.int64)
    # A row of one number per class for each query may not fit into memory for all queries at once.
    queries_at_once = max(1, _VOTE_BYTES // (_BYTES_PER_VOTE * n_classes))
    for start in range(0, len(classes), queries_at_once):
        part = slice(start, start + queries_at_once)
        votes_of_part = votes[part]
        n_queries = len(votes_of_part)
        sums = votes.new_zeros((n_queries, n_classes))
        sums.scatter_add_(1, classes[part], votes_of_part)
        # Of equal sums argmax takes the lower class.
        winners[part] = sums.argmax(dim=1)
    return winners
