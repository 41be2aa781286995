"""Solves many linear SVMs with squared hinge loss exactly, from inner products alone.

For examples x_i (an appended 1 is the intercept) with signs y_i and weights c_i, a problem is

    minimize over w:  |w|^2 / 2 + sum_i c_i max(0, 1 - y_i <w, x_i>)^2

as LIBLINEAR's L2-regularized L2-loss SVM (Fan et al., JMLR 2008) has it; c_i is the cost times the
weight of the class. The solution is w = sum_i b_i x_i with coefficients b_i = 2 c_i y_i max(0, 1 -
y_i f_i), where f = K b are the decision values and K the Gram matrix. So b is zero outside the
support (the examples with y_i f_i < 1), and on the support it solves (K + diag(1 / 2c)) b = y.

That suggests Newton's method: guess the support, solve the linear system, read the support off the
solution, and repeat until it stays the same. This ends after finitely many steps, in practice a
few. The systems of all problems are solved together by conjugate gradients, so that the work is
products of one Gram matrix with many columns. Where costs are high, systems are ill-conditioned,
and the leading eigenvectors of K precondition them.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relloc.errors import UsageError

# Relative distance to the optimum at which a problem is solved. At 1e-9, images with nearly equal
# decision values swap ranks, which changes average precision.
_GAP = 1e-12
_MOST_STEPS = 200
# Newton steps of full length. The few problems whose support still changes after them may be
# cycling; a line search from there on makes each step lower the objective.
_FULL_STEPS = 25
_MOST_ITERATIONS = 2000  # of conjugate gradients in one Newton step
_RESIDUAL = 1e-5  # relative residual at which conjugate gradients stop
# Preconditioning pays from here on: 2 c times the second eigenvalue of K, which is about the
# condition number that is left after conjugate gradients have dealt with the first one.
_BENEFIT = 30
_RANK = 192  # number of eigenvectors in the preconditioner
_BISECTIONS = 60  # halve an interval of 2 to below the spacing of float64

# A number for each of n examples in each of m problems, on each of g Gram matrices.
PerExample = Float[Tensor, "g n m"]
PerProblem = Float[Tensor, "g 1 m"]
Factor = Float[Tensor, "g n r"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The solutions of `fit`: the `coefficients` b of the examples and their `decisions` K b."""

    coefficients: PerExample
    decisions: PerExample


