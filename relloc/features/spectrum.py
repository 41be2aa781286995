"""Measures how many directions features use, without labels, from their singular values.

RankMe and the stable rank are effective ranks; alpha-ReQ is the exponent of the decay of the
eigenvalues.
"""

import dataclasses
import functools
import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

FeatureMatrix = Float[Tensor, "n d"]  # one row per image
SingularValues = Float64[Tensor, "m"]  # min(n, d) of them
SquareMatrix = Float64[Tensor, "m m"]

_RANKME_EPSILON = 1e-7  # RankMe's constant for float32
# Ranks, counted from 1 at the largest eigenvalue, between which alpha-ReQ's line is fitted.
_FIRST_RANK = 4
_LAST_RANK = 100
# Features with a smaller side up to this are decomposed themselves, which takes below a second.
_LARGEST_DIRECT = 256
_CHUNK = 1024  # rows or columns that are in float64 at once
# Bounds of errors that are negligible: of the logarithms of eigenvalues, and of the sum of singular
# values, as a part of it. RankMe may then be off by 3.5e-7 of itself; it was by 1e-12 or less.
_MOST_ERROR = 1e-8
_ERROR_FACTOR = 64  # epsilons; up to 40 were seen
_RANGE_OF_SQUARES = (1e-200, 1e200)


