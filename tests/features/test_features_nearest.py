from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relloc.errors import UsageError
from relloc.features import nearest as module
from relloc.features import product_precision
from relloc.features.nearest import NearestNeighbors, nearest
from relloc.features.product_precision import FLOAT32, TF32, ProductPrecision, round_to

GRID = 2.0**40


def drawn(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).relu() + 0.01


def oracle(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows in float64 by numpy, equal ones to 2^-40, the earlier row first."""
    rows = [side.double().numpy() for side in (queries, bank)]
    units = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in rows]
    similar = np.round(units[0] @ units[1].T * GRID)
    order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    return torch.tensor(np.take_along_axis(similar, order, axis=1) / GRID), torch.tensor(order)


def assert_is_oracles(found: NearestNeighbors, queries: Tensor, bank: Tensor, k: int) -> None:
    similar, rows = oracle(queries, bank, k)
    assert torch.equal(found.rows, rows)
    torch.testing.assert_close(found.similarities, similar, rtol=0, atol=2 / GRID)


@pytest.fixture(params=["float64", "float32", "tf32", "tf32 alone"])
def precisions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs do, on this CPU: factors are rounded as there."""
    chosen = {
        "float64": (),
        "float32": (FLOAT32,),
        "tf32": (TF32, FLOAT32),
        "tf32 alone": (TF32,),
    }
    monkeypatch.setattr(
        module, "product_precisions", lambda device, n_rows, k: chosen[request.param]
    )


@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("k", [1, 7, 200])
def test_neighbors_are_those_of_float64(k: int) -> None:
    queries, bank = drawn(40, 48, seed=0), drawn(5000, 48, seed=1)
    found = nearest(queries, bank, k)
    assert_is_oracles(found, queries, bank, k)
    assert found.similarities.dtype == torch.float64


def test_crowds_within_the_rounding_of_products_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 3000 rows whose cosines with the query differ by some 1e-9: float32 can't order them.
    direction, noise = drawn(1, 32, seed=2).double(), drawn(3000, 32, seed=3).double()
    bank = torch.cat([drawn(500, 32, seed=4).double(), direction + 1e-5 * noise])
    queries = torch.cat([direction, drawn(3, 32, seed=5).double()])
    for precisions in (
        (FLOAT32,),
        (TF32,),
        (TF32, FLOAT32),
    ):
        monkeypatch.setattr(
            module,
            "product_precisions",
            lambda device, n_rows, k, precisions=precisions: precisions,
        )
        found = nearest(queries, bank, 20, chunk=617)
        assert_is_oracles(found, queries, bank, 20)
        assert 1 <= found.retried < 4


@pytest.mark.usefixtures("precisions")
@settings(max_examples=6, deadline=None)
@given(st.integers(20, 700), st.integers(3, 50), st.integers(1, 90), st.integers(0, 3))
def test_chunks_tiles_and_repeated_rows_change_nothing(
    chunk: int, tile: int, k: int, seed: int
) -> None:
    once = drawn(60, 5, seed=10 + seed)
    bank = once.repeat(10, 1)[torch.randperm(600, generator=torch.Generator().manual_seed(seed))]
    bank[7] = 0
    queries = torch.cat([drawn(20, 5, seed=20 + seed), torch.zeros(1, 5)])
    assert_is_oracles(nearest(queries, bank, k, chunk=chunk, tile=tile), queries, bank, k)


@pytest.mark.parametrize("precision", [FLOAT32, TF32])
def test_products_are_off_by_less_than_the_bound(
    precision: ProductPrecision,
) -> None:
    sides = [drawn(300, 257, seed=seed) for seed in (6, 7)]
    units = [module._normalize(side) for side in sides]
    (low, off), (low_too, off_too) = (
        round_to(precision, side, module._norms(side), 64) for side in sides
    )
    error = (low.double() @ low_too.double().T - units[0] @ units[1].T).abs().amax(dim=1)
    bound = module._BOUND_MARGIN * (off + off_too.max())
    assert (error <= bound).all()
    assert bound.max() < 2.0 ** (precision.dropped_bits - 22)
    # As TF32 has them: ten bits after the leading one, so that nothing is left for a GPU to round.
    if precision.dropped_bits:
        assert not (low.view(torch.int32) & (2**precision.dropped_bits - 1)).any()


@pytest.mark.parametrize("columns", [1, 31, 32, 500, 1003])
def test_the_largest_are_found_through_groups(columns: int) -> None:
    values = torch.randint(
        -(2**40), 2**40, (9, columns), generator=torch.Generator().manual_seed(8)
    )
    for count in (1, 3, 15):
        found, where = module._largest(values, count)
        assert torch.equal(
            found.sort(dim=1, descending=True).values,
            values.sort(descending=True).values[:, :count],
        )
        assert torch.equal(values.gather(1, where), found)


@pytest.mark.usefixtures("precisions")
def test_queries_and_bank_are_left_as_they_are() -> None:
    queries, bank = drawn(4, 6, seed=0).double(), drawn(900, 6, seed=1).double()
    nearest(queries, bank, 3)
    assert torch.equal(queries, drawn(4, 6, seed=0).double())
    assert torch.equal(bank, drawn(900, 6, seed=1).double())


def test_fewer_rows_than_asked_for_are_all_found_and_none_of_none() -> None:
    queries, bank = drawn(4, 6, seed=0), drawn(9, 6, seed=1)
    assert nearest(queries, bank, 50).rows.sort(dim=1).values.tolist() == [list(range(9))] * 4
    assert nearest(queries[:0], bank, 3).rows.shape == (0, 3)
    assert nearest(queries, bank[:0], 3).rows.shape == (4, 0)


@pytest.mark.usefixtures("precisions")
def test_chunks_and_products_take_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = drawn(700, 16, seed=0), drawn(3000, 16, seed=1)
    whole = nearest(queries, bank, 5)
    chunks: list[int] = []
    products: list[int] = []

    def walked(rows: Tensor, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        for start, chunk in chunks_on_device(rows, size, device):
            chunks.append(chunk.numel())
            yield start, chunk

    def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
        products.append(values.numel())
        return found_largest(values, count)

    chunks_on_device, found_largest = module.chunks_on_device, module._largest
    monkeypatch.setattr(module, "chunks_on_device", walked)
    monkeypatch.setattr(module, "_largest", largest)
    monkeypatch.setitem(module._WORK_BYTES, "cpu", 2**17)
    assert torch.equal(nearest(queries, bank, 5).rows, whole.rows)
    assert max(chunks) * module._BYTES_PER_VALUE == 2**17
    assert max(products) * module._BYTES_PER_PRODUCT <= 2**17
    assert len(products) > 40


def test_the_matmul_precision_is_left_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        nearest(drawn(3, 4, seed=0), drawn(9, 4, seed=1), 2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_by_name(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, bank = drawn(5, 6, seed=0), drawn(30, 6, seed=1)
    spoilt = bank.clone()
    spoilt[[4, 29], 2] = bad
    for k in (3, 1):  # compared in float64, or through candidates
        monkeypatch.setattr(product_precision, "_PAIR_COST", 10)
        with pytest.raises(UsageError, match=r"feature5: 2 of 30 images .*NaN.*precision=fp32"):
            nearest(queries, spoilt, k, chunk=7, name="feature5")
    with pytest.raises(UsageError, match=r"features: 1 of 5 images .*NaN"):
        nearest(torch.cat([queries[:4], spoilt[4:5]]), bank, 3)


def test_huge_and_tiny_features_keep_their_directions() -> None:
    queries, bank = drawn(20, 6, seed=0), drawn(300, 6, seed=1)
    found = nearest(1e30 * queries, 1e-6 * bank, 10)
    assert torch.equal(found.rows, nearest(queries.double(), bank.double(), 10).rows)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_wherever_the_bank_lies() -> None:
    queries, bank = drawn(300, 64, seed=0), drawn(40_000, 64, seed=1)
    on_cpu = nearest(queries, bank, 200)
    for where in ("cpu", "cuda"):
        found = nearest(queries.cuda(), bank.to(where), 200, chunk=3001, tile=100)
        assert torch.equal(found.rows.cpu(), on_cpu.rows)
        assert found.retried < 300
    assert_is_oracles(on_cpu, queries, bank, 200)


@pytest.mark.gpu
def test_a_gpu_tells_crowds_apart() -> None:
    bank = (drawn(1, 64, seed=0).double() + 1e-6 * drawn(9000, 64, seed=1).double()).cuda()
    queries = bank[:50] + 1e-6 * drawn(50, 64, seed=2).double().cuda()
    found = nearest(queries, bank, 20, chunk=1000)
    assert found.retried == 50
    here = NearestNeighbors(
        similarities=found.similarities.cpu(), rows=found.rows.cpu(), retried=found.retried
    )
    assert_is_oracles(here, queries.cpu(), bank.cpu(), 20)
