"""DSE beside its formula written out in NumPy, one cluster after another."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_features_k_means import plain_k_means
from torch import Tensor

from relloc.features import dense_structure as module
from relloc.features.dense_structure import DenseStructure, dense_structure, spreads, unit_places
from relloc.seeds import Use, seed_for

CPU = torch.device("cpu")


def feature_maps(n: int = 18, d: int = 10, rows: int = 5, columns: int = 6) -> Tensor:
    """Maps of a few kinds of places each."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(n, 3, d, generator=generator)
    members = torch.randint(3, (n, rows, columns), generator=generator)
    places = kinds[torch.arange(n)[:, None, None], members]
    noise = 0.5 * torch.randn(n, rows, columns, d, generator=generator)
    return (places + noise).permute(0, 3, 1, 2)


def measured(maps: Tensor, images: Sequence[int] | None = None, seed: int = 4) -> DenseStructure:
    images = range(len(maps)) if images is None else images
    return dense_structure(unit_places(maps), list(images), seed=seed, device=CPU)


def numbers(use: Use, seed: int, key: int, k: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed_for(use, seed, key))
    return torch.rand(k, generator=generator, dtype=torch.float64).numpy()


def nuclear(points: np.ndarray) -> float:
    """The spread of a cluster."""
    values = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    n, d = points.shape
    return values.sum() / math.sqrt(max(n - 1, d))


def spreads_of(points: np.ndarray, labels: np.ndarray) -> list[float]:
    clusters = [points[labels == label] for label in np.unique(labels)]
    return [nuclear(cluster) for cluster in clusters if len(cluster) > 1]


def plain(maps: np.ndarray, seed: int) -> DenseStructure:
    places = maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1)
    places = places / np.linalg.norm(places, axis=2, keepdims=True)
    generator = torch.Generator().manual_seed(seed_for(Use.DENSE_GROUPS, seed))
    order = torch.randperm(len(places), generator=generator).tolist()
    order = order[: len(order) // 8 * 8]
    d = places.shape[2]
    rows = places[order].reshape(-1, d)
    unit = np.linalg.norm(rows - rows.mean(axis=0), axis=1).mean()
    values = np.linalg.svd(rows, compute_uv=False)
    p = values / values.sum()

    of_images = []
    for image in order:
        u = numbers(Use.DENSE_IMAGE_CLUSTERS, seed, image, 3)
        _, labels = plain_k_means(places[image], u, 20, 1e-4)
        of_images.append(np.mean(spreads_of(places[image], labels)))
    of_groups, distances = [], []
    for group in range(len(order) // 8):
        points = places[order[8 * group : 8 * group + 8]].reshape(-1, d)
        u = numbers(Use.DENSE_GROUP_CLUSTERS, seed, group, 24)
        centroids, labels = plain_k_means(points, u, 20, 1e-4)
        of_groups += spreads_of(points, labels)
        for point, label in zip(points, labels, strict=True):
            others = np.delete(centroids, label, axis=0)
            distances.append(np.linalg.norm(others - point, axis=1).min())
    return DenseStructure(
        between=np.mean(distances) / unit,
        dimension=math.exp(-(p * np.log(p)).sum()) / min(rows.shape),
        within_group=np.mean(of_groups) / unit,
        within_image=np.mean(of_images) / unit,
        n=len(order),
    )


def assert_close(one: DenseStructure, other: DenseStructure, rel: float = 1e-6) -> None:
    assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(other), rel=rel)


@pytest.mark.parametrize("d", [10, 600])  # below and above the number of places of all images
def test_terms_are_those_of_the_formula_written_out(d: int) -> None:
    maps = feature_maps(d=d)
    found = measured(maps)
    expected = plain(maps.double().numpy(), seed=4)
    assert_close(found, expected)
    assert found.n == 16
    terms = found.between + found.dimension - 0.5 * (found.within_group + found.within_image)
    assert found.dse == pytest.approx(terms)


def test_memory_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measured(feature_maps())
    monkeypatch.setattr(module, "_WORK_BYTES", 1)
    assert_close(measured(feature_maps()), expected, rel=1e-9)


def test_order_of_images_rotation_and_scale_change_nothing() -> None:
    maps = feature_maps().double()
    expected = measured(maps)
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(maps), generator=generator)
    assert_close(measured(maps[order], order.tolist()), expected, rel=1e-6)
    noise = torch.randn(10, 10, dtype=torch.float64, generator=generator)
    rotated = torch.einsum("bdhw,de->behw", maps, torch.linalg.qr(noise).Q)
    assert_close(measured(rotated), expected, rel=1e-5)
    assert_close(measured(100 * maps), expected, rel=1e-5)


def test_another_seed_draws_other_groups() -> None:
    one, other = measured(feature_maps()), measured(feature_maps(), seed=5)
    assert one.between != other.between
    assert one.dse == pytest.approx(other.dse, rel=0.2)


def test_places_are_scaled_to_length_one_and_spread_over_large_maps() -> None:
    maps = feature_maps(rows=5, columns=30)
    maps[:, :, 0, 1] = 0
    places = unit_places(maps)
    assert places.shape == (18, 5 * 14, 10)
    lengths = places.norm(dim=2)
    assert lengths[:, 0].tolist() == [0] * 18  # column 1 is the first of 14 parts
    torch.testing.assert_close(lengths[:, 1:], torch.ones(18, 69))
    small = unit_places(maps[:, :, :, :6])
    torch.testing.assert_close(
        small[:, 7], maps[:, :, 1, 1] / maps[:, :, 1, 1].norm(dim=1)[:, None]
    )


def test_spreads_of_clusters_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 50, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(5, (4, 50), generator=generator).clamp(max=3)
    labels[0] = 0
    labels[1, :] = 2
    labels[1, 9] = 1
    found = spreads(points, labels, 5)
    for number in range(4):
        for cluster in range(5):
            members = points[number][labels[number] == cluster].numpy()
            if len(members) < 2:
                assert found[number, cluster].isnan()
            else:
                assert float(found[number, cluster]) == pytest.approx(nuclear(members), rel=1e-6)


def test_features_that_do_not_define_it_say_why() -> None:
    maps = feature_maps()
    with pytest.raises(ValueError, match=r"\b7 images .*\b8\b"):
        measured(maps[:7])
    with pytest.raises(ValueError, match=r"\b3 places.*\b4\b"):
        measured(maps[:, :, :1, :3])
    with pytest.raises(ValueError, match=r"\b16 images .*same"):
        measured(torch.ones_like(maps))
    with pytest.raises(ValueError, match=r"\b16 images .*same"):
        measured(torch.zeros_like(maps))
    maps[2, 1, 0, 0] = math.inf
    with pytest.raises(ValueError, match="finite"):
        measured(maps)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_also_where_it_is_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As relloc.runs.engine sets it
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    expected = measured(feature_maps())
    torch.use_deterministic_algorithms(True)
    try:
        places = unit_places(feature_maps().cuda())
        found = dense_structure(places, list(range(18)), seed=4, device=torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, expected, rel=1e-5)