class Spectrum:
    """The singular values of features, from which all measures are computed.

    They are decomposed when a measure first asks for it, once for all that ask for the same. Large
    features are not decomposed themselves: the eigenvalues of their Gram matrix, n x n or d x d,
    are the squares of their singular values, and take a tenth of the time. Squares of small
    singular values are lost in the rounding of large ones. So the eigenvalues are taken where the
    bound of their error is negligible for the measure, and the singular values otherwise.

    Example:
        >>> spectrum = Spectrum(features, device=torch.device("cuda"))
        >>> spectrum.rankme(), spectrum.stable_rank(), spectrum.alpha_req()

    Args:
        features: one row per image.
        device: where Gram matrices are made and decomposed, in memory of about 40 m² bytes with m
            the smaller side of the features; None for the device of the features.

    Raises:
        ValueError: features are not finite.
    """

    def __init__(self, features: FeatureMatrix, *, device: torch.device | None = None) -> None:
        is_bad = ~features.isfinite()
        n_bad = int(is_bad.sum())
        if n_bad:
            raise ValueError(f"{n_bad} of {features.numel()} features are not finite")
        self._features = features
        self._device = device or features.device

    def rankme(self) -> float:
        """Returns RankMe, an effective rank between 1 and min(n, d).

        It is 1 if all features lie on one line through the origin, and min(n, d) if all directions
        are used alike. With s the singular values of the features, not centered, and
        p = s / sum(s) + 1e-7, RankMe is exp(-sum(p log p)) over all min(n, d) of them: Garrido,
        Balestriero, Najman, LeCun, "RankMe", ICML 2023, whose constant for float32 is 1e-7.
        Singular values are computed in float64 here. RankMe grows with n until n is several times
        d, so only values of the same n can be compared.

        Raises:
            ValueError: all features are zero.
        """
        singular_values = self._singular_values
        # The constant keeps the logarithm of a zero finite.
        p = singular_values / singular_values.sum() + _RANKME_EPSILON
        log_p = p.log()
        entropy = -(p * log_p).sum()
        return float(torch.exp(entropy))

    def stable_rank(self) -> float:
        """Returns the stable rank, between 1 and min(n, d): the sum of s² over the largest s².

        s are the singular values of the features, not centered, as of RankMe. It is 1 where RankMe
        is, and counts strong directions only: small singular values, also those of rounding, hardly
        change it.

        Raises:
            ValueError: all features are zero.
        """
        singular_values = self._singular_values
        # Divided by the largest at first, as squares of tiny features would be zero.
        shares = singular_values / singular_values.max()
        return float(shares.square().sum())

    def alpha_req(self) -> float:
        """Returns alpha-ReQ: the exponent a of the decay rank^-a of the covariance's eigenvalues.

        Agrawal, Mondal, Ghosh, Richards, "alpha-ReQ", NeurIPS 2022. The paper gives no range of
        ranks; this is the fit of the authors' code (fastssl, `stringer_get_powerlaw` on ranks from
        3 to 99 counted from 0). Features are centered, and a line through log eigenvalue over log
        rank is fitted by least squares with weights 1 / rank, over ranks 4 to 100 counted from 1 at
        the largest. The range ends earlier where features span fewer directions: at min(n - 1, d)
        or less.

        Raises:
            ValueError: features span fewer than 5 directions, so that no line has a slope.
        """
        gram = self._gram
        if gram is not None:
            eigenvalues = _descending_eigenvalues(gram.centered)
            last = eigenvalues[_LAST_RANK - 1]
            # Relative errors of eigenvalues are absolute ones of their logarithms.
            if gram.error_of(eigenvalues) <= _MOST_ERROR * last:
                return -_slope(eigenvalues[_FIRST_RANK - 1 : _LAST_RANK].log())
        return _alpha_req_from_singular_values(self._features.double())

    @functools.cached_property
    def _gram(self) -> "_Gram | None":
        """The Gram matrices, or None for features that are decomposed themselves."""
        if min(self._features.shape) <= _LARGEST_DIRECT:
            return None
        gram = _gram(self._features, self._device)
        # Few units may not be dead, and squares of huge or tiny features leave float64's range.
        is_large = len(gram.plain) > _LARGEST_DIRECT
        least, most = _RANGE_OF_SQUARES
        is_in_range = least < float(gram.plain.diagonal().sum()) < most
        return gram if is_large and is_in_range else None

    @functools.cached_property
    def _singular_values(self) -> SingularValues:
        """All singular values of the features, not centered. Raises `ValueError` as `rankme`."""
        gram = self._gram
        if gram is not None:
            eigenvalues = _descending_eigenvalues(gram.plain).clamp(min=0)
            singular_values = eigenvalues.sqrt()
            # An error e of s² is one of s of at most e / s, and of at most the root of e. The
            # logarithm of RankMe changes by at most 2 (1 - log 1e-7), below 35, times the sum of
            # these errors as a part of the sum of singular values.
            error = gram.error_of(eigenvalues)
            errors = (error / singular_values).clamp(max=math.sqrt(error))
            if errors.sum() <= _MOST_ERROR * singular_values.sum():
                zeros = singular_values.new_zeros(gram.n_zeros)
                return torch.cat([singular_values, zeros])
        singular_values = torch.linalg.svdvals(self._features.double())
        if not singular_values.any():
            raise ValueError(
                f"all features of {len(self._features)} images are zero, so they have no "
                "directions to count"
            )
        return singular_values


def rankme(features: FeatureMatrix) -> float:
    """Returns RankMe of features (`Spectrum.rankme`).

    Raises:
        ValueError: features are not finite, or all are zero.
    """
    return Spectrum(features).rankme()


def stable_rank(features: FeatureMatrix) -> float:
    """Returns the stable rank of features (`Spectrum.stable_rank`).

    Raises:
        ValueError: features are not finite, or all are zero.
    """
    return Spectrum(features).stable_rank()


def alpha_req(features: FeatureMatrix) -> float:
    """Returns alpha-ReQ of features (`Spectrum.alpha_req`).

    Raises:
        ValueError: features are not finite, or span fewer than 5 directions.
    """
    return Spectrum(features).alpha_req()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Gram:
    """Gram matrices of features as they are and minus their mean, of rows or of columns.

    Their eigenvalues are squares of singular values. `n_zeros` more singular values are zero.
    """

    plain: SquareMatrix
    centered: SquareMatrix
    n_zeros: int

    def error_of(self, eigenvalues: Float64[Tensor, "m"]) -> float:
        """Returns how far eigenvalues of one of the matrices may be off, each.

        An element is off by some epsilon times the lengths of its two vectors, the matrix thus by
        that times the sum of its eigenvalues; so is the result of the solver.
        """
        return _ERROR_FACTOR * torch.finfo(torch.float64).eps * float(eigenvalues.sum())


