"""The class of an image by the weighted vote of its nearest neighbors (protocols.md 3.7)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import pad

from relloc import ranks
from relloc.features.nearest import nearest

_WEIGHT_GRID = 2**40  # votes are whole numbers: their sum, and so a tie, is the same in any order
_VOTE_BYTES = 2**28


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
    """Predicted class of each query, for each k: neighbors vote with exp(cosine / temperature).

    Neighbors, ties, memory, `across_ranks`, `chunk`, `tile` and `name` are those of `nearest`; `labels` are
    those of this rank's bank. All rows vote where there are fewer than k. Equal votes, to 2^-40 of the nearest
    neighbor's, go to the lower class.

    Raises:
        UsageError: features that hold NaN or infinity.
    """
    found = nearest(queries, bank, max(k), chunk=chunk, tile=tile, across_ranks=across_ranks, name=name)
    classes = (_of_all_ranks(labels) if across_ranks else labels).to(queries.device)[found.rows]
    # Over the nearest's, a common factor: nothing overflows, votes stay.
    weights = torch.exp((found.similarities - found.similarities[:, :1]) / temperature)
    return {count: _winner(weights[:, :count], classes[:, :count], n_classes) for count in k}


def _of_all_ranks(labels: Int[Tensor, "mine"]) -> Int[Tensor, "n"]:
    sizes = ranks.gathered(torch.tensor([len(labels)])).flatten().tolist()
    padded = ranks.gathered(pad(labels, (0, max(sizes) - len(labels))))
    return torch.cat([part[:size] for part, size in zip(padded, sizes, strict=True)])


def _winner(weights: Float64[Tensor, "q k"], classes: Int[Tensor, "q k"], n_classes: int) -> Int64[Tensor, "q"]:
    shares = weights.mul(_WEIGHT_GRID).round().long()
    winners = classes.new_empty(len(classes), dtype=torch.int64)
    size = max(1, _VOTE_BYTES // (8 * n_classes))
    for start in range(0, len(classes), size):
        part = slice(start, start + size)
        votes = shares.new_zeros((len(shares[part]), n_classes))
        winners[part] = votes.scatter_add_(1, classes[part], shares[part]).argmax(dim=1)
    return winners
