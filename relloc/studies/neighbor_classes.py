"""How many neighbors of a patch are of its class, and how many would be by chance."""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

# Half the width of a 95 % interval, in standard errors of a mean.
_Z_95 = 1.96


def shares_of_class(
    rows: Int64[Tensor, "q k"],
    exists: Bool[Tensor, "q k"],
    query_labels: Int64[Tensor, "q"],
    patch_labels: Int64[Tensor, "n"],
) -> Float64[Tensor, "q"]:
    """Returns the share of each query's neighbors whose image has the class of the query's."""
    is_same = patch_labels[rows] == query_labels.unsqueeze(1)
    n_same = (is_same & exists).sum(dim=1)
    return n_same.double() / exists.sum(dim=1)


def chances_of_class(
    query_labels: Int64[Tensor, "q"],
    excluded: Int64[Tensor, "q"],
    own_rows: Int64[Tensor, "q"] | None,
    patch_labels: Int64[Tensor, "n"],
    groups: Int64[Tensor, "n"],
) -> Float64[Tensor, "q"]:
    """Returns the share of the query's class among all patches that may be its neighbors.

    `excluded` is the group that gives none, and `own_rows` the queries' own rows, if they have any.
    """
    chances = []
    for query, label in enumerate(query_labels.tolist()):
        is_eligible = groups != excluded[query]
        if own_rows is not None:
            is_eligible[own_rows[query]] = False
        is_same = is_eligible & (patch_labels == label)
        chances.append(int(is_same.sum()) / int(is_eligible.sum()))
    return torch.tensor(chances, dtype=torch.float64)


def mean_interval(shares: Float[Tensor, "q"]) -> tuple[float | None, float | None]:
    """Returns a 95 % interval of the mean share of random queries, in percent.

    A single one has none.
    """
    n = len(shares)
    if n < 2:
        return None, None
    mean = float(shares.mean())
    # Queries are of different images, and count as independent.
    half_width = _Z_95 * float(shares.std()) / math.sqrt(n)
    return 100 * max(0.0, mean - half_width), 100 * min(1.0, mean + half_width)
