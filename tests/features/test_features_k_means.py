import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from relloc.features.k_means import distances_to_others, k_means


def blobs(sets: int = 3, n: int = 40, d: int = 5, spread: float = 2.0, seed: int = 0) -> Tensor:
    """Points around three centers a set."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(sets, 3, d, generator=generator, dtype=torch.float64) * spread
    members = torch.randint(3, (sets, n), generator=generator)
    noise = torch.randn(sets, n, d, generator=generator, dtype=torch.float64)
    return centers[torch.arange(sets)[:, None], members] + noise


def uniform(sets: int, k: int, seed: int = 1) -> Tensor:
    return torch.rand(sets, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_first(points: np.ndarray, u: np.ndarray) -> np.ndarray:
    """k-means++ as its paper says it, point by point."""
    chosen = [points[int(u[0] * len(points))]]
    for number in u[1:]:
        weights = []
        for point in points:
            weights.append(min(((point - center) ** 2).sum() for center in chosen))
        wanted, total = number * sum(weights), 0.0
        for point, weight in zip(points, weights, strict=True):
            total += weight
            if total > wanted:
                chosen.append(point)
                break
    return np.stack(chosen)


def plain_k_means(
    points: np.ndarray, u: np.ndarray, steps: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids and labels of one set, by loops."""
    centroids = plain_first(points, u)

    def nearest() -> np.ndarray:
        distances = [((points - center) ** 2).sum(axis=1) for center in centroids]
        return np.argmin(distances, axis=0)

    for _ in range(steps):
        labels = nearest()
        moved = centroids.copy()
        for number in range(len(centroids)):
            if (labels == number).any():
                moved[number] = points[labels == number].mean(axis=0)
        shift = np.sqrt(((moved - centroids) ** 2).sum())
        centroids = moved
        if shift < tolerance:
            break
    return centroids, nearest()


@pytest.mark.parametrize(
    ("k", "steps", "tolerance"),
    [(3, 20, 1e-4), (8, 20, 1e-4), (8, 2, 1e-4), (5, 20, 0.5), (1, 3, 0)],
)
def test_each_set_is_clustered_as_by_loops(k: int, steps: int, tolerance: float) -> None:
    points, u = blobs(), uniform(3, k)
    found = k_means(points, u, steps=steps, tolerance=tolerance)
    for number in range(3):
        centroids, labels = plain_k_means(
            points[number].numpy(), u[number].numpy(), steps, tolerance
        )
        np.testing.assert_allclose(found.centroids[number], centroids, atol=1e-9)
        np.testing.assert_array_equal(found.labels[number], labels)


def test_from_the_same_centroids_scikit_learn_ends_in_the_same_clusters() -> None:
    points, u = blobs(sets=4, n=200), uniform(4, 6)
    found = k_means(points, u, steps=300, tolerance=1e-12)
    for number, of_set in enumerate(points.numpy()):
        first = plain_first(of_set, u[number].numpy())
        theirs = KMeans(6, init=first, n_init=1, tol=0, max_iter=300).fit(of_set)
        np.testing.assert_allclose(found.centroids[number], theirs.cluster_centers_, atol=1e-9)
        np.testing.assert_array_equal(found.labels[number], theirs.labels_)


def test_other_sets_change_nothing_of_a_set() -> None:
    points, u = blobs(), uniform(3, 4)
    together = k_means(points, u, steps=20, tolerance=1e-4)
    alone = k_means(points[1:2], u[1:2], steps=20, tolerance=1e-4)
    torch.testing.assert_close(together.centroids[1:2], alone.centroids, rtol=0, atol=1e-12)
    assert together.labels[1:2].equal(alone.labels)


def test_points_that_coincide_are_one_cluster_and_others_keep_their_centroids() -> None:
    points = torch.ones(1, 6, 2, dtype=torch.float64)
    found = k_means(points, uniform(1, 3), steps=20, tolerance=1e-4)
    assert found.labels.tolist() == [[0] * 6]
    assert found.centroids.equal(torch.ones(1, 3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\b2 points .*\b3 clusters"):
        k_means(points[:, :2], uniform(1, 3), steps=20, tolerance=1e-4)


def test_the_nearest_centroid_of_another_cluster() -> None:
    points, u = blobs(), uniform(3, 4)
    clusters = k_means(points, u, steps=20, tolerance=1e-4)
    found = distances_to_others(points, clusters)
    for number in range(3):
        for point, label, distance in zip(
            points[number], clusters.labels[number], found[number], strict=True
        ):
            others = [center for k, center in enumerate(clusters.centroids[number]) if k != label]
            expected = min(float((point - center).norm()) for center in others)
            assert float(distance) == pytest.approx(expected, rel=1e-12)
    one = k_means(points, uniform(3, 1), steps=20, tolerance=1e-4)
    assert distances_to_others(points, one).isinf().all()
