"""Linear SVMs with squared hinge loss, exactly, from inner products alone, many at once.

For examples x_i (an appended 1 is the intercept) with signs y_i and weights c_i, a problem is

    minimize over w:  |w|^2 / 2 + sum_i c_i max(0, 1 - y_i <w, x_i>)^2

as LIBLINEAR's L2-regularized L2-loss SVM (Fan et al., JMLR 2008) has it, c_i being the cost times
the weight of the class. Its solution is w = sum_i b_i x_i with b_i = 2 c_i y_i max(0, 1 - y_i f_i)
at the decision values f = K b, K the Gram matrix: b is zero outside the support, and on it solves
(K + diag(1 / 2c)) b = y. So the support is guessed, the system solved, the support read off the
solution again until it stays: Newton's method on the support, finite and a few steps long. Systems
are solved by conjugate gradients for all problems at once, so that the work is products of one
Gram matrix with many columns; the leading eigenvectors of K precondition them where costs are high.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from relloc.errors import UsageError

_GAP = 1e-12  # relative distance to the optimum; at 1e-9 images that nearly tie change places in average precision
_MOST_STEPS = 200
_FULL_STEPS = 25  # steps without a line search; supports that have not settled by then get one
_MOST_ITERATIONS = 2000
_RESIDUAL = 1e-5
_BENEFIT = 30  # 2 c times the second eigenvalue from which preconditioning pays
_RANK = 192

# For each of g Gram matrices a number for each of its n examples in each of m problems; and leading eigenvectors
PerExample = Float[Tensor, "g n m"]
Factor = Float[Tensor, "g n r"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """`coefficients` of the examples, and the decision values K b of all n of them."""

    coefficients: PerExample
    decisions: PerExample


def leading_factor(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n r"]:
    """Z with Z Z^T near `gram`: its leading eigenvectors, for `fit` on it or on any of its rows and columns."""
    rank = min(_RANK, len(gram))
    # svd_lowrank draws from torch's global generator; what it draws only decides how fast systems are solved.
    devices = [gram.device] if gram.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        vectors, values, _ = torch.svd_lowrank(gram, q=rank, niter=3)
    return vectors * values.clamp(min=0).sqrt()


def fit(
    gram: Float[Tensor, "g n n"],
    signs: PerExample,
    weights: PerExample,
    *,
    factor: Factor,
    start: PerExample | None = None,
) -> Fitted:
    """The m problems on each of g Gram matrices, to a relative 1e-9 of their objectives, proven by the gradient.

    `signs` are 1 or -1, `weights` 0 or more; an example of weight 0 is not part of a problem. `start`
    are coefficients to begin at, such as those of a lower cost. All in float64.

    Raises:
        UsageError: what is given is not finite, or a problem is not solved after 200 steps.
    """
    b = torch.zeros_like(signs) if start is None else start.clone()
    for given in (gram, weights, b):
        if not given.isfinite().all():
            raise UsageError("SVMs of features, costs or coefficients that are not finite have no solution")
    f = gram @ b
    live = torch.ones(signs.shape[-1], dtype=torch.bool, device=gram.device)
    for step in range(_MOST_STEPS):
        y, c, b_live, f_live = (values[..., live] for values in (signs, weights, b, f))
        # At the optimum the coefficients are those that the decision values ask for.
        slack = (1 - y * f_live).clamp(min=0)
        residual = b_live - 2 * c * y * slack
        pulled = gram @ residual
        squared_gradient = (residual * pulled).sum(dim=1, keepdim=True)
        objective = (b_live * f_live / 2 + c * slack.square()).sum(dim=1, keepdim=True)
        solved = squared_gradient <= 2 * _GAP * objective  # half of the left side bounds what is still to be gained
        open_ = ~solved.all(dim=0).squeeze(0)
        if not open_.any():
            return Fitted(coefficients=b, decisions=f)
        live[live.clone()] = open_
        y, c, b_live, f_live, slack, residual, pulled = (
            values[..., open_] for values in (y, c, b_live, f_live, slack, residual, pulled)
        )
        # Newton's step, to the solution on the present support, and what it does to the decision values.
        scale = (2 * c * (slack > 0)).sqrt()  # sqrt(2 c) where an example pulls, 0 elsewhere
        u, image = _solve(gram, scale, scale * pulled, factor)
        moved, f_moved = scale * u - residual, image - pulled
        if step >= _FULL_STEPS:
            moved = moved * _best_length(y, c, b_live, f_live, moved, f_moved)
        b[..., live] = b_live + moved
        f[..., live] = gram @ b[..., live]
    left = int(live.sum())
    raise UsageError(f"{left} SVMs are not solved after {_MOST_STEPS} steps: their features are badly scaled")


def _solve(
    gram: Float[Tensor, "g n n"],
    scale: PerExample,
    right: PerExample,
    factor: Factor,
) -> tuple[PerExample, PerExample]:
    """u with (1 + S K S) u = right for S = diag(scale), and K S u, by preconditioned conjugate gradients."""
    precondition = _preconditioner(scale, factor)
    u, image, rest = torch.zeros_like(right), torch.zeros_like(right), right
    close = precondition(rest)
    direction, size = close, (rest * close).sum(dim=1, keepdim=True)
    goal = _RESIDUAL**2 * size
    for _ in range(_MOST_ITERATIONS):
        pulled = gram @ (scale * direction)
        product = direction + scale * pulled
        length = torch.where(size > goal, size / (direction * product).sum(dim=1, keepdim=True), 0)
        u, image, rest = u + length * direction, image + length * pulled, rest - length * product
        close = precondition(rest)
        smaller = (rest * close).sum(dim=1, keepdim=True)
        if not (smaller > goal).any():
            break
        direction, size = close + torch.where(size > 0, smaller / size, 0) * direction, smaller
    return u, image


def _preconditioner(scale: PerExample, factor: Factor) -> Callable[[PerExample], PerExample]:
    """The inverse of 1 + S Z Z^T S (Woodbury): near that of 1 + S K S, whose few large eigenvalues are in Z.

    Problems of low cost are left as they are: their systems are near the identity.
    """
    second = factor[..., 1:2].square().sum(dim=1).max() if factor.shape[-1] > 1 else 0
    costly = scale.square().amax(dim=(0, 1)) * second >= _BENEFIT
    if not costly.any():
        return lambda v: v
    chosen = scale[..., costly]
    inner = torch.stack([(factor * one).mT @ (factor * one) for one in chosen.unsqueeze(-1).unbind(dim=2)], dim=1)
    inner.diagonal(dim1=-2, dim2=-1).add_(1)
    triangle = torch.linalg.cholesky(inner)  # (g m r r)

    def apply(v: PerExample) -> PerExample:
        short = (factor.mT @ (chosen * v[..., costly])).mT.unsqueeze(-1)
        solved = torch.cholesky_solve(short, triangle).squeeze(-1).mT
        moved = v.clone()
        moved[..., costly] -= chosen * (factor @ solved)
        return moved

    return apply


def _best_length(
    y: PerExample, c: PerExample, b: PerExample, f: PerExample, moved: PerExample, f_moved: PerExample
) -> Float[Tensor, "g 1 m"]:
    """The step length of least objective: the zero of a derivative that rises in straight pieces, by bisection."""
    linear, curve = ((one * f_moved).sum(dim=1, keepdim=True) for one in (b, moved))
    low, high = torch.zeros_like(curve), torch.full_like(curve, 2.0)
    for _ in range(60):
        middle = (low + high) / 2
        pull = 2 * c * y * (1 - y * (f + middle * f_moved)).clamp(min=0)
        rising = linear + middle * curve - (pull * f_moved).sum(dim=1, keepdim=True) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return low
