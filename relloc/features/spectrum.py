"""How many directions features use, without labels: two measures of their spectrum."""

import torch
from jaxtyping import Float
from torch import Tensor

_EPSILON = 1e-7
_FIRST_RANK, _LAST_RANK = 4, 100


def rankme(features: Float[Tensor, "n d"]) -> float:
    """RankMe, from 1 (all features on one line) to min(n, d) (all directions used alike).

    With s the singular values of the features, not centered, and p = s / sum(s) + 1e-7, it is
    exp(-sum(p log p)) over all min(n, d) of them: Garrido, Balestriero, Najman, LeCun, "RankMe",
    ICML 2023, whose constant for float32 is 1e-7; singular values are computed in float64 here.
    It grows with n until n is several times d, so only numbers of one n compare.

    Raises:
        ValueError: features that are not finite, or all zero.
    """
    s = torch.linalg.svdvals(_doubles(features))
    if not s.any():
        raise ValueError(f"all features of {len(features)} images are zero: they have no directions")
    p = s / s.sum() + _EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def alpha_req(features: Float[Tensor, "n d"]) -> float:
    """Exponent a of the decay rank^-a of the eigenvalues of the features' covariance.

    Agrawal, Mondal, Ghosh, Richards, "alpha-ReQ", NeurIPS 2022. The paper gives no range; this is
    the fit of the authors' code (fastssl, `stringer_get_powerlaw` on ranks from 3 to 99 counted
    from 0): features are centered, and a line through log eigenvalue over log rank is fitted by
    least squares with weights 1 / rank, over ranks 4 to 100 counted from 1 at the largest. Ranks
    end earlier where the features span fewer directions: at min(n - 1, d) or less.

    Raises:
        ValueError: features that are not finite, or span fewer than 5 directions: no line has a slope.
    """
    doubles = _doubles(features)
    s = torch.linalg.svdvals(doubles - doubles.mean(dim=0))
    rounding = torch.finfo(torch.float64).eps * max(features.shape) * float(doubles.norm())
    directions = int((s > rounding).sum())
    if directions <= _FIRST_RANK:
        raise ValueError(
            f"features of {len(features)} images span {directions} directions around their mean: "
            f"the power law is fitted from rank {_FIRST_RANK} on and needs {_FIRST_RANK + 1}"
        )
    return -_slope(s[_FIRST_RANK - 1 : min(directions, _LAST_RANK)].square().log())


def _slope(logs: Float[Tensor, "m"]) -> float:
    """Slope of `logs`, at ranks from the first on, over log rank; weights 1 / rank."""
    ranks = torch.arange(_FIRST_RANK, _FIRST_RANK + len(logs), dtype=logs.dtype, device=logs.device)
    weights = (1 / ranks) / (1 / ranks).sum()
    x = ranks.log() - (weights * ranks.log()).sum()
    return float((weights * x * logs).sum() / (weights * x.square()).sum())


def _doubles(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    bad = int((~features.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {features.numel()} features are not finite")
    return features.double()