def _gram(features: FeatureMatrix, device: torch.device) -> _Gram:
    """Returns the smaller Gram matrices of features, made on `device`."""
    n, d = features.shape
    # Dead units have zeros for all images. They would be eigenvalues of zero, which rounding moves.
    used = features[:, features.any(dim=0)]
    n_used = used.shape[1]
    n_zeros = min(n, d) - min(n, n_used)
    mean = used.mean(dim=0, dtype=torch.float64).to(device)
    side = min(n, n_used)
    centered = torch.zeros(side, side, dtype=torch.float64, device=device)
    if n_used < n:
        for rows in used.split(_CHUNK):
            deviations = rows.to(device).double() - mean
            centered.addmm_(deviations.T, deviations)
        return _Gram(
            plain=centered + n * mean.outer(mean),
            centered=centered,
            n_zeros=n_zeros,
        )
    # Products of deviations with the mean, one for each image
    products = torch.zeros(n, dtype=torch.float64, device=device)
    for columns, mean_of_columns in zip(used.split(_CHUNK, dim=1), mean.split(_CHUNK), strict=True):
        deviations = columns.to(device).double() - mean_of_columns
        centered.addmm_(deviations, deviations.T)
        products.addmv_(deviations, mean_of_columns)
    # (x + m)(y + m) = xy + xm + ym + mm
    plain = centered + products + products.unsqueeze(1) + mean.square().sum()
    return _Gram(plain=plain, centered=centered, n_zeros=n_zeros)


def _descending_eigenvalues(matrix: SquareMatrix) -> Float64[Tensor, "m"]:
    """Returns the eigenvalues of a symmetric matrix, largest first, on the CPU."""
    return torch.linalg.eigvalsh(matrix).flip(0).cpu()


def _alpha_req_from_singular_values(exact: Float64[Tensor, "n d"]) -> float:
    """Returns alpha-ReQ, also of features that span few directions. Raises as `alpha_req`."""
    centered = exact - exact.mean(dim=0)
    singular_values = torch.linalg.svdvals(centered)
    # Singular values up to the rounding of float64 are zeros: those directions are not used. This
    # is the bound of numpy.linalg.matrix_rank, with the Frobenius norm.
    epsilon = torch.finfo(torch.float64).eps
    largest_side = max(exact.shape)
    rounding = epsilon * largest_side * float(exact.norm())
    is_used = singular_values > rounding
    n_directions = int(is_used.sum())
    if n_directions <= _FIRST_RANK:
        raise ValueError(
            f"features of {len(exact)} images span {n_directions} directions around their mean, "
            f"but alpha-ReQ needs {_FIRST_RANK + 1}: "
            f"its power law is fitted from rank {_FIRST_RANK} on"
        )
    last_rank = min(n_directions, _LAST_RANK)
    # Eigenvalues of the covariance are squares of singular values, up to a factor 1 / (n - 1) that
    # moves the line but not its slope.
    eigenvalues = singular_values[_FIRST_RANK - 1 : last_rank].square()
    return -_slope(eigenvalues.log())


def _slope(logs: Float[Tensor, "m"]) -> float:
    """Returns the slope of `logs`, at ranks from `_FIRST_RANK` on, over the logarithm of the rank.

    Least squares with weights 1 / rank, as low ranks are few on a logarithmic axis but count most.
    """
    ranks = torch.arange(
        _FIRST_RANK,
        _FIRST_RANK + len(logs),
        dtype=logs.dtype,
        device=logs.device,
    )
    weights = 1 / ranks
    weights = weights / weights.sum()
    x = ranks.log()
    mean_x = (weights * x).sum()
    centered_x = x - mean_x
    # Slope of weighted least squares: weighted covariance of x and y over weighted variance of x.
    covariance = (weights * centered_x * logs).sum()
    variance = (weights * centered_x.square()).sum()
    return float(covariance / variance)
