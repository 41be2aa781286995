"""Exact nearest neighbors by cosine similarity, in bounded memory, on CPUs, one GPU or several.

The search has two steps. Fast products of low precision, whose error is bounded, find candidates:
all rows that could be among the nearest within that bound. The candidates are then compared again
in float64. A query with more candidates than there is room for is searched again with slower and
more precise products, in the end wholly in float64. So neither precision nor hardware decides
which neighbors are found.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from relloc import ranks
from relloc.errors import UsageError
from relloc.features.chunks import ChunkRows, chunks_on_device, slices
from relloc.features.product_precision import (
    ProductPrecision,
    matmul_precision,
    product_precisions,
    round_to,
)

# Memory, in bytes, that a chunk of the bank and the products with it may take, each.
_WORK_BYTES = {"cuda": 2**31, "cpu": 2**28}
# Memory, in bytes, of what is computed in float64 at once. On a CPU it fits into the cache.
_BLOCK_BYTES = {"cuda": 2**29, "cpu": 2**22}
# Bytes per value of a chunk: two copies that arrive from elsewhere, and the rounded or float64 one.
_BYTES_PER_VALUE = 16
_BYTES_PER_PRODUCT = 16
_BYTES_PER_BLOCK_VALUE = 24
_SPARE_CANDIDATES = 56  # kept for each query beyond twice the number of neighbors
_GROUP_SIZE = 16  # columns whose maximum is looked at first
_MIN_NORM = 1e-12  # as torch.nn.functional.normalize: shorter rows do not get unit length
_GRID_BITS = 40  # similarities are rounded to multiples of 2^-40
# Margin for the rounding of the error bounds themselves, and for terms of second order.
_BOUND_MARGIN = 1.01
_LOWEST_KEY = torch.iinfo(torch.int64).min

Queries = Float[Tensor, "q d"]
UnitQueries = Float64[Tensor, "q d"]  # queries scaled to length one
BankRows = Float[Tensor, "n d"]
Norms = Float64[Tensor, "n"]  # Euclidean lengths of rows
Similarities = Float64[Tensor, "q k"]
Products = Float32[Tensor, "q m"]  # rounded dot products with candidates
ErrorBounds = Float64[Tensor, "q"]
Keys = Int64[Tensor, "q k"]  # similarity and row in one integer, see `_KeyFormat`
RowNumbers = Int64[Tensor, "q k"]
CandidateRows = Int64[Tensor, "q m"]  # rows that may be among the nearest of each query
ChunkWithNorms = tuple[int, ChunkRows, Float64[Tensor, "r"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestNeighbors:
    """The nearest rows of each query and their cosine similarities, nearest first.

    `retried` is the number of queries for which the first, fastest precision was not enough.
    """

    similarities: Similarities
    rows: RowNumbers
    retried: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KeyFormat:
    """Packs similarity and row into one integer, so that top-k of the integers is the answer.

    A larger key is a nearer row, and of equally near rows the earlier one. Similarities are rounded
    to a grid of 2^-40 (coarser beyond 4 million rows), which is above the rounding of float64 sums.
    So identical rows have the same similarity wherever they lie, and as all keys differ, top-k has
    no choice of its own to make.
    """

    first_row: int
    row_bits: int

    @property
    def grid(self) -> int:
        """Steps of the grid per unit of similarity; similarity and row share 62 bits of a key."""
        bits_left = 62 - self.row_bits
        return 2 ** min(_GRID_BITS, bits_left)

    def pack(
        self,
        similarities: Float64[Tensor, "*n"],
        rows: Int64[Tensor, "..."],
    ) -> Int64[Tensor, "*n"]:
        """Returns the keys of rows that are counted from the first of this rank."""
        # Rounding may give similarities just beyond -1 and 1, for which the key has no room.
        clamped = similarities.clamp(-1, 1)
        steps = clamped.mul(self.grid).round().long()
        # Counted from the last row of all ranks backwards, so that earlier rows have larger keys.
        n_rows = 2**self.row_bits
        last_row = n_rows - 1
        reversed_rows = last_row - self.first_row - rows
        return steps * n_rows + reversed_rows

    def unpack(self, keys: Keys) -> tuple[Similarities, RowNumbers]:
        """Returns similarities and rows, which are counted through the banks of all ranks."""
        last_row = 2**self.row_bits - 1
        # The upper bits, with their sign, are steps of the grid; the lower bits are the row.
        steps = keys >> self.row_bits
        similarities = steps.double() / self.grid
        reversed_rows = keys & last_row
        return similarities, last_row - reversed_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """A bank, how much of it is worked on at once, and how keys are made."""

    bank: BankRows
    device: torch.device
    keys: _KeyFormat
    chunk: int
    tile: int
    name: str

    def chunks(self) -> Iterator[ChunkWithNorms]:
        """Yields first row, rows and their norms of each chunk of the bank.

        Raises:
            UsageError: after the last chunk, if some rows are not finite.
        """
        # Counted on the device and looked at once, since each look makes the host wait for the GPU.
        n_finite = torch.zeros((), dtype=torch.int64, device=self.device)
        for start, rows in chunks_on_device(
            self.bank,
            self.chunk,
            self.device,
        ):
            norms = _norms(rows)
            n_finite += norms.isfinite().sum()
            yield start, rows, norms
        n_rows = len(self.bank)
        _check_all_finite(n_rows - int(n_finite), n_rows, self.name)

    @property
    def block(self) -> int:
        """How many rows are computed in float64 at once."""
        n_features = self.bank.shape[1]
        bytes_per_row = _BYTES_PER_BLOCK_VALUE * max(1, n_features)
        block_bytes = _BLOCK_BYTES[self.device.type]
        return max(1, block_bytes // bytes_per_row)


def nearest(
    queries: Queries,
    bank: BankRows,
    k: int,
    *,
    chunk: int | None = None,
    tile: int | None = None,
    across_ranks: bool = False,
    name: str = "features",
) -> NearestNeighbors:
    """Returns the `k` rows of `bank` with the largest cosine similarity to each query.

    All rows are returned where there are fewer than `k`. Of similarities that are equal to 2^-40,
    the earlier row comes first.

    The work is done on the device of `queries`. A bank in the memory of the CPU is copied to a GPU
    in chunks while the GPU computes. `chunk` rows of the bank are multiplied with `tile` queries at
    a time; neither changes what is found. By default they are chosen such that the memory needed
    beyond queries and bank is, on a GPU, 4.5 GiB (2 for a chunk, 2 for products, half a GiB for
    float64), on a CPU an eighth of that, and about 12 d + 100 k bytes per query.

    With `across_ranks`, the banks of all ranks are parts of one bank, in the order of ranks. All
    ranks then call this function with the same queries, and all get the neighbors in the whole
    bank, with its rows numbered through. Without it no other rank is asked, so that one rank may
    search alone.

    Example:
        neighbors = nearest(queries, bank, 20)
        classes = labels[neighbors.rows]

    Raises:
        UsageError: queries or rows contain NaN or infinity; the message calls them `name`.
    """
    # The rows of this rank are numbered after those of the ranks before it.
    n_own_rows = len(bank)
    n_rows_of_ranks = [n_own_rows]
    first_row = 0
    if across_ranks:
        gathered = ranks.gathered(torch.tensor([n_own_rows]))
        n_rows_of_ranks = gathered.flatten().tolist()
        n_rows_before = n_rows_of_ranks[: ranks.rank()]
        first_row = sum(n_rows_before)
    n_rows = sum(n_rows_of_ranks)

    # As many rows at once as fit, and then as many queries as their products with these rows leave
    # room for.
    device = queries.device
    work_bytes = _WORK_BYTES[device.type]
    if not chunk:
        n_features = queries.shape[1]
        bytes_per_row = _BYTES_PER_VALUE * max(1, n_features)
        chunk = max(1, work_bytes // bytes_per_row)
    if not tile:
        rows_at_once = min(chunk, max(1, n_own_rows))
        bytes_per_query = _BYTES_PER_PRODUCT * rows_at_once
        tile = max(1, work_bytes // bytes_per_query)

    key_format = _KeyFormat(
        first_row=first_row,
        row_bits=n_rows.bit_length(),
    )
    search = _Search(
        bank=bank,
        device=device,
        keys=key_format,
        chunk=chunk,
        tile=tile,
        name=name,
    )
    keys, retried = _nearest_keys(queries, search, min(k, n_own_rows))
    if across_ranks:
        keys = _merge_ranks(keys, min(k, n_rows))
    similarities, rows = key_format.unpack(keys)
    return NearestNeighbors(
        similarities=similarities,
        rows=rows,
        retried=retried,
    )


def _merge_ranks(keys: Keys, k: int) -> Int64[Tensor, "q all_k"]:
    """Returns the `k` largest keys of all ranks, on every rank.

    The nearest rows of all ranks are among the nearest of each rank.
    """
    # A rank with fewer rows than k has fewer keys; the lowest key, which no row has, fills them up.
    n_queries, n_own_keys = keys.shape
    padded = keys.new_full((n_queries, k), _LOWEST_KEY)
    padded[:, :n_own_keys] = keys
    keys_of_ranks = ranks.gathered(padded)
    # From (rank, query, key) to the keys of all ranks for each query
    by_query = keys_of_ranks.transpose(0, 1)
    keys_of_queries = by_query.flatten(1)
    return keys_of_queries.topk(k, dim=1).values


def _nearest_keys(
    queries: Queries,
    search: _Search,
    k: int,
) -> tuple[Keys, int]:
    """Returns keys of the `k` nearest rows, and how many queries needed a second precision."""
    n_queries = len(queries)
    device = queries.device
    is_finite = queries.isfinite().all(dim=1)
    n_bad = int((~is_finite).sum())
    _check_all_finite(n_bad, n_queries, search.name)
    keys = torch.full((n_queries, k), _LOWEST_KEY, device=device)
    if not k:
        return keys, 0
    remaining = torch.arange(n_queries, device=device)
    n_unsettled = []
    # Each precision settles most of the queries that the one before it has left.
    precisions = product_precisions(device, len(search.bank), k)
    for precision in precisions:
        new_keys, settled = _keys_from_candidates(
            queries[remaining],
            search,
            k,
            precision,
        )
        settled_queries = remaining[settled]
        keys[settled_queries] = new_keys[settled]
        remaining = remaining[~settled]
        n_unsettled.append(len(remaining))
        if not len(remaining):
            return keys, n_unsettled[0]
    # What no precision could tell apart, such as crowds of almost equal rows.
    keys[remaining] = _keys_in_float64(
        queries[remaining],
        search,
        k,
    )
    # Without any precision, all was searched in float64 at once and nothing again.
    if not n_unsettled:
        return keys, 0
    return keys, n_unsettled[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Candidates:
    """For each query the rows with the largest products, in no order.

    `error_bound` is how far each of a query's products may be from the exact one.
    """

    products: Products
    rows: CandidateRows
    error_bound: ErrorBounds


def _keys_from_candidates(
    queries: Queries,
    search: _Search,
    k: int,
    precision: ProductPrecision,
) -> tuple[Keys, Bool[Tensor, "q"]]:
    """Returns keys, and for which queries they are certain to be right."""
    unit = _normalize(queries)
    found = _find_candidates(unit, search, k, precision)
    # A product is off by at most the error bound. So a row of the true k nearest has a product of
    # at least the k-th best one less twice that bound. The grid, to which similarities are rounded,
    # adds two steps.
    k_best = found.products.topk(k, dim=1).values
    kth_best = k_best[:, -1:].double()
    error_bound = found.error_bound.unsqueeze(1)
    threshold = kth_best - 2 * error_bound - 2 / search.keys.grid
    # If the worst candidate lies below the threshold, so do all rows that are no candidates.
    worst = found.products.amin(dim=1, keepdim=True)
    settled = worst.double() < threshold
    n_candidates = found.products.shape[1]
    has_all_rows = n_candidates == len(search.bank)
    if has_all_rows:
        settled = torch.ones_like(settled)
    # Candidates below the threshold, and unsettled queries, need no exact comparison.
    may_be_nearest = found.products.double() >= threshold
    wanted = may_be_nearest & settled
    keys = _exact_keys(unit, search, found.rows, wanted)
    nearest_keys = keys.topk(k, dim=1).values
    return nearest_keys, settled.squeeze(1)


def _find_candidates(
    unit: UnitQueries,
    search: _Search,
    k: int,
    precision: ProductPrecision,
) -> _Candidates:
    """Returns the rows with the largest products with each query, in the given precision."""
    n_queries, n_features = unit.shape
    most_candidates = 2 * k + _SPARE_CANDIDATES
    n_candidates = min(len(search.bank), most_candidates)
    # The queries have length one already.
    ones = torch.ones_like(unit[:, 0])
    rounded_queries, query_errors = round_to(
        precision,
        unit,
        ones,
        search.block,
    )
    shape = (n_queries, n_candidates)
    products = torch.full(shape, -torch.inf, device=unit.device)
    candidate_rows = torch.zeros(shape, dtype=torch.int64, device=unit.device)
    max_row_error = query_errors.new_zeros(())
    with matmul_precision(precision.matmul_precision):
        for start, rows, norms in search.chunks():
            rounded_rows, row_errors = round_to(
                precision,
                rows,
                norms,
                search.block,
            )
            max_row_error = torch.maximum(max_row_error, row_errors.max())
            for tile in slices(n_queries, search.tile):
                # The matrix of products gets no name: it would still be in memory when the next
                # one is computed.
                best, columns = _largest(
                    rounded_queries[tile] @ rounded_rows.T,
                    n_candidates,
                )
                products[tile], candidate_rows[tile] = _merge_candidates(
                    products[tile],
                    candidate_rows[tile],
                    best,
                    columns + start,
                )
    # By Cauchy-Schwarz, rounding a factor moves a product of unit vectors by at most the length of
    # the error. The sum over d terms adds its own rounding.
    sum_error = precision.error_per_term * n_features
    total_error = query_errors + max_row_error + sum_error
    return _Candidates(
        products=products,
        rows=candidate_rows,
        error_bound=_BOUND_MARGIN * total_error,
    )


def _merge_candidates(
    old_products: Float32[Tensor, "t m"],
    old_rows: Int64[Tensor, "t m"],
    new_products: Float32[Tensor, "t c"],
    new_rows: Int64[Tensor, "t c"],
) -> tuple[Float32[Tensor, "t m"], Int64[Tensor, "t m"]]:
    """Returns the best of the candidates of earlier chunks and those of a new one."""
    n_candidates = old_products.shape[1]
    products = torch.cat([old_products, new_products], dim=1)
    best = products.topk(n_candidates, dim=1, sorted=False)
    rows = torch.cat([old_rows, new_rows], dim=1)
    return best.values, rows.gather(1, best.indices)


def _largest(
    values: Shaped[Tensor, "q r"],
    count: int,
) -> tuple[Shaped[Tensor, "q c"], Int64[Tensor, "q c"]]:
    """Returns the `count` largest values of each row, in no order, and their columns.

    Returns all values where there are fewer. The result is that of `torch.topk`, but faster: the
    `count` largest values lie in the `count` groups of columns with the largest maxima, so only
    the columns of these groups are compared one by one.
    """
    n_columns = values.shape[1]
    n_groups = n_columns // _GROUP_SIZE
    # With few groups, most columns would be compared in any case.
    if n_groups < 2 * count:
        n_wanted = min(count, n_columns)
        return values.topk(n_wanted, dim=1, sorted=False)
    # Group g has the columns g, g + n_groups, g + 2 n_groups, ...: maxima over them are maxima over
    # contiguous parts of memory.
    n_grouped = n_groups * _GROUP_SIZE
    grouped = values[:, :n_grouped].unflatten(1, (_GROUP_SIZE, n_groups))
    maxima = grouped.amax(dim=1)
    best_groups = maxima.topk(count, dim=1, sorted=False).indices
    offsets = torch.arange(0, n_grouped, n_groups, device=values.device)
    columns_by_group = best_groups.unsqueeze(2) + offsets
    grouped_columns = columns_by_group.flatten(1)
    # The columns that fill no group are compared, too.
    other_columns = torch.arange(n_grouped, n_columns, device=values.device)
    other_columns = other_columns.expand(len(values), -1)
    columns = torch.cat([grouped_columns, other_columns], dim=1)
    compared = values.gather(1, columns)
    best = compared.topk(count, dim=1, sorted=False)
    # From positions among the compared values to columns
    best_columns = columns.gather(1, best.indices)
    return best.values, best_columns


def _exact_keys(
    unit: UnitQueries,
    search: _Search,
    candidate_rows: CandidateRows,
    wanted: Bool[Tensor, "q m"],
) -> CandidateRows:
    """Returns the keys of the wanted pairs of query and row from float64 products.

    All other pairs get the lowest key.
    """
    keys = torch.full_like(candidate_rows, _LOWEST_KEY)
    for start, rows, norms in search.chunks():
        end = start + len(rows)
        is_in_chunk = (candidate_rows >= start) & (candidate_rows < end)
        is_compared = wanted & is_in_chunk
        pairs = is_compared.nonzero()
        for block in pairs.split(search.block):
            query, column = block.unbind(1)
            row = candidate_rows[query, column]
            row_in_chunk = row - start
            # One expression, so that the products are freed before the next block is gathered.
            dot_products = (unit[query] * rows[row_in_chunk]).sum(dim=1)
            similarities = dot_products / norms[row_in_chunk]
            keys[query, column] = search.keys.pack(similarities, row)
    return keys


def _keys_in_float64(
    queries: Queries,
    search: _Search,
    k: int,
) -> Keys:
    """Returns the keys of the `k` nearest rows by float64 products of all queries and rows."""
    unit = _normalize(queries)
    n_queries = len(queries)
    keys = torch.full((n_queries, k), _LOWEST_KEY, device=queries.device)
    # Float64 products, similarities and keys take about six times the memory of float32 products.
    tile_size = max(1, search.tile // 6)
    for start, rows, norms in search.chunks():
        unit_rows = rows / norms.unsqueeze(1)
        end = start + len(rows)
        row_numbers = torch.arange(start, end, device=queries.device)
        for tile in slices(n_queries, tile_size):
            # One expression, so that products are freed before the largest keys are searched.
            new_keys, _ = _largest(
                search.keys.pack(unit[tile] @ unit_rows.T, row_numbers),
                k,
            )
            merged = torch.cat([keys[tile], new_keys], dim=1)
            keys[tile] = merged.topk(k, dim=1, sorted=False).values
            # Freed before the products of the next tile are computed.
            del merged, new_keys
    return keys.topk(k, dim=1).values


def _norms(rows: BankRows) -> Norms:
    norms = torch.linalg.vector_norm(
        rows,
        dim=1,
        dtype=torch.float64,
    )
    return norms.clamp(min=_MIN_NORM)


def _normalize(rows: BankRows) -> Float64[Tensor, "n d"]:
    """Returns the rows scaled to length one, in float64."""
    norms = _norms(rows)
    return rows / norms.unsqueeze(1)


def _check_all_finite(n_bad: int, n: int, name: str) -> None:
    if n_bad:
        raise UsageError(
            f"{name}: {n_bad} of {n} images have features with NaN or infinity, so their neighbors "
            "can't be found. The network may have diverged, or half precision may have overflowed. "
            "Try precision=fp32, batch_norm=recalibrated, or other weights."
        )
