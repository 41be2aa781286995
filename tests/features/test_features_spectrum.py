import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from relloc.features.spectrum import Spectrum, alpha_req, rankme, stable_rank

Measure = Callable[[Tensor], float]
MEASURES = pytest.mark.parametrize("measure", [rankme, stable_rank, alpha_req])


def orthonormal(n: int, d: int, seed: int = 0) -> Tensor:
    """n x d with orthonormal columns (d <= n)."""
    noise = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def centered_orthonormal(n: int, d: int) -> Tensor:
    noise = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(noise - noise.mean(dim=0)).Q


def power_law(n: int, d: int, alpha: float) -> Tensor:
    """Centered features whose covariance has the eigenvalues rank^-alpha, up to a factor."""
    ranks = torch.arange(1, d + 1, dtype=torch.float64)
    return centered_orthonormal(n, d) * ranks ** (-alpha / 2)


def noise(n: int = 60, d: int = 20) -> Tensor:
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, d)
        + 1
    )


@pytest.mark.parametrize("values", [(1, 1, 1, 1, 1), (8, 4, 2, 1), (3,), (5, 1e-3, 0, 0)])
def test_rankme_is_the_exponential_of_the_entropy_of_given_singular_values(
    values: tuple[float, ...],
) -> None:
    features = orthonormal(12, len(values)) @ torch.diag(torch.tensor(values, dtype=torch.float64))
    p = [value / sum(values) + 1e-7 for value in values]
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert rankme(features) == pytest.approx(expected, rel=1e-9)
    assert rankme(features.T) == pytest.approx(expected, rel=1e-9)


def test_rankme_reaches_from_one_to_the_smaller_side() -> None:
    line = torch.arange(1.0, 31).outer(torch.arange(1.0, 11))
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert rankme(orthonormal(30, 10)) == pytest.approx(10, abs=1e-3)
    assert rankme(orthonormal(30, 10).T) == pytest.approx(10, abs=1e-3)
    wide = torch.randn(5000, 10, generator=torch.Generator().manual_seed(0))
    assert 9.9 < rankme(wide) < 10


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_stable_rank_is_the_ratio_of_squared_norms(shape: tuple[int, int]) -> None:
    features = noise(*shape)
    exact = features.double().numpy()
    expected = np.linalg.norm(exact, "fro") ** 2 / np.linalg.norm(exact, 2) ** 2
    assert stable_rank(features) == pytest.approx(expected, rel=1e-12)
    assert stable_rank(1e-200 * features.double()) == pytest.approx(expected, rel=1e-9)


def test_stable_rank_reaches_from_one_to_the_smaller_side() -> None:
    line = torch.arange(1.0, 31).outer(torch.arange(1.0, 11))
    assert stable_rank(line) == pytest.approx(1, abs=1e-9)
    assert stable_rank(orthonormal(30, 10)) == pytest.approx(10, abs=1e-9)


def test_rankme_is_not_centered_alpha_req_is() -> None:
    features = noise()
    moved = features + 50
    assert rankme(moved) < 0.7 * rankme(features)
    assert alpha_req(moved) == pytest.approx(alpha_req(features), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(("n", "d"), [(300, 200), (300, 40), (300, 5), (160, 150)])
def test_alpha_req_recovers_the_exponent_of_a_power_law(alpha: float, n: int, d: int) -> None:
    assert alpha_req(power_law(n, d, alpha)) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_fits_ranks_4_to_100_with_weights_that_fall_as_the_rank() -> None:
    rng = np.random.default_rng(0)
    eigenvalues = np.sort(np.exp(rng.normal(size=150)))[::-1].copy()
    features = centered_orthonormal(200, 150) * torch.from_numpy(np.sqrt(eigenvalues))
    ranks = np.arange(4, 101)
    # polyfit's weights multiply residuals, so they are roots of those of the squares
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[3:100]), 1, w=np.sqrt(1 / ranks))
    assert alpha_req(features) == pytest.approx(-slope, rel=1e-9)
    changed = torch.from_numpy(
        np.r_[eigenvalues[:3] * 1e4, eigenvalues[3:100], eigenvalues[100:] * 1e-4]
    ).sqrt()
    assert alpha_req(centered_orthonormal(200, 150) * changed) == pytest.approx(-slope, rel=1e-9)


def test_alpha_req_ends_where_the_directions_do() -> None:
    """Fewer images than numbers: only the n - 1 eigenvalues of the covariance that are not zero."""
    few = power_law(300, 200, 1.0)[:30]
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(few.numpy(), rowvar=False)))[::-1][:29]
    ranks = np.arange(4, 30)
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[3:]), 1, w=np.sqrt(1 / ranks))
    assert alpha_req(few) == pytest.approx(-slope, rel=1e-6)


@MEASURES
@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_rotations_scale_and_the_order_of_rows_change_nothing(
    measure: Measure, shape: tuple[int, int]
) -> None:
    features = noise(*shape).double()
    expected = pytest.approx(measure(features), rel=1e-6)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    assert measure(features @ orthonormal(shape[1], shape[1])) == expected
    assert measure(features[order]) == expected
    assert measure(1000 * features) == expected


@MEASURES
def test_float32_features_are_measured_in_float64(measure: Measure) -> None:
    features = noise()
    assert measure(features) == measure(features.double())


