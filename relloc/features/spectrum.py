"""Measures how many directions features use, without labels, from their singular values.

`rankme` and `stable_rank` are effective ranks; `alpha_req` is the exponent of the decay of the
eigenvalues.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

FeatureMatrix = Float[Tensor, "n d"]  # one row per image
SingularValues = Float[Tensor, "m"]  # min(n, d) of them, in float64

_RANKME_EPSILON = 1e-7  # RankMe's constant for float32
# Ranks, counted from 1 at the largest eigenvalue, between which alpha-ReQ's line is fitted.
_FIRST_RANK = 4
_LAST_RANK = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class EffectiveRanks:
    """RankMe and the stable rank of the same features."""

    rankme: float
    stable_rank: float


def effective_ranks(features: FeatureMatrix) -> EffectiveRanks:
    """Returns `rankme` and `stable_rank` of features, which are decomposed once for both.

    Raises:
        ValueError: features are not finite, or all are zero.
    """
    singular_values = _singular_values(features)
    return EffectiveRanks(
        rankme=_rankme(singular_values),
        stable_rank=_stable_rank(singular_values),
    )


def rankme(features: FeatureMatrix) -> float:
    """Returns RankMe, an effective rank between 1 and min(n, d).

    It is 1 if all features lie on one line through the origin, and min(n, d) if all directions
    are used alike. With s the singular values of the features, not centered, and
    p = s / sum(s) + 1e-7, RankMe is exp(-sum(p log p)) over all min(n, d) of them: Garrido,
    Balestriero, Najman, LeCun, "RankMe", ICML 2023, whose constant for float32 is 1e-7. Singular
    values are computed in float64 here. RankMe grows with n until n is several times d, so only
    values of the same n can be compared.

    Raises:
        ValueError: features are not finite, or all are zero.
    """
    return _rankme(_singular_values(features))


def stable_rank(features: FeatureMatrix) -> float:
    """Returns the stable rank, between 1 and min(n, d): the sum of s² divided by the largest s².

    s are the singular values of the features, not centered, as of RankMe. It is 1 where RankMe is,
    and counts strong directions only: small singular values, also those of rounding, hardly
    change it.

    Raises:
        ValueError: features are not finite, or all are zero.
    """
    return _stable_rank(_singular_values(features))


def _singular_values(features: FeatureMatrix) -> SingularValues:
    """Returns the singular values, not all of which are zero. Raises `ValueError` as `rankme`."""
    singular_values = torch.linalg.svdvals(_to_float64(features))
    if not singular_values.any():
        raise ValueError(
            f"all features of {len(features)} images are zero, so they have no directions to count"
        )
    return singular_values


def _rankme(singular_values: SingularValues) -> float:
    # The constant keeps the logarithm of a zero finite.
    p = singular_values / singular_values.sum() + _RANKME_EPSILON
    log_p = p.log()
    entropy = -(p * log_p).sum()
    return float(torch.exp(entropy))


def _stable_rank(singular_values: SingularValues) -> float:
    # Divided by the largest at first, as squares of tiny features would be zero.
    shares = singular_values / singular_values.max()
    return float(shares.square().sum())


def alpha_req(features: FeatureMatrix) -> float:
    """Returns alpha-ReQ: the exponent a of the decay rank^-a of the covariance's eigenvalues.

    Agrawal, Mondal, Ghosh, Richards, "alpha-ReQ", NeurIPS 2022. The paper gives no range of ranks;
    this is the fit of the authors' code (fastssl, `stringer_get_powerlaw` on ranks from 3 to 99
    counted from 0). Features are centered, and a line through log eigenvalue over log rank is
    fitted by least squares with weights 1 / rank, over ranks 4 to 100 counted from 1 at the
    largest. The range ends earlier where features span fewer directions: at min(n - 1, d) or less.

    Raises:
        ValueError: features are not finite, or span fewer than 5 directions, so that no line has a
            slope.
    """
    exact = _to_float64(features)
    centered = exact - exact.mean(dim=0)
    singular_values = torch.linalg.svdvals(centered)
    # Singular values up to the rounding of float64 are zeros: those directions are not used. This
    # is the bound of numpy.linalg.matrix_rank, with the Frobenius norm.
    epsilon = torch.finfo(torch.float64).eps
    largest_side = max(features.shape)
    rounding = epsilon * largest_side * float(exact.norm())
    is_used = singular_values > rounding
    n_directions = int(is_used.sum())
    if n_directions <= _FIRST_RANK:
        raise ValueError(
            f"features of {len(features)} images span {n_directions} directions around their mean, "
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


def _to_float64(features: FeatureMatrix) -> FeatureMatrix:
    """Returns the features in float64. Raises `ValueError` where some are not finite."""
    is_bad = ~features.isfinite()
    n_bad = int(is_bad.sum())
    if n_bad:
        raise ValueError(f"{n_bad} of {features.numel()} features are not finite")
    return features.double()
