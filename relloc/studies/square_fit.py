"""Geometric verification: whether four matched patches lie as four adjacent patches do.

Corners are in the order of `CORNERS` everywhere: upper left, upper right, lower left, lower right.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Float64, Num
from torch import Tensor

from relloc import checks

SIDE_LIMITS = ("reject", "constrain")
# Where the four patches lie around the middle of a constellation, as signs of x and y.
CORNERS = ((-1, -1), (1, -1), (-1, 1), (1, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareFit:
    """The upright squares that fit sets of four points best, in the unit of the points.

    `sides` are negative for points in reversed order. `squared_errors` are sums over the four
    corners of squared distances to the points.
    """

    sides: Float64[Tensor, "*n"]
    squared_errors: Float64[Tensor, "*n"]


def fit_squares(
    points: Float[Tensor, "*n 4 2"],
    *,
    least: Float[Tensor, "*n"] | None = None,
    most: Float[Tensor, "*n"] | None = None,
) -> SquareFit:
    """Returns the least-squares square of each set of four points, x and y, in closed form.

    A square with its middle at m and side s has the corners m + s c / 2, where c are the signs of
    `CORNERS`. The sum of squared distances to the points p is least for m = mean(p) and
    s = sum(p . c) / 4. As it is a parabola in s, the best side between `least` and `most`, where
    they are given, is the one of them that is nearest to this s.
    """
    signs = torch.tensor(CORNERS, dtype=torch.float64, device=points.device)
    centered = points.double() - points.double().mean(dim=-2, keepdim=True)
    sides = (centered * signs).sum(dim=(-2, -1)) / 4
    if least is not None:
        sides = torch.maximum(sides, least.double())
    if most is not None:
        sides = torch.minimum(sides, most.double())
    corners = sides[..., None, None] * signs / 2
    squared_errors = (centered - corners).square().sum(dim=(-2, -1))
    return SquareFit(sides=sides, squared_errors=squared_errors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """When four matched patches are geometrically verified (docs/protocols.md 3.12).

    Attributes:
        least_side, most_side: of the best square, in units of the mean side of the four patches.
        most_error: the sum of squared distances of the corners of the square to the patches'
            centers, over the squared side of the square. Verified is what lies below it.
        side_limits: "reject": a best square whose side is outside these limits is not verified.
            "constrain": the best square of those within the limits is taken.

    Raises:
        UsageError: one of these is wrong.
    """

    least_side: float
    most_side: float
    most_error: float
    side_limits: str

    def __post_init__(self) -> None:
        setting = "study.discovery.verification"
        checks.number(f"{setting}.least_side", self.least_side, at_least=0)
        checks.number(f"{setting}.most_side", self.most_side, at_least=self.least_side)
        checks.number(f"{setting}.most_error", self.most_error, above=0)
        checks.one_of(f"{setting}.side_limits", self.side_limits, SIDE_LIMITS)

    def verified(self, boxes: Num[Tensor, "*n 4 4"]) -> Bool[Tensor, "*n"]:
        """Returns which sets of four patches are verified, given their x1 y1 x2 y2 in pixels."""
        boxes = boxes.double()
        starts = boxes[..., :2]
        ends = boxes[..., 2:]
        patch_sides = (ends - starts).mean(dim=(-2, -1))
        least = self.least_side * patch_sides
        most = self.most_side * patch_sides
        centers = (starts + ends) / 2
        if self.side_limits == "constrain":
            fit = fit_squares(centers, least=least, most=most)
        else:
            fit = fit_squares(centers)
        # Limits are part of what is allowed, in spite of rounding: two thirds of 96 px are 64 px.
        tolerance = 1e-9 * patch_sides
        is_within = (fit.sides >= least - tolerance) & (fit.sides <= most + tolerance)
        # Written without a division, since the side may be 0.
        has_small_error = fit.squared_errors < self.most_error * fit.sides.square()
        return is_within & has_small_error