def leading_factor(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n r"]:
    """Returns Z such that Z Z^T approximates `gram` by its 192 leading eigenvectors (r = 192 or n).

    `fit` preconditions with it. The rows of Z for some examples serve the Gram matrix of these.
    """
    rank = min(_RANK, len(gram))
    # svd_lowrank draws from torch's global generator, whose state is put back afterwards. The
    # accuracy of Z only decides how fast systems are solved.
    devices = [gram.device] if gram.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        vectors, values, _ = torch.svd_lowrank(gram, q=rank, niter=3)
    # Rounding can make the smallest eigenvalues of a positive semidefinite matrix negative.
    return vectors * values.clamp(min=0).sqrt()


def fit(
    gram: Float[Tensor, "g n n"],
    signs: PerExample,
    weights: PerExample,
    *,
    factor: Factor,
    start: PerExample | None = None,
) -> Fitted:
    """Solves the m problems on each of g Gram matrices; all tensors are float64.

    Objectives are within a relative 1e-12 of the optimum, which the gradient proves.

    Args:
        gram: inner products of the examples, with the intercept's 1 included.
        signs: 1 for positive and -1 for negative examples.
        weights: c_i, 0 or more; an example of weight 0 is not part of a problem.
        factor: from `leading_factor`.
        start: coefficients to begin at, such as those of a lower cost; zeros by default.

    Raises:
        UsageError: an input is not finite, or a problem is not solved after 200 steps.
    """
    b = torch.zeros_like(signs) if start is None else start.clone()
    # One nan would spread to every problem in the first product.
    for given in (gram, weights, b):
        if not given.isfinite().all():
            raise UsageError(
                "SVMs of features, costs or coefficients that are not finite have no solution"
            )
    f = gram @ b
    n_problems = signs.shape[-1]
    unsolved = torch.ones(n_problems, dtype=torch.bool, device=gram.device)
    for step in range(_MOST_STEPS):
        state = _state_of(gram, signs, weights, b, f, unsolved)

        # Problems that are solved on every Gram matrix take no further part.
        still_open = ~state.solved().all(dim=0).squeeze(0)
        if not still_open.any():
            return Fitted(coefficients=b, decisions=f)
        unsolved[unsolved.clone()] = still_open
        state = state.select(still_open)

        # Newton's step: to the solution on the present support. As sqrt(2 c) is 0 outside of it,
        # scaling by it makes the system symmetric and leaves the support alone at once.
        on_support = state.slack > 0
        scale = (2 * state.weights * on_support).sqrt()
        u, gram_scaled_u = _solve(gram, scale, scale * state.pulled, factor)
        b_step = scale * u - state.residual
        f_step = gram_scaled_u - state.pulled
        if step >= _FULL_STEPS:
            length = _best_length(state, b_step, f_step)
            b_step = b_step * length
        b[..., unsolved] = state.b + b_step
        # Multiplied anew, so that rounding does not add up over the steps.
        f[..., unsolved] = gram @ b[..., unsolved]
    n_left = int(unsolved.sum())
    raise UsageError(
        f"{n_left} SVMs are not solved after {_MOST_STEPS} steps of Newton's method: the features "
        "are badly scaled. Check that the network has not diverged, and leave out the highest costs"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """Where Newton's method is in some of the problems, in the module's symbols."""

    signs: PerExample  # y
    weights: PerExample  # c
    b: PerExample  # coefficients
    f: PerExample  # decision values K b
    slack: PerExample  # max(0, 1 - y f), by how much an example misses its margin
    residual: PerExample  # b - 2 c y slack, zero at the optimum
    pulled: PerExample  # K residual: the gradient by w, as products with the examples

    def select(self, problems: Bool[Tensor, "m"]) -> "_State":
        """Returns the state of some of the problems."""
        selected = {}
        for name, values in vars(self).items():
            selected[name] = values[..., problems]
        return _State(**selected)

    def solved(self) -> Bool[Tensor, "g 1 m"]:
        """Returns which problems are solved.

        The gradient by w is sum_i residual_i x_i, with the squared length residual^T K residual.
        The objective is 1-strongly convex in w, so half of that bounds what is still to be gained.
        """
        squared_gradient = self.residual * self.pulled
        squared_gradient = squared_gradient.sum(dim=1, keepdim=True)
        regularizer = self.b * self.f / 2
        loss = self.weights * self.slack.square()
        objective = (regularizer + loss).sum(dim=1, keepdim=True)
        return squared_gradient <= 2 * _GAP * objective


def _state_of(
    gram: Float[Tensor, "g n n"],
    signs: PerExample,
    weights: PerExample,
    b: PerExample,
    f: PerExample,
    problems: Bool[Tensor, "m"],
) -> _State:
    """Returns the state of some of the problems at the coefficients b and decision values f."""
    y = signs[..., problems]
    c = weights[..., problems]
    b = b[..., problems]
    f = f[..., problems]
    slack = (1 - y * f).clamp(min=0)
    # At the optimum the coefficients are those that the decision values ask for.
    residual = b - 2 * c * y * slack
    return _State(
        signs=y,
        weights=c,
        b=b,
        f=f,
        slack=slack,
        residual=residual,
        pulled=gram @ residual,
    )


def _solve(
    gram: Float[Tensor, "g n n"],
    scale: PerExample,
    right: PerExample,
    factor: Factor,
) -> tuple[PerExample, PerExample]:
    """Solves (1 + S K S) u = right for S = diag(scale), and returns u and K S u.

    The method is preconditioned conjugate gradients (Saad, Iterative Methods, algorithm 9.1), for
    all problems at once; the names in brackets are those of the book.
    """
    precondition = _preconditioner(scale, factor)
    u = torch.zeros_like(right)
    gram_scaled_u = torch.zeros_like(right)
    residual = right  # [r]
    preconditioned = precondition(residual)  # [z]
    direction = preconditioned  # [p]
    # The squared residual in the norm of the preconditioner, which decides when to stop.
    size = (residual * preconditioned).sum(dim=1, keepdim=True)  # [(r, z)]
    goal = _RESIDUAL**2 * size
    for _ in range(_MOST_ITERATIONS):
        gram_direction = gram @ (scale * direction)
        product = direction + scale * gram_direction  # [A p]
        curvature = direction * product
        curvature = curvature.sum(dim=1, keepdim=True)
        # Problems that have reached the goal stand still, which also avoids dividing 0 by 0.
        length = torch.where(size > goal, size / curvature, 0)  # [alpha]

        u = u + length * direction
        gram_scaled_u = gram_scaled_u + length * gram_direction
        residual = residual - length * product

        preconditioned = precondition(residual)
        next_size = residual * preconditioned
        next_size = next_size.sum(dim=1, keepdim=True)
        if not (next_size > goal).any():
            break
        ratio = torch.where(size > 0, next_size / size, 0)  # [beta]
        direction = preconditioned + ratio * direction
        size = next_size
    return u, gram_scaled_u


def _preconditioner(scale: PerExample, factor: Factor) -> Callable[[PerExample], PerExample]:
    """Returns a function that multiplies with the inverse of 1 + S Z Z^T S, with Z the `factor`.

    That matrix is close to 1 + S K S, whose few large eigenvalues Z holds, and by Woodbury's
    identity its inverse is 1 - S Z (1 + Z^T S^2 Z)^-1 Z^T S, which costs little as Z is narrow.
    Problems of low cost are left as they are, since their systems are near the identity.
    """
    second_eigenvalue = 0
    if factor.shape[-1] > 1:
        # Columns of Z are eigenvectors times the root of their eigenvalue.
        second_column = factor[..., 1:2]
        second_eigenvalue = second_column.square().sum(dim=1).max()
    highest = scale.square().amax(dim=(0, 1))
    costly = highest * second_eigenvalue >= _BENEFIT
    if not costly.any():
        return lambda v: v

    # The small matrix of each costly problem, one at a time, as S Z of all would take m times the
    # memory of Z.
    costly_scale = scale[..., costly]
    inner = []
    scales = costly_scale.unsqueeze(-1).unbind(dim=2)
    for scale_of_one in scales:
        scaled_factor = factor * scale_of_one
        inner.append(scaled_factor.mT @ scaled_factor)
    inner = torch.stack(inner, dim=1)
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(1)
    triangle = torch.linalg.cholesky(inner)  # (g m r r)

    def apply(v: PerExample) -> PerExample:
        scaled = costly_scale * v[..., costly]
        projected = factor.mT @ scaled  # (g r m)
        right = projected.mT.unsqueeze(-1)  # (g m r 1)
        solved = torch.cholesky_solve(right, triangle)
        solved = solved.squeeze(-1).mT  # (g r m)
        result = v.clone()
        result[..., costly] -= costly_scale * (factor @ solved)
        return result

    return apply


def _best_length(
    state: _State,
    b_step: PerExample,
    f_step: PerExample,
) -> PerProblem:
    """Returns the step length, from 0 to 2, at which the objective is least.

    Along a step the objective's derivative rises in straight pieces; bisection finds its zero.
    """
    linear = (state.b * f_step).sum(dim=1, keepdim=True)
    curvature = (b_step * f_step).sum(dim=1, keepdim=True)
    low = torch.zeros_like(curvature)
    high = torch.full_like(curvature, 2.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        f_middle = state.f + middle * f_step
        slack = (1 - state.signs * f_middle).clamp(min=0)
        loss_gradient = 2 * state.weights * state.signs * slack
        loss_slope = loss_gradient * f_step
        loss_slope = loss_slope.sum(dim=1, keepdim=True)
        derivative = linear + middle * curvature - loss_slope
        is_rising = derivative > 0
        low = torch.where(is_rising, low, middle)
        high = torch.where(is_rising, middle, high)
    return low
