"""Sets a person's answers beside those of a network to the same pairs."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relloc.geometry import NEIGHBORS
from relloc.pretext.held_out import clustered_ratio
from relloc.pretext.questions import POSITIONS
from relloc.results import Score
from relloc.studies.accuracies import Share, share_of
from relloc.studies.human.session import GivenAnswer

_N_PLACES = len(NEIGHBORS)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Replies:
    """What somebody answered to questions, person or network.

    Attributes:
        labels: the right places, 0 to 7.
        answers: those that were answered.
        sources: what the image of each question was taken from.
    """

    labels: Int[np.ndarray, "n"]
    answers: Int[np.ndarray, "n"]
    sources: Sequence[str]

    @property
    def right(self) -> Bool[np.ndarray, "n"]:
        return self.labels == self.answers

    @property
    def n_images(self) -> int:
        """The number of sources, which intervals are clustered by."""
        return len(set(self.sources))

    def share(self, name: str, chosen: Bool[np.ndarray, "n"] | None = None) -> Share | None:
        """Returns the accuracy over the chosen questions, by default all; None without any."""
        if chosen is None:
            chosen = np.ones(len(self.labels), dtype=bool)
        _, images = np.unique(np.asarray(self.sources), return_inverse=True)
        sources = np.array(self.sources, dtype=object)
        return share_of(name, self.right[:, None], chosen[:, None], images, sources)

    def by_position(self) -> dict[str, Share]:
        """Returns the accuracy of each position that was asked about."""
        shares = {}
        for label, position in enumerate(POSITIONS):
            share = self.share(position, self.labels == label)
            if share is not None:
                shares[position] = share
        return shares

    def confusion(self) -> Int[Tensor, "8 8"]:
        """Returns counts by true position (row) and answered position (column)."""
        cells = torch.from_numpy(self.labels * _N_PLACES + self.answers)
        counts = cells.bincount(minlength=_N_PLACES * _N_PLACES)
        return counts.reshape(_N_PLACES, _N_PLACES)


def replies_of(given: Sequence[GivenAnswer]) -> Replies:
    """Returns the replies of a person."""
    return Replies(
        labels=np.array([each.label for each in given], dtype=np.int64),
        answers=np.array([each.answer for each in given], dtype=np.int64),
        sources=[each.image for each in given],
    )


def compare(person: Replies, network: Replies) -> list[Score]:
    """Returns by how much the person is better, and how often both answer the same."""
    difference = person.right.astype(np.int64) - network.right.astype(np.int64)
    same = (person.answers == network.answers).astype(np.int64)
    by_name = {"accuracy_difference": difference, "agreement": same}
    scores = []
    for metric, values in by_name.items():
        ones = np.ones(len(values), dtype=np.int64)
        ratio, half_width = clustered_ratio(values, ones, person.sources)
        score = Score(
            metric=metric,
            value=100 * ratio,
            unit="points" if metric == "accuracy_difference" else "%",
            higher_is_better=None,
            n=person.n_images,
        )
        # With images of a single source nothing is known of others.
        if not math.isinf(half_width):
            low = 100 * (ratio - half_width)
            high = 100 * (ratio + half_width)
            score = dataclasses.replace(score, low=max(-100.0, low), high=min(100.0, high))
        scores.append(score)
    value = kappa(person.answers, network.answers)
    if not math.isnan(value):
        scores.append(
            Score(
                metric="kappa",
                value=value,
                unit="dimensionless",
                higher_is_better=None,
                n=person.n_images,
                details=("Cohen's kappa: 0 where answers agree as often as by chance, 1 always",),
            )
        )
    return scores


def kappa(one: Int[np.ndarray, "n"], other: Int[np.ndarray, "n"]) -> float:
    """Returns Cohen's kappa: agreement beyond that of independent answers; nan if undefined.

    Cohen, A Coefficient of Agreement for Nominal Scales, 1960.
    """
    observed = float((one == other).mean())
    shares_of_one = np.bincount(one, minlength=_N_PLACES) / len(one)
    shares_of_other = np.bincount(other, minlength=_N_PLACES) / len(other)
    by_chance = float(shares_of_one @ shares_of_other)
    # Both always give one and the same answer.
    if by_chance >= 1:
        return math.nan
    return (observed - by_chance) / (1 - by_chance)


def network_replies(person: Replies, probabilities: Float[Tensor, "n 8"]) -> Replies:
    """Returns the replies of a network, given the probabilities of its answers."""
    return dataclasses.replace(person, answers=probabilities.argmax(dim=1).numpy())
