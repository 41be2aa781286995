"""Permutation tests of the effects of gap and jitter on a measure, beside the scatter of seeds.

All take a series with the value of each training, indexed by its gap, its jitter and more.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from load import Frame

DEALS = 9999
# Of equal statistics, rounding makes some a little smaller
_ROUNDING = 1e-9
# A residual sum of squares below this share of all is rounding: the trainings are all equal
_NOTHING = 1e-12


def p_of_effect(values: Frame, name: str) -> float:
    """Returns p of the effect of `name`, "gap" or "jitter", by permutation within the other.

    The values of `name` are dealt anew among trainings of one value of the other; the statistic is
    the spread of its means. Without an effect trainings of one value of the other are exchangeable,
    whatever their scatter.

    It is nan where there is one value, or one training a point and no other.
    """
    within = "jitter" if name == "gap" else "gap"
    frame = values.rename("value").reset_index()
    n_levels = frame[name].nunique()
    if n_levels < 2 or len(frame) == _n_points(frame):
        return np.nan
    levels = pd.factorize(frame[name])[0]
    strata = [np.flatnonzero(frame[within] == one) for one in frame[within].unique()]
    sizes = np.bincount(levels)

    def spread(dealt: Int[np.ndarray, "deals n"]) -> Float[np.ndarray, "deals"]:
        """Returns the spread of the means of levels, for each row of dealt levels."""
        is_level = dealt[:, None, :] == np.arange(n_levels)[:, None]
        means = (is_level * frame["value"].to_numpy()).sum(axis=2) / sizes
        return (sizes * (means - frame["value"].mean()) ** 2).sum(axis=1)

    random = np.random.default_rng(0)
    dealt = np.tile(levels, (DEALS, 1))
    for stratum in strata:
        dealt[:, stratum] = random.permuted(dealt[:, stratum], axis=1)
    return _p(spread(levels[None])[0], spread(dealt))


def p_of_interaction(values: Frame) -> float:
    """Returns p of the interaction of gap and jitter, by permutation of residuals.

    The residuals of the sum of an effect of the gap and one of the jitter, fitted by least squares,
    are dealt anew among all trainings (Freedman and Lane, Journal of Business & Economic
    Statistics 1, 1983). The statistic is that of the F test: the spread of points beyond such a
    sum, relative to the scatter of trainings of one point. Without an interaction, and if trainings
    scatter alike at all points, their deviations from the sum are exchangeable; those from the
    fitted sum are so approximately.

    It is nan where no point is off a sum by construction, as with one gap or one jitter, or where
    no two trainings of a point differ.
    """
    frame = values.rename("value").reset_index()
    onto_sum = _projection(frame, [["gap"], ["jitter"]])
    onto_points = _projection(frame, [["gap", "jitter"]])
    beyond_sum = onto_points - onto_sum
    n = len(frame)
    if np.trace(beyond_sum) < 0.5 or n == _n_points(frame):
        return np.nan
    value = frame["value"].to_numpy(float)
    value = value - value.mean()
    within_points = np.eye(n) - onto_points
    scatter = ((within_points @ value) ** 2).sum()
    if scatter <= _NOTHING * (value**2).sum():
        return np.nan

    def statistic(rows: Float[np.ndarray, "deals n"]) -> Float[np.ndarray, "deals"]:
        """Returns the ratio of the F test, but for its degrees of freedom, for each row."""
        # Projections are symmetric; what was fitted adds nothing beyond the sum.
        interaction = ((rows @ beyond_sum) ** 2).sum(axis=1)
        return interaction / ((rows @ within_points) ** 2).sum(axis=1)

    residuals = value - onto_sum @ value
    dealt = np.random.default_rng(0).permuted(np.tile(residuals, (DEALS, 1)), axis=1)
    return _p(statistic(residuals[None])[0], statistic(dealt))


def _n_points(frame: Frame) -> int:
    return len(frame[["gap", "jitter"]].drop_duplicates())


def _projection(frame: Frame, terms: list[list[str]]) -> Float[np.ndarray, "n n"]:
    """Returns the least-squares projection onto sums of a number for each level of each term."""
    columns = []
    for fields in terms:
        levels = frame.groupby(fields, sort=False).ngroup().to_numpy()
        columns.append(levels[:, None] == np.arange(levels.max() + 1))
    design = np.concatenate(columns, axis=1).astype(float)
    return design @ np.linalg.pinv(design)


def _p(measured: float, of_deals: Float[np.ndarray, "deals"]) -> float:
    """Returns the share of deals that reach the measured statistic, which itself counts as one."""
    reached = of_deals >= measured * (1 - _ROUNDING)
    return float((reached.sum() + 1) / (len(of_deals) + 1))