@MEASURES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_an_error_with_their_count(
    measure: Measure, value: float
) -> None:
    features = noise(6, 5)
    features[2, 1:4] = value
    with pytest.raises(ValueError, match="3 of 30 features .*finite"):
        measure(features)


def test_features_that_collapsed_have_no_rank_and_no_slope() -> None:
    for measure in (rankme, stable_rank):
        for n, d in ((9, 6), (300, 280)):
            with pytest.raises(ValueError, match=rf"\b{n} images .*zero"):
                measure(torch.zeros(n, d))
    same = torch.linspace(0.1, 0.7, 40).repeat(
        30, 1
    )  # sums round, so the mean is not exactly the row
    assert rankme(same) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"\b30 images .*\b0 directions .*\b5\b"):
        alpha_req(same)
    with pytest.raises(ValueError, match="span 4 directions"):
        alpha_req(noise(5, 20))


def pooled(n: int, d: int, dead: int = 0) -> Tensor:
    """Features as a network pools them: a mean that outweighs all else, and correlated units.

    The last `dead` units are zero.
    """
    generator = torch.Generator().manual_seed(3)
    directions = min(n, d)
    strengths = torch.arange(1, directions + 1) ** -0.7
    varied = torch.randn(n, directions, generator=generator) * strengths
    features = varied @ torch.randn(directions, d, generator=generator) + 0.03 * torch.randn(
        n, d, generator=generator
    )
    features += 20
    features[:, d - dead :] = 0
    return features


def measured_by_numpy(features: Tensor) -> tuple[float, float, float]:
    """RankMe, the stable rank and alpha-ReQ from singular values of the features themselves."""
    exact = features.double().numpy()
    s = np.linalg.svd(exact, compute_uv=False)
    p = s / s.sum() + 1e-7
    eigenvalues = np.linalg.svd(exact - exact.mean(axis=0), compute_uv=False)[3:100] ** 2
    ranks = np.arange(4, 101)
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues), 1, w=np.sqrt(1 / ranks))
    return math.exp(-(p * np.log(p)).sum()), float((s**2).sum() / s.max() ** 2), -slope


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the features that were decomposed themselves."""
    shapes: list[tuple[int, ...]] = []
    svdvals = torch.linalg.svdvals

    def noted(matrix: Tensor) -> Tensor:
        shapes.append(tuple(matrix.shape))
        return svdvals(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", noted)
    return shapes


@pytest.mark.parametrize(
    ("n", "d", "dead"),
    [
        (300, 1300, 0),
        (1300, 300, 0),
        (1300, 400, 60),
        (300, 400, 60),
        (380, 400, 60),
    ],
)
def test_large_features_are_measured_by_their_gram_matrix(
    decomposed: list[tuple[int, ...]], n: int, d: int, dead: int
) -> None:
    features = pooled(n, d, dead)
    spectrum = Spectrum(features)
    measured = (spectrum.rankme(), spectrum.stable_rank(), spectrum.alpha_req())
    assert decomposed == []
    assert measured == pytest.approx(measured_by_numpy(features), rel=1e-9)


def with_twins() -> Tensor:
    """Half of the images are there twice, so that half of the singular values are zero."""
    return pooled(200, 500).repeat(2, 1)


def with_tiny_directions() -> Tensor:
    values = torch.logspace(0, -11, 280, dtype=torch.float64)
    return centered_orthonormal(300, 280) * values


def with_tiny_numbers() -> Tensor:
    return 1e-150 * pooled(300, 280).double()


@pytest.mark.parametrize("make", [with_twins, with_tiny_directions, with_tiny_numbers])
def test_what_is_lost_in_squares_is_decomposed_itself(
    decomposed: list[tuple[int, ...]], make: Callable[[], Tensor]
) -> None:
    features = make()
    expected = measured_by_numpy(features)
    spectrum = Spectrum(features)
    assert (spectrum.rankme(), spectrum.stable_rank()) == pytest.approx(expected[:2], rel=1e-9)
    # Once for both
    assert decomposed == [tuple(features.shape)]
    assert spectrum.alpha_req() == pytest.approx(expected[2], rel=1e-9)
    assert spectrum.rankme() == pytest.approx(expected[0], rel=1e-9)
    assert len(decomposed) <= 2


def test_a_large_spectrum_of_few_directions_ends_where_they_do() -> None:
    generator = torch.Generator().manual_seed(4)
    few = torch.randn(300, 50, generator=generator, dtype=torch.float64)
    features = few @ torch.randn(50, 400, generator=generator, dtype=torch.float64)
    eigenvalues = np.linalg.svd(features - features.mean(dim=0), compute_uv=False)[3:50] ** 2
    ranks = np.arange(4, 51)
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues), 1, w=np.sqrt(1 / ranks))
    assert alpha_req(features) == pytest.approx(-slope, rel=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 1300), (1300, 300)])
def test_a_gpu_measures_the_same(shape: tuple[int, int]) -> None:
    features = pooled(*shape)
    spectrum = Spectrum(features, device=torch.device("cuda"))
    measured = (spectrum.rankme(), spectrum.stable_rank(), spectrum.alpha_req())
    assert measured == pytest.approx(measured_by_numpy(features), rel=1e-9)
