"""The nearest rows of a bank by cosine: exact, in bounded memory, on CPUs, one GPU or several.

Candidates are found by fast products whose error is bounded; what could be among the nearest within
that bound is compared again in float64. Queries with more such rows than are kept are done again by
slower products, in the end wholly in float64. So the way never decides what is found.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from relloc import ranks
from relloc.errors import UsageError

_WORK_BYTES = {"cuda": 2**31, "cpu": 2**28}  # what a chunk of the bank, and products with it, may take
_BLOCK_BYTES = {"cuda": 2**29, "cpu": 2**22}  # what is worked on in float64 at once: on a CPU, what its cache holds
_BYTES_A_VALUE = 16  # of a chunk: two copies that arrive from elsewhere, and all of it rounded or in float64
_BYTES_A_PRODUCT = 16
_BYTES_A_BLOCK_VALUE = 24
_WORTH_IT = 48  # a CPU compares a pair again in the time of so many float64 products of whole matrices
_SPARE = 56  # candidates kept beyond twice the neighbors asked for
_GROUP = 16  # columns that are looked at as one
_TINY = 1e-12  # torch.nn.functional.normalize's: a row shorter than this keeps its direction but not unit length
_GRID_BITS = 40
_ROUNDING = 1.01  # of the bounds themselves, and what they leave out as of second order
_LOWEST = torch.iinfo(torch.int64).min

Queries = Float[Tensor, "q d"]
Unit = Float64[Tensor, "q d"]  # queries at length one
Rows = Float[Tensor, "n d"]
Lengths = Float64[Tensor, "n"]  # of the rows
Nearest = Int64[Tensor, "q k"]  # keys, or rows
Candidates = Int64[Tensor, "q m"]  # rows that may be among the nearest of each query
Chunk = tuple[int, Float[Tensor, "r d"]]  # number of the first row, and rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Cosines and rows of the nearest, nearest first; `retried` queries needed a slower way than the first."""

    similarities: Float64[Tensor, "q k"]
    rows: Nearest
    retried: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """Products whose factors lose `dropped_bits` of float32's 23, and whose sums lose up to `per_term` a term.

    Float32: 2^-24 a term, whatever the order of the sum. TF32 drops 13 bits; factors are rounded here,
    so that nothing depends on how a GPU does it, and products are then exact. Tensor cores cut sums off
    at 2^-23 of the largest term or more (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA
    tensor cores", 2021), in each of the at most 1.5 additions a term: below 2^-22.
    """

    dropped_bits: int
    per_term: float
    matmul_precision: str


_FLOAT32 = _Way(dropped_bits=0, per_term=2**-24, matmul_precision="highest")
_TF32 = _Way(dropped_bits=13, per_term=2**-22, matmul_precision="high")


