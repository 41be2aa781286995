"""Best squares of four points beside numpy's and scipy's least squares, and the limits."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from relloc.errors import UsageError
from relloc.studies.constellations import patch_boxes
from relloc.studies.square_fit import CORNERS, Verification, fit_squares

SQUARE = [(0, 0), (10, 0), (0, 10), (10, 10)]
LAYOUTS = {
    "square": SQUARE,
    "enlarged": [(5, 5), (45, 5), (5, 45), (45, 45)],
    "mirrored": [(10, 0), (0, 0), (10, 10), (0, 10)],
    "turned by half": [(10, 10), (0, 10), (10, 0), (0, 0)],
    "collapsed": [(3, 4)] * 4,
    "two moved": [(2, 1), (10, 0), (0, 16), (10, 10)],
    "anywhere": [(91, 3), (17, 55), (40, 2), (8, 80)],
}
LIMITS = {"least_side": 2 / 3, "most_side": 4 / 3, "most_error": 1.0}


def fit(points):
    found = fit_squares(torch.tensor(points, dtype=torch.float64))
    return float(found.sides), float(found.squared_errors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fit_is_the_linear_least_squares_solution(name):
    points = np.array(LAYOUTS[name], dtype=np.float64)
    # x or y of a corner = the middle's, and half the side with the corner's sign
    rows = []
    for x_sign, y_sign in CORNERS:
        rows += [(1, 0, x_sign / 2), (0, 1, y_sign / 2)]
    solution, _, _, _ = np.linalg.lstsq(np.array(rows), points.ravel(), rcond=None)
    residual = points.ravel() - np.array(rows) @ solution
    side, squared_error = fit(LAYOUTS[name])
    assert side == pytest.approx(solution[2], abs=1e-12)
    assert squared_error == pytest.approx(residual @ residual, abs=1e-9)


def test_hand_computed_fits():
    assert fit(LAYOUTS["square"]) == (10, 0)
    assert fit(LAYOUTS["enlarged"]) == (40, 0)
    assert fit(LAYOUTS["turned by half"]) == (-10, 0)
    # Left and right say -10, above and below 10.
    assert fit(LAYOUTS["mirrored"]) == (0, 4 * (5**2 + 5**2))
    assert fit(LAYOUTS["collapsed"]) == (0, 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_constrained_fit_is_that_of_a_bounded_minimizer(name):
    points = np.array(LAYOUTS[name], dtype=np.float64)
    signs = np.array(CORNERS, dtype=np.float64)

    def squared_error(x):
        corners = x[:2] + x[2] * signs / 2
        return float(((points - corners) ** 2).sum())

    bounds = [(None, None), (None, None), (8, 16)]
    best = minimize(squared_error, x0=[0, 0, 10], bounds=bounds)
    found = fit_squares(torch.tensor(points), least=torch.tensor(8.0), most=torch.tensor(16.0))
    assert float(found.sides) == pytest.approx(best.x[2], abs=1e-4)
    assert float(found.squared_errors) == pytest.approx(best.fun, rel=1e-5, abs=1e-6)


def boxes_at(centers, side=12.0):
    centers = torch.tensor(centers, dtype=torch.float64)
    return torch.cat([centers - side / 2, centers + side / 2], dim=1)


def is_verified(centers, side=12.0, side_limits="reject", **changes):
    verification = Verification(side_limits=side_limits, **{**LIMITS, **changes})
    return bool(verification.verified(boxes_at(centers, side)))


@pytest.mark.parametrize("side_limits", ["reject", "constrain"])
def test_adjacent_patches_are_verified_and_other_layouts_not(side_limits):
    squares = np.array([[7, 3, 12], [0, 0, 64]])
    verification = Verification(side_limits=side_limits, **LIMITS)
    assert verification.verified(torch.from_numpy(patch_boxes(squares))).all()
    for name in ("mirrored", "turned by half", "collapsed", "anywhere"):
        assert not is_verified(LAYOUTS[name], side_limits=side_limits), name


def test_limits_of_the_side():
    # Patches of 12 px: squares of 8 to 16 px
    for side, expected in ((7.99, False), (8, True), (12, True), (16, True), (16.01, False)):
        centers = [(0, 0), (side, 0), (0, side), (side, side)]
        assert is_verified(centers) == expected, side
        # A square that is only a little outside is not far from the nearest one within.
        assert is_verified(centers, side_limits="constrain"), side
    # The mean side counts where the sides of patches differ.
    boxes = boxes_at([(0, 0), (8, 0), (0, 8), (8, 8)])
    larger = boxes.clone()
    larger[0] += torch.tensor([-1, -1, 1, 1])
    verification = Verification(side_limits="reject", **LIMITS)
    assert verification.verified(boxes)
    assert not verification.verified(larger)


def test_limit_of_the_error():
    # Two opposite corners moved apart by the same vector, which is at right angles to the
    # diagonal of the square: the middle and the side stay, and the error is 2 |moved|^2.
    def centers(moved):
        return [(moved, -moved), (12, 0), (0, 12), (12 - moved, 12 + moved)]

    border = 12 / 2  # 4 * 6^2 = 12^2
    assert fit(centers(border)) == pytest.approx((12, 144))
    assert is_verified(centers(border - 0.01))
    assert not is_verified(centers(border))
    assert not is_verified(centers(border + 0.01))
    assert is_verified(centers(border), most_error=1.01)
    # A constrained side of two thirds makes the error of collapsed patches 2 squared sides.
    assert not is_verified(LAYOUTS["collapsed"], side_limits="constrain", most_error=2.0)
    assert is_verified(LAYOUTS["collapsed"], side_limits="constrain", most_error=2.01)


def test_many_sets_at_once_are_verified_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 50, 4, 4, generator=generator) * 4 + torch.tensor([0, 0, 20, 20])
    boxes += 15 * torch.tensor(CORNERS).repeat(1, 2) * torch.rand(3, 50, 1, 1, generator=generator)
    verification = Verification(side_limits="reject", **LIMITS)
    together = verification.verified(boxes)
    assert 0 < together.sum() < together.numel()
    for row in range(3):
        for column in range(50):
            assert together[row, column] == verification.verified(boxes[row, column])


@pytest.mark.parametrize(
    ("name", "value"),
    [("least_side", -1), ("most_side", 0.5), ("most_error", 0), ("side_limits", "clamp")],
)
def test_bad_settings_are_named(name, value):
    settings = {**LIMITS, "side_limits": "reject", name: value}
    with pytest.raises(UsageError, match=rf"verification\.{name} is {value}"):
        Verification(**settings)
