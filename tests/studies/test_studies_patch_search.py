"""Nearest patches that count, beside a plain loop over the full matrix of similarities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relloc.data.folder import FolderImages
from relloc.errors import UsageError
from relloc.studies.patch_search import NONE, nearest_patches, source_groups
from relloc.studies.patch_vectors import unit_vectors


def plainly(
    queries: Tensor,
    vectors: Tensor,
    groups: Tensor,
    k: int,
    own: Tensor,
    one_per_group: bool,
    without_itself: bool = False,
) -> tuple[list[list[int]], list[list[float]]]:
    matrix = queries.double() @ vectors.double().T
    all_rows, all_similarities = [], []
    for query, similarities in enumerate(matrix):
        rows: list[int] = []
        seen = {int(own[query])}
        for row in np.argsort(-similarities.numpy(), kind="stable").tolist():
            group = int(groups[row])
            if group in seen or len(rows) == k or (without_itself and row == query):
                continue
            rows.append(row)
            if one_per_group:
                seen.add(group)
        missing = k - len(rows)
        all_rows.append(rows + [NONE] * missing)
        all_similarities.append([float(similarities[row]) for row in rows] + [0.0] * missing)
    return all_rows, all_similarities


@given(
    n=st.integers(1, 60),
    n_groups=st.integers(1, 12),
    k=st.integers(1, 9),
    one_per_group=st.booleans(),
    exclude_own=st.booleans(),
    without_itself=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_neighbors_are_those_of_the_full_matrix(
    n: int,
    n_groups: int,
    k: int,
    one_per_group: bool,
    exclude_own: bool,
    without_itself: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = unit_vectors(torch.randn(n, 8, generator=generator))
    # Patches of an image are similar, as they are in fact.
    groups = torch.randint(n_groups, (n,), generator=generator)
    centers = torch.randn(n_groups, 8, generator=generator)
    vectors = unit_vectors(vectors + 2 * centers[groups])
    queries = vectors[:5]
    own = groups[:5] if exclude_own else torch.full((len(queries),), NONE)
    found = nearest_patches(
        queries,
        vectors,
        groups,
        k,
        own_groups=own,
        own_rows=torch.arange(len(queries)) if without_itself else None,
        one_per_group=one_per_group,
        name="made",
    )
    rows, similarities = plainly(queries, vectors, groups, k, own, one_per_group, without_itself)
    assert found.rows.tolist() == rows
    np.testing.assert_allclose(found.similarities.numpy(), similarities, atol=1e-6)


def test_float16_vectors_of_one_huge_image_are_searched_to_the_end() -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = unit_vectors(torch.randn(3000, 16, generator=generator))
    # All but the last patches are of one image, and nearer to the query than the others.
    groups = torch.zeros(3000, dtype=torch.int64)
    groups[-3:] = torch.tensor([1, 2, 3])
    query = vectors[:1]
    vectors[:-3] = unit_vectors(vectors[:-3] + 5 * query)
    vectors = vectors.half()
    found = nearest_patches(
        query, vectors, groups, 3, own_groups=torch.tensor([NONE]), one_per_group=True, name="made"
    )
    rows, _ = plainly(query, vectors, groups, 3, torch.tensor([NONE]), True)
    assert found.rows.tolist() == rows
    others = nearest_patches(
        query, vectors, groups, 3, own_groups=torch.tensor([0]), one_per_group=False, name="made"
    )
    assert set(others.rows[0].tolist()) == {2997, 2998, 2999}


def test_nearly_equal_patches_are_in_the_order_of_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    # Sixty crowds of patches that hardly differ, as of one place that was cut out twice
    centers = torch.randn(60, 4096, generator=generator).repeat(50, 1)
    noise = torch.randn(3000, 4096, generator=generator)
    vectors = unit_vectors(centers + 3e-4 * noise).half()
    groups = torch.arange(3000)
    queries = vectors[:60].float()
    own = groups[:60]
    found = nearest_patches(
        queries, vectors, groups, 20, own_groups=own, one_per_group=True, name="made"
    )
    unit = vectors.double()
    unit /= unit.norm(dim=1, keepdim=True)
    _, similarities = plainly(unit[:60], unit, groups, 20, own, True)
    np.testing.assert_allclose(found.similarities.numpy(), similarities, rtol=0, atol=2**-39)
    # A few are nearer to each other than 2^-40, and then the earlier row comes first. Which ones
    # are depends on rounding, so that similarities are compared rank by rank, not rows.
    matrix = unit[:60] @ unit.T
    assert all(len(set(of_query)) == 20 for of_query in found.rows.tolist())
    in_order = matrix.gather(1, found.rows)
    np.testing.assert_allclose(in_order.numpy(), similarities, rtol=0, atol=2**-39)
    # Such neighbors are too near each other for products in float32.
    in_float32 = (queries @ vectors.float().T).topk(21).indices[:, 1:]
    assert np.abs(matrix.gather(1, in_float32).numpy() - similarities).max() > 2**-33


@pytest.mark.gpu
@pytest.mark.parametrize("bank", ["cpu", "cuda"])
def test_a_gpu_finds_the_same(bank: str) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = unit_vectors(torch.randn(5000, 64, generator=generator)).half()
    groups = torch.arange(5000) // 10
    queries = vectors[::97]
    found = nearest_patches(
        queries.cuda().float(),
        vectors.to(bank),
        groups,
        7,
        own_groups=groups[::97],
        one_per_group=True,
        name="made",
    )
    on_cpu = nearest_patches(
        queries.float(),
        vectors,
        groups,
        7,
        own_groups=groups[::97],
        one_per_group=True,
        name="made",
    )
    assert found.rows.equal(on_cpu.rows)
    torch.testing.assert_close(found.similarities, on_cpu.similarities)


def test_vectors_that_are_not_finite_are_refused() -> None:
    vectors = torch.randn(20, 4)
    vectors[3, 2] = float("nan")
    with pytest.raises(UsageError, match="made: 1 of 20"):
        nearest_patches(
            torch.randn(2, 4),
            vectors,
            torch.arange(20),
            2,
            own_groups=torch.tensor([NONE, NONE]),
            one_per_group=True,
            name="made",
        )


def test_images_of_one_source_are_one_group() -> None:
    paths = ["a.jpg", "b.jpg", "a.jpg", "c.jpg"]
    images = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    groups = source_groups(images, torch.tensor([1, 1, 0, 3, 2]))
    assert groups.tolist() == [0, 0, 1, 2, 1]