def _ways(device: torch.device, n_rows: int, k: int) -> tuple[_Way, ...]:
    """Ways to find candidates, fastest first; none where all pairs are as soon compared in float64."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return _TF32, _FLOAT32
    return () if device.type == "cpu" and n_rows < _WORTH_IT * k else (_FLOAT32,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Keys:
    """Similarity and row in one integer: larger is nearer, and of equally near rows the earlier one.

    Similarities are rounded to a grid of 2^-40 (coarser beyond 4 million rows), above the rounding of
    float64 sums: rows that are alike stay so wherever they lie. Distinct keys leave top-k no choice.
    """

    first_row: int
    row_bits: int

    @property
    def grid(self) -> int:
        return 2 ** min(_GRID_BITS, 62 - self.row_bits)

    def join(self, similar: Float64[Tensor, "*n"], places: Int64[Tensor, "..."]) -> Int64[Tensor, "*n"]:
        near = similar.clamp(-1, 1).mul(self.grid).round().long()
        return near * 2**self.row_bits + (2**self.row_bits - 1 - self.first_row - places)

    def part(self, keys: Nearest) -> tuple[Float64[Tensor, "q k"], Nearest]:
        last = 2**self.row_bits - 1
        return (keys >> self.row_bits).double() / self.grid, last - (keys & last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """A bank, how it is walked, and how keys are made."""

    bank: Rows
    device: torch.device
    keys: _Keys
    chunk: int
    tile: int
    name: str

    def chunks(self) -> Iterator[tuple[int, Float[Tensor, "r d"], Float64[Tensor, "r"]]]:
        """First row, rows and their lengths. Raises `UsageError` in the end if some are not finite."""
        usable = torch.zeros((), dtype=torch.int64, device=self.device)
        for start, rows in on_device(self.bank, self.chunk, self.device):
            lengths = _lengths(rows)
            usable += lengths.isfinite().sum()
            yield start, rows, lengths
        _refuse(len(self.bank) - int(usable), len(self.bank), self.name)

    @property
    def block(self) -> int:
        """How many rows are worked on in float64 at once."""
        return max(1, _BLOCK_BYTES[self.device.type] // (_BYTES_A_BLOCK_VALUE * max(1, self.bank.shape[1])))


def nearest(
    queries: Queries,
    bank: Rows,
    k: int,
    *,
    chunk: int | None = None,
    tile: int | None = None,
    across_ranks: bool = False,
    name: str = "features",
) -> Neighbors:
    """The `k` rows of `bank` (all, where there are fewer) of the largest cosine with each query.

    Equal similarities, to 2^-40, go to the earlier row. Work is done where `queries` lie; a bank in the
    CPU's memory is copied to a GPU in chunks, while it computes. `chunk` rows of the bank meet `tile`
    queries at a time; neither changes what is found. By default they are such that the memory needed
    beyond queries and bank is, on a GPU, 4.5 GiB (2 for a chunk, 2 for products, half a GiB in float64),
    on a CPU an eighth of that, and about 12 d + 100 k bytes a query.

    With `across_ranks` each rank's `bank` is its part of one bank, in the order of ranks: all call with
    the same queries, and all get the answer for the whole bank, whose rows are numbered through.
    Without it no other rank is asked, so that one of them may search alone.

    Raises:
        UsageError: queries or rows that hold NaN or infinity, called by `name`.
    """
    sizes = ranks.gathered(torch.tensor([len(bank)])).flatten().tolist() if across_ranks else [len(bank)]
    first_row = sum(sizes[: ranks.rank()]) if across_ranks else 0
    work = _WORK_BYTES[queries.device.type]
    chunk = chunk or max(1, work // (_BYTES_A_VALUE * max(1, queries.shape[1])))
    search = _Search(
        bank=bank,
        device=queries.device,
        keys=_Keys(first_row=first_row, row_bits=sum(sizes).bit_length()),
        chunk=chunk,
        tile=tile or max(1, work // (_BYTES_A_PRODUCT * min(chunk, max(1, len(bank))))),
        name=name,
    )
    keys, retried = _all_keys(queries, search, min(k, len(bank)))
    if across_ranks:
        # The nearest of all ranks are among those of each; a rank of fewer rows fills up with the lowest keys.
        padded = keys.new_full((len(queries), min(k, sum(sizes))), _LOWEST)
        padded[:, : keys.shape[1]] = keys
        keys = ranks.gathered(padded).transpose(0, 1).flatten(1).topk(padded.shape[1], dim=1).values
    similarities, rows = search.keys.part(keys)
    return Neighbors(similarities=similarities, rows=rows, retried=retried)


def _all_keys(queries: Queries, search: _Search, k: int) -> tuple[Nearest, int]:
    """The keys of the `k` nearest, and how many queries the first way did not settle."""
    _refuse(int((~queries.isfinite().all(dim=1)).sum()), len(queries), search.name)
    keys = torch.full((len(queries), k), _LOWEST, device=queries.device)
    if not k:
        return keys, 0
    left, unsettled = torch.arange(len(queries), device=queries.device), []
    for way in _ways(queries.device, len(search.bank), k):
        found, settled = _through_candidates(queries[left], search, k, way)
        keys[left[settled]] = found[settled]
        left = left[~settled]
        unsettled.append(len(left))
        if not len(left):
            return keys, unsettled[0]
    keys[left] = _in_float64(queries[left], search, k)
    return keys, unsettled[0] if unsettled else 0


def _through_candidates(queries: Queries, search: _Search, k: int, way: _Way) -> tuple[Nearest, Bool[Tensor, "q"]]:
    """Keys, and of which queries they are sure to be right.

    A product is off by at most `off`, so a row that is among the k nearest lies at most twice that below
    the k-th best product. It was looked at if the worst product kept lies lower still.
    """
    unit = _unit(queries)
    best, places, off = _candidates(unit, search, k, way)
    reach = best.topk(k, dim=1).values[:, -1:].double() - 2 * off.unsqueeze(1) - 2 / search.keys.grid
    settled = best.amin(dim=1, keepdim=True).double() < reach
    if best.shape[1] == len(search.bank):
        settled = torch.ones_like(settled)
    keys = _exact_keys(unit, search, places, (best.double() >= reach) & settled)
    return keys.topk(k, dim=1).values, settled.squeeze(1)


def _candidates(
    unit: Unit, search: _Search, k: int, way: _Way
) -> tuple[Float32[Tensor, "q m"], Candidates, Float64[Tensor, "q"]]:
    """The best products and their rows, in no order, and what the products of each query may be off by."""
    rounded, off = _rounded(unit, torch.ones_like(unit[:, 0]), way, search.block)
    kept = min(len(search.bank), 2 * k + _SPARE)
    best = torch.full((len(unit), kept), -torch.inf, device=unit.device)
    places = torch.zeros((len(unit), kept), dtype=torch.int64, device=unit.device)
    most_off = off.new_zeros(())
    with _matmul_precision(way.matmul_precision):
        for start, rows, lengths in search.chunks():
            rounded_rows, rows_off = _rounded(rows, lengths, way, search.block)
            most_off = torch.maximum(most_off, rows_off.max())
            for tile in _tiles(len(unit), search.tile):
                values, columns = _largest(rounded[tile] @ rounded_rows.T, kept)
                chosen = torch.cat([best[tile], values], dim=1).topk(kept, dim=1, sorted=False)
                places[tile] = torch.cat([places[tile], columns + start], dim=1).gather(1, chosen.indices)
                best[tile] = chosen.values
    return best, places, _ROUNDING * (off + most_off + way.per_term * unit.shape[1])


def _largest(values: Shaped[Tensor, "q r"], count: int) -> tuple[Shaped[Tensor, "q c"], Int64[Tensor, "q c"]]:
    """The `count` largest values of each row (all, where there are fewer), in no order, and their columns.

    They lie in the `count` groups of columns with the largest maxima: few columns are compared one by one.
    """
    groups = values.shape[1] // _GROUP
    if groups < 2 * count:
        return values.topk(min(count, values.shape[1]), dim=1, sorted=False)
    whole = groups * _GROUP
    maxima = values[:, :whole].unflatten(1, (_GROUP, groups)).amax(dim=1)
    chosen = maxima.topk(count, dim=1, sorted=False).indices
    members = torch.arange(0, whole, groups, device=values.device)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([(chosen.unsqueeze(2) + members).flatten(1), rest], dim=1)
    best = values.gather(1, columns).topk(count, dim=1, sorted=False)
    return best.values, columns.gather(1, best.indices)


def _exact_keys(unit: Unit, search: _Search, places: Candidates, wanted: Bool[Tensor, "q m"]) -> Candidates:
    """The keys of the wanted pairs of query and row, from float64 products; the lowest of all elsewhere."""
    keys = torch.full_like(places, _LOWEST)
    for start, rows, lengths in search.chunks():
        here = wanted & (places >= start) & (places < start + len(rows))
        for pair in here.nonzero().split(search.block):
            query, column = pair.unbind(1)
            place = places[query, column]
            similar = (unit[query] * rows[place - start]).sum(dim=1) / lengths[place - start]
            keys[query, column] = search.keys.join(similar, place)
    return keys


def _in_float64(queries: Queries, search: _Search, k: int) -> Nearest:
    unit = _unit(queries)
    keys = torch.full((len(queries), k), _LOWEST, device=queries.device)
    for start, rows, lengths in search.chunks():
        unit_rows = rows / lengths.unsqueeze(1)
        places = torch.arange(start, start + len(rows), device=queries.device)
        for tile in _tiles(len(unit), max(1, search.tile // 6)):
            found, _ = _largest(search.keys.join(unit[tile] @ unit_rows.T, places), k)
            keys[tile] = torch.cat([keys[tile], found], dim=1).topk(k, dim=1, sorted=False).values
    return keys.topk(k, dim=1).values


def _lengths(rows: Rows) -> Lengths:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).clamp(min=_TINY)


def _unit(rows: Rows) -> Float64[Tensor, "n d"]:
    return rows / _lengths(rows).unsqueeze(1)


def _rounded(rows: Rows, lengths: Lengths, way: _Way, block: int) -> tuple[Float32[Tensor, "n d"], Lengths]:
    """Rows at length one as the factors of a way, and the length of what rounding took from each."""
    low = torch.empty(rows.shape, device=rows.device)
    off = torch.empty_like(lengths)
    half = 1 << max(0, way.dropped_bits - 1)
    for part in _tiles(len(rows), block):
        unit = rows[part] / lengths[part].unsqueeze(1)
        low[part] = unit
        if way.dropped_bits:
            low[part] = ((low[part].view(torch.int32) + half) & -2 * half).view(torch.float32)
        off[part] = torch.linalg.vector_norm(unit.sub_(low[part]), dim=1)
    return low, off


def _tiles(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


def _refuse(bad: int, n: int, name: str) -> None:
    if bad:
        raise UsageError(
            f"{name}: {bad} of {n} images hold NaN or infinity, so that they have no neighbors. The network may have "
            "diverged, or half precision overflowed: give precision=fp32, batch_norm=recalibrated, or other weights"
        )


@contextlib.contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def on_device(bank: Rows, size: int, device: torch.device) -> Iterator[Chunk]:
    """(first row, rows) of chunks of `size` rows in order, on `device`.

    To a GPU they go through two page-locked buffers and a stream of their own, so that the next is on
    its way while one is worked on; at most two are on the GPU.
    """
    if bank.device == device or device.type != "cuda":
        for start in range(0, len(bank), size):
            yield start, bank[start : start + size].to(device)
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    shape = (min(size, len(bank)), bank.shape[1])
    buffers = [torch.empty(shape, dtype=bank.dtype, pin_memory=True) for _ in range(2)]
    worked_on = [torch.cuda.Event(), torch.cuda.Event()]
    for number, start in enumerate(range(0, len(bank), size)):
        buffer, done = buffers[number % 2], worked_on[number % 2]
        done.synchronize()  # returns at once where it was never recorded
        rows = bank[start : start + size]
        buffer[: len(rows)].copy_(rows)
        with torch.cuda.stream(side):
            arrived = buffer[: len(rows)].to(device, non_blocking=True)
        main.wait_stream(side)
        arrived.record_stream(main)
        yield start, arrived
        done.record(main)
