"""k-means of many small sets of points at once, on the device of the points.

Sets of one size are clustered together, each by itself. Random numbers are passed in, so that a
set is clustered alike whatever others stand beside it.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

# Share of the squares of two points that their squared distance is less than by rounding alone.
_ROUNDING = 64 * torch.finfo(torch.float64).eps

Points = Float64[Tensor, "sets n d"]
Centroids = Float64[Tensor, "sets k d"]
Labels = Int64[Tensor, "sets n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clusters:
    """The clusters of each set: their centroids, and the cluster (0 to k - 1) of each point."""

    centroids: Centroids
    labels: Labels


def k_means(
    points: Points,
    u: Float64[Tensor, "sets k"],
    *,
    steps: int,
    tolerance: float,
) -> Clusters:
    """Returns k clusters of each set of points, by Lloyd's algorithm from k-means++ centroids.

    A set is done after `steps` steps, or once the root of the summed squares by which its centroids
    move is below `tolerance`. A cluster that loses all its points keeps its centroid. Each point
    ends in the cluster of its nearest centroid, of equally near ones the first.

    Memory: that of `points`, beside them.

    Args:
        points: The sets.
        u: Uniform random numbers in [0, 1), the only source of randomness; k is their number.
        steps: The most steps.
        tolerance: How little centroids move at the end, in the unit of the points.

    Raises:
        ValueError: a set has fewer than k points.
    """
    n = points.shape[1]
    k = u.shape[1]
    if n < k:
        raise ValueError(f"{n} points can't be divided into {k} clusters")
    centroids = _first_centroids(points, u)
    is_moving = torch.ones(len(points), dtype=torch.bool, device=points.device)
    for _ in range(steps):
        moved = _means(points, _nearest(points, centroids), centroids)
        shifts = (moved - centroids).square().sum(dim=(1, 2)).sqrt()
        # A set that is done stays as it is while others go on.
        centroids = torch.where(is_moving[:, None, None], moved, centroids)
        is_moving &= shifts >= tolerance
        if not is_moving.any():
            break
    return Clusters(centroids=centroids, labels=_nearest(points, centroids))


def _first_centroids(points: Points, u: Float64[Tensor, "sets k"]) -> Centroids:
    """Returns k points of each set, drawn as k-means++ does (Arthur and Vassilvitskii, 2007).

    The first is any point. Each further one is drawn with a probability in proportion to its
    squared distance from the nearest one that was drawn before.
    """
    n_sets, n, _ = points.shape
    sets = torch.arange(n_sets, device=points.device)
    equal = torch.ones(n_sets, n, dtype=points.dtype, device=points.device)
    weights = equal
    distances = torch.full_like(equal, torch.inf)
    squares = points.square().sum(dim=2)
    drawn = []
    for numbers in u.unbind(dim=1):
        indices = _drawn(weights, numbers)
        chosen = points[sets, indices]
        drawn.append(chosen)
        # By products, which read the points once where differences do three times.
        sums = squares + squares[sets, indices][:, None]
        to_chosen = sums - 2 * (points @ chosen[:, :, None]).squeeze(2)
        # Points that coincide have a distance of rounding, which is none.
        to_chosen = to_chosen.masked_fill(to_chosen <= _ROUNDING * sums, 0)
        distances = torch.minimum(distances, to_chosen)
        # Where all points coincide with drawn ones, each is as good as any other.
        is_spent = ~distances.any(dim=1, keepdim=True)
        weights = torch.where(is_spent, equal, distances)
    return torch.stack(drawn, dim=1)


def _drawn(
    weights: Float64[Tensor, "sets n"],
    u: Float64[Tensor, "sets"],
) -> Int64[Tensor, "sets"]:
    """Returns for each set an index with a probability in proportion to its weight."""
    # On the CPU, as GPUs have no cumulative sum that is the same each time.
    sums = weights.cpu().cumsum(dim=1)
    wanted = u.cpu()[:, None] * sums[:, -1:]
    # The first index whose sum exceeds the wanted one, so that none of weight 0 is drawn.
    indices = torch.searchsorted(sums, wanted, right=True).squeeze(1)
    last = weights.shape[1] - 1
    return indices.clamp(max=last).to(weights.device)


def _nearest(points: Points, centroids: Centroids) -> Labels:
    """Returns for each point the index of the nearest centroid."""
    # The square of the point itself is the same for all centroids, and is left out.
    squares = centroids.square().sum(dim=2)
    products = points @ centroids.transpose(1, 2)
    return (squares[:, None] - 2 * products).argmin(dim=2)


def _means(points: Points, labels: Labels, centroids: Centroids) -> Centroids:
    """Returns the mean of each cluster, or its centroid where it has no points."""
    k = centroids.shape[1]
    is_member = memberships(labels, k).to(points.dtype)
    counts = is_member.sum(dim=2, keepdim=True)
    means = (is_member @ points) / counts.clamp(min=1)
    return torch.where(counts > 0, means, centroids)


def memberships(labels: Labels, k: int) -> Bool[Tensor, "sets k n"]:
    """Returns for each cluster which points of its set are in it."""
    numbers = torch.arange(k, device=labels.device)
    return labels[:, None, :] == numbers[None, :, None]


def distances_to_others(points: Points, clusters: Clusters) -> Float[Tensor, "sets n"]:
    """Returns the distance of each point to the nearest centroid of another cluster than its own.

    It is infinite where there is one cluster only.
    """
    distances = torch.cdist(
        points,
        clusters.centroids,
        # Exact differences: products would lose half the digits of small distances.
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    k = clusters.centroids.shape[1]
    is_own = memberships(clusters.labels, k).transpose(1, 2)
    return distances.masked_fill(is_own, torch.inf).amin(dim=2)
