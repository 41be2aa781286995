"""Average precision, two definitions, for many rankings of the same images at once.

Equal scores are one threshold, so that no result hangs on the order of images. `counted` leaves
images out of a ranking (difficult ones of PASCAL VOC).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Ranked = Float[Tensor, "n m"]  # a number for each image in each ranking
Marked = Bool[Tensor, "n m"]


def ap_area(scores: Ranked, positive: Marked, counted: Marked) -> Float[Tensor, "m"]:
    """Area under precision over recall, precision made monotone first: VOC since 2010 (protocols.md 3.1).

    From 0 to 1; nan for a ranking without a positive image.
    """
    precision, relevant, last = _thresholds(scores, positive, counted)
    at_thresholds = torch.where(last, precision, 0.0)
    best_later = at_thresholds.flip(0).cummax(dim=0).values.flip(0)
    return (relevant * best_later).sum(dim=0) / relevant.sum(dim=0)


def ap_steps(scores: Ranked, positive: Marked, counted: Marked) -> Float[Tensor, "m"]:
    """Mean precision over positive images, as scikit-learn's `average_precision_score` has it.

    From 0 to 1; nan for a ranking without a positive image.
    """
    precision, relevant, last = _thresholds(scores, positive, counted)
    # The place at which the threshold of each place ends
    places = torch.arange(len(last), device=last.device).unsqueeze(1)
    ends = torch.where(last, places, len(last) - 1).flip(0).cummin(dim=0).values.flip(0)
    return (relevant * precision.gather(0, ends)).sum(dim=0) / relevant.sum(dim=0)


def _thresholds(scores: Ranked, positive: Marked, counted: Marked) -> tuple[Ranked, Ranked, Marked]:
    """By falling score: precision up to here, whether the image is positive, whether a threshold ends here.

    Images that don't count come last, where they touch no precision at a positive image.
    """
    ranked, order = scores.masked_fill(~counted, -torch.inf).sort(dim=0, descending=True)
    relevant = (positive & counted).gather(0, order).to(scores.dtype)
    places = torch.arange(1, len(scores) + 1, device=scores.device, dtype=scores.dtype).unsqueeze(1)
    last = torch.cat([ranked[1:] < ranked[:-1], ranked.new_ones(1, ranked.shape[1], dtype=torch.bool)])
    return relevant.cumsum(dim=0) / places, relevant, last
