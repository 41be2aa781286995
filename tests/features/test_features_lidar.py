import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from relloc.features.lidar import ViewScatter


def views(n: int = 40, q: int = 6, d: int = 12, seed: int = 0) -> Tensor:
    """Features whose images differ in some directions more than in others."""
    generator = torch.Generator().manual_seed(seed)
    of_images = torch.randn(n, 1, d, generator=generator) * torch.linspace(0, 3, d)
    of_views = torch.randn(n, q, d, generator=generator) * torch.linspace(2, 0.5, d)
    return of_images + of_views + 1


def lidar(features: Tensor, size: int = 7) -> float:
    scatter = ViewScatter()
    for batch in features.split(size):
        scatter.add(batch)
    return scatter.lidar()


def plain(features: np.ndarray) -> float:
    """The formula written out, by the generalized eigenvalues of scipy."""
    n, q, d = features.shape
    means = features.mean(axis=1)
    between = np.cov(means, rowvar=False)
    within = np.zeros((d, d))
    for image, mean in zip(features, means, strict=True):
        within += (image - mean).T @ (image - mean) / (n * q)
    within += 1e-4 * np.trace(within) / d * np.eye(d)
    eigenvalues = scipy.linalg.eigh(between, within, eigvals_only=True).clip(min=0)
    p = eigenvalues / eigenvalues.sum()
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


@pytest.mark.parametrize(("n", "q", "d"), [(40, 6, 12), (10, 3, 20), (30, 2, 12), (200, 4, 3)])
def test_it_is_the_effective_rank_of_the_generalized_eigenvalues(n: int, q: int, d: int) -> None:
    features = views(n, q, d)
    found = lidar(features)
    assert found == pytest.approx(plain(features.double().numpy()), rel=1e-6)
    assert 1 <= found <= min(n - 1, d)


def test_it_counts_the_directions_that_tell_images_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 8, 20, generator=generator)
    signal = torch.zeros(2000, 1, 20)
    signal[:, :, :5] = 100 * torch.randn(2000, 1, 5, generator=generator)
    assert lidar(noise + signal) == pytest.approx(5, rel=0.01)
    # A direction in which views differ as much as images counts less.
    noise[:, :, 0] *= 100
    assert lidar(noise + signal) == pytest.approx(4, rel=0.05)


def test_order_rotation_scale_place_and_batches_change_nothing() -> None:
    features = views().double()
    expected = pytest.approx(lidar(features), rel=1e-9)
    generator = torch.Generator().manual_seed(3)
    assert lidar(features[torch.randperm(40, generator=generator)]) == expected
    assert lidar(features[:, torch.randperm(6, generator=generator)]) == expected
    noise = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    assert lidar(features @ torch.linalg.qr(noise).Q) == expected
    assert lidar(1000 * features) == expected
    assert lidar(1e-6 * features) == expected
    assert lidar(features + 5) == expected
    assert lidar(features, size=40) == expected


def test_features_that_do_not_define_it_say_why() -> None:
    features = views()
    same_views = features.mean(dim=1, keepdim=True).expand(40, 6, 12)
    with pytest.raises(ValueError, match=r"views .*\b40 images"):
        lidar(same_views)
    with pytest.raises(ValueError, match=r"views .*\b40 images"):
        lidar(torch.zeros(40, 6, 12))
    with pytest.raises(ValueError, match=r"\b40 images .*mean"):
        lidar(features[:1].expand(40, 6, 12))
    with pytest.raises(ValueError, match=r"\b1 images .*\b2\b"):
        lidar(features[:1])
    with pytest.raises(ValueError, match=r"\b0 images"):
        ViewScatter().lidar()
    features[3, 2, 1:4] = math.nan
    with pytest.raises(ValueError, match=r"\b3 features .*finite"):
        lidar(features)


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    assert lidar(views().cuda()) == pytest.approx(lidar(views()), rel=1e-6)
