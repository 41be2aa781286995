"""Ridge regression by sums over samples, so that no sample has to be kept in memory."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Penalties that are tried, in parts of the number of samples, for features of deviation 1.
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))
# Features that vary less, in parts of their root mean square, count as constant: rounding is left.
_LEAST_VARIATION = 1e-6


class RidgeSums:
    """The sums over samples from which ridge regressions of every penalty follow, in float64.

    Args:
        features: the number of features d.
        targets: the number of targets t.
        device: where the sums are.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Float64[Tensor, "..."]:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n = 0
        self.x = zeros(features)
        self.y = zeros(targets)
        self.xx = zeros(features, features)
        self.xy = zeros(features, targets)
        self.yy = zeros(targets)

    def add(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n t"]) -> None:
        """Adds samples with features `x` and targets `y`."""
        x = x.double()
        y = y.double()
        self.n += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(dim=0)

    def together_with(self, other: "RidgeSums") -> "RidgeSums":
        """Returns the sums over the samples of both."""
        both = RidgeSums(len(self.x), len(self.y), self.x.device)
        both.n = self.n + other.n
        for name in ("x", "y", "xx", "xy", "yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge:
    """A linear function of features; `penalty` is the one it was fitted with."""

    weights: Float64[Tensor, "d t"]
    bias: Float64[Tensor, "t"]
    penalty: float

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n t"]:
        """Returns the predicted targets, in float32."""
        return (x.double() @ self.weights + self.bias).float()


def fit(sums: RidgeSums, penalty: float) -> Ridge:
    """Returns the ridge regression with an intercept, which is not penalized.

    Features are scaled to deviation 1 first, so that one penalty suits all of them. It is
    multiplied by the number of samples: `penalty * n` is scikit-learn's `alpha`. Features that are
    constant get no weight.
    """
    n = sums.n
    mean_x = sums.x / n
    mean_y = sums.y / n
    covariance = sums.xx / n - mean_x.outer(mean_x)
    with_targets = sums.xy / n - mean_x.outer(mean_y)
    mean_square = sums.xx.diagonal() / n
    variance = covariance.diagonal().clamp(min=0)
    varies = variance > _LEAST_VARIATION**2 * mean_square
    # Constant features are multiplied by 0.
    scale = torch.where(varies, variance.rsqrt(), 0.0)
    scaled = covariance * scale.outer(scale)
    scaled.diagonal().add_(penalty)
    scaled_weights = torch.linalg.solve(scaled, with_targets * scale.unsqueeze(1))
    weights = scaled_weights * scale.unsqueeze(1)
    bias = mean_y - mean_x @ weights
    return Ridge(weights=weights, bias=bias, penalty=penalty)


def mean_squared_error(ridge: Ridge, sums: RidgeSums) -> float:
    """Returns the squared error of a regression, added over targets, a sample of `sums`."""
    weights = ridge.weights
    bias = ridge.bias
    # The square of (x w + b - y), written out and summed over samples
    of_predictions = (weights * (sums.xx @ weights)).sum(dim=0)
    of_predictions += 2 * bias * (sums.x @ weights) + sums.n * bias.square()
    crossed = (weights * sums.xy).sum(dim=0) + bias * sums.y
    squared = of_predictions - 2 * crossed + sums.yy
    return float(squared.sum()) / sums.n


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenRidge:
    """A regression, and its squared error a sample on the part that its penalty was chosen on."""

    ridge: Ridge
    error_when_chosen: float


def fit_best(
    fitted: RidgeSums, held_back: RidgeSums, penalties: Sequence[float] = PENALTIES
) -> ChosenRidge:
    """Chooses the penalty on samples held back, and then fits with all samples together."""
    errors = {}
    for penalty in penalties:
        errors[penalty] = mean_squared_error(fit(fitted, penalty), held_back)
    best = min(errors, key=errors.__getitem__)
    ridge = fit(fitted.together_with(held_back), best)
    return ChosenRidge(ridge=ridge, error_when_chosen=errors[best])
