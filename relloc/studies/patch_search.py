"""Finds the nearest patches of others by normalized correlation, exactly, in any number of them.

`relloc.features.nearest` finds the nearest rows of a matrix. Here some of them do not count: those
of the query's own image, and all but the nearest of each other image.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.features.chunks import chunks_on_device
from relloc.features.nearest import nearest

NONE = -1  # the row of a neighbor that does not exist, and the group of a query that has none
_QUERY = -2  # the group that the query itself gets among its neighbors
# Vectors that are multiplied with the queries at once, for the mean correlation.
_CHUNK = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NearestPatches:
    """The nearest patches of each query, nearest first, on the CPU.

    `rows` are those of the vectors that were searched, and `NONE` at the end where there are fewer
    than were asked for; their `similarities` are 0.
    """

    rows: Int64[Tensor, "q k"]
    similarities: Float64[Tensor, "q k"]


def source_groups(images: ImageSet, indices: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """Returns the number of the source of each image, counted from 0 in order of appearance.

    Tiles of one photograph have one source: as neighbors of each other they would show the same.
    """
    number_of_source: dict[str, int] = {}
    number_of_image: dict[int, int] = {}
    groups = []
    for index in indices.tolist():
        if index not in number_of_image:
            source = images.source(index)
            number_of_image[index] = number_of_source.setdefault(source, len(number_of_source))
        groups.append(number_of_image[index])
    return torch.tensor(groups, dtype=torch.int64)


def nearest_patches(
    queries: Float[Tensor, "q d"],
    vectors: Float[Tensor, "n d"],
    groups: Int64[Tensor, "n"],
    k: int,
    *,
    own_groups: Int64[Tensor, "q"],
    own_rows: Int64[Tensor, "q"] | None = None,
    one_per_group: bool,
    name: str,
) -> NearestPatches:
    """Returns the `k` nearest of `vectors`, leaving out those that do not count.

    Among equally near ones, to 2^-40, the earlier one comes first. The search is done on the device
    of `queries`; `vectors` may be on the CPU, and of lower precision.

    Args:
        queries: unit vectors of query patches (`relloc.studies.patch_vectors.unit_vectors`).
        vectors: unit vectors of the patches that are searched.
        groups: the image, or source, of each of `vectors`, from 0.
        k: number of neighbors.
        own_groups: the group of each query, from which it takes no neighbor; `NONE` for none.
        own_rows: the row of each query among `vectors`, which is no neighbor of its own; None, or
            `NONE`, where it is not among them.
        one_per_group: whether each group gives its nearest patch alone.
        name: what a message calls the vectors.

    Raises:
        UsageError: vectors contain NaN or infinity.
    """
    n_queries = len(queries)
    n_vectors = len(vectors)
    rows = torch.full((n_queries, k), NONE)
    similarities = torch.zeros(n_queries, k, dtype=torch.float64)
    if own_rows is None:
        own_rows = torch.full((n_queries,), NONE)
    remaining = torch.arange(n_queries)
    # All patches of its own image may be nearer to a query than any other.
    largest_group = int(groups.bincount().max()) if n_vectors else 0
    n_asked = min(n_vectors, largest_group + 2 * k)
    while len(remaining):
        found = nearest(
            queries[remaining.to(queries.device)],
            vectors,
            n_asked,
            name=name,
        )
        found_rows = found.rows.cpu()
        is_query = found_rows == own_rows[remaining].unsqueeze(1)
        # A group of its own, so that it does not stand for its image.
        found_groups = groups[found_rows].masked_fill(is_query, _QUERY)
        counts = _counting(found_groups, own_groups[remaining], one_per_group) & ~is_query
        # The first k that count: what lies behind them in the list is not nearer.
        position = counts.cumsum(dim=1) - 1
        is_taken = counts & (position < k)
        query, column = is_taken.nonzero(as_tuple=True)
        target = (remaining[query], position[query, column])
        rows[target] = found_rows[query, column]
        similarities[target] = found.similarities.cpu()[query, column]
        is_short = counts.sum(dim=1) < k
        # Of all patches no more can be asked for.
        if n_asked == n_vectors:
            break
        remaining = remaining[is_short]
        n_asked = min(n_vectors, 2 * n_asked)
    return NearestPatches(rows=rows, similarities=similarities)


def _counting(
    groups: Int64[Tensor, "q m"], own_groups: Int64[Tensor, "q"], one_per_group: bool
) -> Bool[Tensor, "q m"]:
    """Returns which neighbors count, given the groups of the nearest ones, nearest first."""
    counts = groups != own_groups.unsqueeze(1)
    if not one_per_group:
        return counts
    # A stable sort keeps the nearest patch of each group in front of its others.
    ordered, columns = groups.sort(dim=1, stable=True)
    is_first = torch.ones_like(counts)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # From the sorted order back to that of the neighbors
    is_nearest_of_group = torch.zeros_like(counts).scatter(1, columns, is_first)
    return counts & is_nearest_of_group


def mean_correlations(
    queries: Float[Tensor, "q d"], vectors: Float[Tensor, "n d"]
) -> Float64[Tensor, "q"]:
    """Returns the mean correlation of each query with all patches, its own included."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=queries.device)
    for _, rows in chunks_on_device(vectors, _CHUNK, queries.device):
        total += rows.sum(dim=0, dtype=torch.float64)
    mean_vector = total / len(vectors)
    return (queries.double() @ mean_vector).cpu()
