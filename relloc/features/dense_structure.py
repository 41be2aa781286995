"""DSE: how well the features of places within images are structured, without labels.

Dai, Xu, Wen, Liu, Huang, "Exploring Structural Degradation in Dense Representations for
Self-supervised Learning", NeurIPS 2025 (arXiv 2510.17299). docs/protocols.md 3.17 has the formula,
its constants and how the authors' code differs.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from relloc.features.k_means import distances_to_others, k_means, memberships
from relloc.seeds import Use, seed_for

IMAGE_CLUSTERS = 3
GROUP_IMAGES = 8
GROUP_CLUSTERS = IMAGE_CLUSTERS * GROUP_IMAGES
# Of fewer places, each could be a cluster by itself.
_FEWEST_PLACES = IMAGE_CLUSTERS + 1
_STEPS = 20
_TOLERANCE = 1e-4  # of features that have length 1
# Rows and columns of a map that are taken at most: those of the authors' vision transformers.
_MOST_SIDE = 14
# Memory, in bytes, of the float64 features that are clustered at once. k-means takes as much again,
# and the clusters' spreads three times as much.
_WORK_BYTES = 2**27

Places = Float[Tensor, "images places d"]
GroupPlaces = Float64[Tensor, "groups images places d"]
FeatureMaps = Float[Tensor, "images d rows columns"]
Numbers = list[Float64[Tensor, "_m"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseStructure:
    """DSE and its terms, all without unit.

    Attributes:
        between: Mean distance of places to the nearest centroid of another cluster, in groups of 8
            images.
        dimension: Effective rank of all places, as a share of the highest that is possible.
        within_group: Mean spread of the 24 clusters of a group of 8 images.
        within_image: Mean spread of the 3 clusters of an image.
        n: The number of images.

    Distances and spreads are divided by the mean distance of places from their mean.
    """

    between: float
    dimension: float
    within_group: float
    within_image: float
    n: int

    @property
    def dse(self) -> float:
        """The sum of `between` and `dimension` less the mean of the two spreads."""
        return self.between + self.dimension - (self.within_group + self.within_image) / 2


def unit_places(maps: FeatureMaps) -> Places:
    """Returns the features of places of each map, scaled to length 1; zero features stay zero.

    Of maps of more than 14 rows or columns, 14 evenly spaced ones are taken.
    """
    rows, columns = maps.shape[2:]
    maps = maps[:, :, _evenly_spaced(rows)][:, :, :, _evenly_spaced(columns)]
    places = maps.flatten(2).transpose(1, 2)
    return normalize(places.float(), dim=2)


def _evenly_spaced(n: int) -> list[int]:
    """Returns the middle of each of 14 equal parts of n rows, or all rows if there are no more."""
    count = min(n, _MOST_SIDE)
    return [(2 * step + 1) * n // (2 * count) for step in range(count)]


def dense_structure(
    places: Places,
    images: Sequence[int],
    *,
    seed: int,
    device: torch.device,
) -> DenseStructure:
    """Returns DSE of features that `unit_places` returned.

    Images are divided into groups of 8 at random; those left over are not used. Memory on `device`
    is bounded: about a gigabyte, and d x d numbers in float64, whatever the number of images.

    Args:
        places: Their features, on any device.
        images: The number of each image, from which its random numbers are made.
        seed: The seed of all randomness.
        device: Where it is computed.

    Raises:
        ValueError: features are not finite, there are fewer than 8 images or 4 places in each, or
            all places have the same features.
    """
    n_bad = int((~places.isfinite()).sum())
    if n_bad:
        raise ValueError(f"{n_bad} features of places are not finite")
    n_groups = len(images) // GROUP_IMAGES
    n_places = places.shape[1]
    if not n_groups:
        raise ValueError(f"{len(images)} images are too few: it needs {GROUP_IMAGES}")
    if n_places < _FEWEST_PLACES:
        raise ValueError(f"an image has {n_places} places: it needs {_FEWEST_PLACES}")
    groups = _Groups(
        places=places,
        order=_random_order(images, seed)[: n_groups * GROUP_IMAGES],
        device=device,
    )
    unit = _mean_distance_from_mean(groups)
    distances: Numbers = []
    of_groups: Numbers = []
    of_images: Numbers = []
    for first, chunk in groups.chunks():
        u = _uniform(
            Use.DENSE_GROUP_CLUSTERS,
            seed,
            range(first, first + len(chunk)),
            GROUP_CLUSTERS,
        )
        points = chunk.flatten(1, 2)
        clusters = k_means(points, u.to(device), steps=_STEPS, tolerance=_TOLERANCE)
        distances.append(distances_to_others(points, clusters).flatten())
        of_groups.append(spreads(points, clusters.labels, GROUP_CLUSTERS).flatten())

        positions = groups.positions(first, len(chunk))
        u = _uniform(
            Use.DENSE_IMAGE_CLUSTERS,
            seed,
            [images[position] for position in positions],
            IMAGE_CLUSTERS,
        )
        points = chunk.flatten(0, 1)
        labels = k_means(points, u.to(device), steps=_STEPS, tolerance=_TOLERANCE).labels
        # First the mean within each image, then over images, as an image may have fewer clusters.
        of_images.append(spreads(points, labels, IMAGE_CLUSTERS).nanmean(dim=1))
    return DenseStructure(
        between=float(torch.cat(distances).mean()) / unit,
        dimension=_share_of_dimensions(groups),
        within_group=float(torch.cat(of_groups).nanmean()) / unit,
        within_image=float(torch.cat(of_images).nanmean()) / unit,
        n=len(groups.order),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Groups:
    """Images in groups of 8: `order` has their positions in `places`, one group after another."""

    places: Places
    order: Sequence[int]
    device: torch.device

    def positions(self, first: int, n: int) -> Sequence[int]:
        """Returns the positions of the images of `n` groups from the group `first` on."""
        return self.order[first * GROUP_IMAGES : (first + n) * GROUP_IMAGES]

    def chunks(self) -> Iterator[tuple[int, GroupPlaces]]:
        """Yields the number of a first group, and some groups in float64 on the device."""
        bytes_of_group = 8 * GROUP_IMAGES * self.places[0].numel()
        size = max(1, _WORK_BYTES // bytes_of_group)
        n_groups = len(self.order) // GROUP_IMAGES
        for first in range(0, n_groups, size):
            positions = torch.tensor(self.positions(first, size), device=self.places.device)
            images = self.places[positions].to(self.device).double()
            yield first, images.unflatten(0, (-1, GROUP_IMAGES))


def _random_order(images: Sequence[int], seed: int) -> list[int]:
    """Returns the positions of the images in a random order, which those of `images` do not change.

    Neighbors in a data set may be of one class, which would make groups of one class.
    """
    generator = torch.Generator().manual_seed(seed_for(Use.DENSE_GROUPS, seed))
    by_number = sorted(range(len(images)), key=images.__getitem__)
    shuffled = torch.randperm(len(images), generator=generator).tolist()
    return [by_number[position] for position in shuffled]


def _uniform(use: Use, seed: int, keys: Sequence[int], k: int) -> Float64[Tensor, "sets k"]:
    """Returns k random numbers in [0, 1) for each key."""
    rows = []
    for key in keys:
        generator = torch.Generator().manual_seed(seed_for(use, seed, key))
        rows.append(torch.rand(k, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _mean_distance_from_mean(groups: _Groups) -> float:
    """Returns the mean distance of all places from their mean.

    Raises:
        ValueError: it is zero, up to rounding.
    """
    n_places, d = groups.places.shape[1:]
    n = len(groups.order) * n_places
    total = torch.zeros(d, dtype=torch.float64, device=groups.device)
    for _, chunk in groups.chunks():
        total += chunk.sum(dim=(0, 1, 2))
    mean = total / n
    distance = 0.0
    for _, chunk in groups.chunks():
        distance += float((chunk - mean).norm(dim=-1).sum())
    # Features of length 1 in float32 differ by its rounding, though they are the same.
    if distance / n <= torch.finfo(torch.float32).eps:
        raise ValueError(f"all places of {len(groups.order)} images have the same features")
    return distance / n


def spreads(
    points: Float64[Tensor, "sets n d"],
    labels: Int64[Tensor, "sets n"],
    k: int,
) -> Float64[Tensor, "sets k"]:
    """Returns the spread of each cluster: the sum of the singular values of its centered points.

    It is divided by the root of max(n - 1, d), with n the points of the cluster. Clusters of fewer
    than two points have none, which is nan.
    """
    n_sets, n, d = points.shape
    counts = memberships(labels, k).sum(dim=2)
    # The points of a cluster stand together in this order, from the cluster's first position on.
    order = labels.argsort(dim=1, stable=True)
    firsts = counts.cumsum(dim=1) - counts
    sizes = counts.flatten()
    result = torch.full((n_sets * k,), torch.nan, dtype=points.dtype, device=points.device)
    by_size = sizes.argsort()
    by_size = by_size[sizes[by_size] >= 2]
    for chosen in _batches_by_size(by_size, sizes[by_size].tolist(), d):
        n_members = sizes[chosen]
        offsets = torch.arange(int(n_members.max()), device=points.device)
        # Clusters of a batch are filled up to the size of the largest with zeros.
        is_member = offsets < n_members[:, None]
        positions = (firsts.flatten()[chosen][:, None] + offsets).clamp(max=n - 1)
        sets = chosen.div(k, rounding_mode="floor")[:, None]
        members = points[sets, order[sets, positions]]
        members = members * is_member[:, :, None]
        means = members.sum(dim=1, keepdim=True) / n_members[:, None, None]
        centered = (members - means) * is_member[:, :, None]
        scale = (n_members - 1).clamp(min=d).sqrt()
        result[chosen] = _singular_values(centered).sum(dim=1) / scale
    return result.unflatten(0, (n_sets, k))


def _batches_by_size(
    indices: Int64[Tensor, "m"],
    sizes: Sequence[int],
    d: int,
) -> Iterator[Int64[Tensor, "_b"]]:
    """Yields clusters, sorted by size, in batches that take a bounded memory when filled up."""
    first = 0
    while first < len(sizes):
        end = first + 1
        while end < len(sizes):
            n_values = (end + 1 - first) * sizes[end] * (d + sizes[end])
            # Clusters that are filled up to more than twice their size would waste time.
            if 8 * n_values > _WORK_BYTES or sizes[end] > 2 * sizes[first]:
                break
            end += 1
        yield indices[first:end]
        first = end


def _share_of_dimensions(groups: _Groups) -> float:
    """Returns exp of the entropy of the singular values of all places, divided by their number."""
    n_places, d = groups.places.shape[1:]
    n = len(groups.order) * n_places
    if n < d:
        # So few rows are a small matrix.
        rows = torch.cat([chunk.flatten(0, 2) for _, chunk in groups.chunks()])
        values = _singular_values(rows)
    else:
        products = torch.zeros(d, d, dtype=torch.float64, device=groups.device)
        for _, chunk in groups.chunks():
            rows = chunk.flatten(0, 2)
            products += rows.T @ rows
        values = _roots(torch.linalg.eigvalsh(products))
    p = values / values.sum()
    entropy = torch.special.entr(p).sum()
    return float(entropy.exp()) / min(n, d)


def _singular_values(rows: Float64[Tensor, "*sets n d"]) -> Float64[Tensor, "*sets m"]:
    """Returns the min(n, d) singular values of each matrix, from the products of its shorter side.

    That is a small part of the time of a decomposition. Values below 1e-8 of the largest, which
    squares lose in rounding, are zero or have an error of this size.
    """
    n, d = rows.shape[-2:]
    transposed = rows.transpose(-1, -2)
    products = rows @ transposed if n <= d else transposed @ rows
    return _roots(torch.linalg.eigvalsh(products))


def _roots(eigenvalues: Float64[Tensor, "*sets m"]) -> Float64[Tensor, "*sets m"]:
    """Returns the roots of eigenvalues, of which those within rounding of zero become zero."""
    largest = eigenvalues.amax(dim=-1, keepdim=True)
    rounding = torch.finfo(eigenvalues.dtype).eps * eigenvalues.shape[-1]
    is_zero = eigenvalues <= rounding * largest
    return eigenvalues.masked_fill(is_zero, 0).sqrt()
