"""Computes average precision, by two definitions, for many rankings of the same images at once.

Images with equal scores form one threshold, so that no result depends on the order of images.
`counted` leaves images out of a ranking, such as the difficult ones of PASCAL VOC.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# A value for each of n images in each of m rankings.
Scores = Float[Tensor, "n m"]
Mask = Bool[Tensor, "n m"]


def ap_area(
    scores: Scores,
    positive: Mask,
    counted: Mask,
) -> Float[Tensor, "m"]:
    """Returns the area under the precision-recall curve, after precision is made monotone.

    It is PASCAL VOC's definition since 2010 (protocols.md 3.1). Values are from 0 to 1, and nan for
    a ranking without a positive image.
    """
    precision, relevant, ends_threshold = _precision_by_rank(scores, positive, counted)
    # Only at the end of a threshold is precision defined, as its images have no order.
    at_thresholds = torch.where(ends_threshold, precision, 0.0)
    # Monotone: the precision at a recall is the best at this or any higher recall.
    best_later = _from_the_end(at_thresholds).cummax(dim=0).values
    best_later = _from_the_end(best_later)
    # Recall rises at each positive image by one over their number.
    area = (relevant * best_later).sum(dim=0)
    n_positive = relevant.sum(dim=0)
    return area / n_positive


def ap_steps(
    scores: Scores,
    positive: Mask,
    counted: Mask,
) -> Float[Tensor, "m"]:
    """Returns the mean of the precision at each positive image.

    It is the definition of scikit-learn's `average_precision_score`. Values are from 0 to 1, and
    nan for a ranking without a positive image.
    """
    precision, relevant, ends_threshold = _precision_by_rank(scores, positive, counted)
    # For each rank, the rank at which its threshold ends: the nearest end at or after it.
    n = len(ends_threshold)
    indices = torch.arange(n, device=ends_threshold.device).unsqueeze(1)
    ends = torch.where(ends_threshold, indices, n - 1)
    ends = _from_the_end(ends).cummin(dim=0).values
    ends = _from_the_end(ends)
    at_ends = precision.gather(0, ends)
    total = (relevant * at_ends).sum(dim=0)
    n_positive = relevant.sum(dim=0)
    return total / n_positive


def _from_the_end(values: Tensor) -> Tensor:
    """Returns the rows in reverse order, so that a cumulative operation runs from the last rank."""
    return values.flip(0)


def _precision_by_rank(
    scores: Scores,
    positive: Mask,
    counted: Mask,
) -> tuple[Scores, Scores, Mask]:
    """Sorts images by falling score, and returns three values for each rank.

    They are: the precision among all images up to this rank; 1 if the image is positive, else 0;
    and whether a threshold ends here, as the next score is lower.
    """
    # Images that do not count come last, where they change the precision of no positive image.
    masked = scores.masked_fill(~counted, -torch.inf)
    ranked, order = masked.sort(dim=0, descending=True)
    relevant = (positive & counted).gather(0, order)
    relevant = relevant.to(scores.dtype)
    ranks = torch.arange(
        1,
        len(scores) + 1,
        device=scores.device,
        dtype=scores.dtype,
    )
    n_positive_so_far = relevant.cumsum(dim=0)
    precision = n_positive_so_far / ranks.unsqueeze(1)

    # A threshold ends where the next score is lower, and at the last rank.
    is_lower_next = ranked[1:] < ranked[:-1]
    n_rankings = ranked.shape[1]
    last_rank = ranked.new_ones(1, n_rankings, dtype=torch.bool)
    ends_threshold = torch.cat([is_lower_next, last_rank])
    return precision, relevant, ends_threshold
