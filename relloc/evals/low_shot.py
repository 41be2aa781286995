"""VOC07 low-shot SVMs: few training images per class, drawn several times (protocols.md 3.2).

Each draw takes k images that show a class and 19 k that do not. SVMs are trained on every draw, and
their average precision is reported as a mean over the draws.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks
from relloc.data.lists import DIFFICULT, NOT_THERE, THERE
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import GramMatrices, Presence, Voc07, VocLabels, class_weights
from relloc.evaluation.average_precision import ap_area
from relloc.evaluation.contract import Context
from relloc.results import CHOSEN_WITHOUT_TEST, Score, closest_to_20
from relloc.seeds import Use, seed_for

_NEGATIVES = 19  # negative images for each positive one (protocols.md 3.2)
_MOST_GRAM_BYTES = 2**25  # memory of the Gram matrices of the draws that are fitted at once

# Indices of the images of each draw for each usable class, positive images first.
DrawnImages = Int[Tensor, "usable draws s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07LowShot(Voc07):
    """Mean average precision of SVMs after k positive images per class, for each possible k.

    For each k it yields, all on the test images:

    `map_k1`: the mean over the draws at the cost whose mean is best on test, as published.
    `map_k1_std`, `map_k1_min`, `map_k1_max`: the spread over the draws at this cost; `std` is that
        of the draws, not of their mean.
    `map_k1_cv`: the mean over the draws at the cost that is best on the training images that were
        not drawn. It is left out, and a detail says so, where the draws use up all positive images.

    `layers`: the layers to measure. `view`: how images are cropped and resized.
    `shots`: the numbers k of positive images. `draws`: how many times images are drawn.
    `costs`: the SVM costs to choose from. `batch`: the number of images that are read at once.

    Raises:
        UsageError: one of these is wrong.
    """

    setting = "eval.voc07_low_shot"
    version = 2

    layers: Sequence[str]
    view: View
    shots: Sequence[int]
    draws: int
    costs: Sequence[float]
    batch: int

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.wholes("eval.voc07_low_shot.shots", self.shots)
        checks.whole("eval.voc07_low_shot.draws", self.draws)

    def check_labels(self, labels: VocLabels) -> None:
        """Raises `UsageError` if a class has too few images for every k."""
        self._possible_shots(labels)

    def _possible_shots(self, labels: VocLabels) -> list[int]:
        """Returns those of `shots` for which every class has enough images.

        Raises:
            UsageError: there is none.
        """
        # The numbers of the rarest class, as every class has to have enough images.
        positive_by_class = (labels.train == THERE).sum(dim=0)
        negative_by_class = (labels.train == NOT_THERE).sum(dim=0)
        n_positive = int(positive_by_class.min())
        n_negative = int(negative_by_class.min())
        most = min(n_positive, n_negative // _NEGATIVES)
        possible = [k for k in self.shots if k <= most]
        if not possible:
            raise UsageError(
                f"eval.voc07_low_shot.shots={list(self.shots)}: a class has only {n_positive} "
                f"positive images and one {n_negative} negative ones, of which k needs "
                f"{_NEGATIVES} times as many: name smaller k"
            )
        return possible

    def measure(
        self,
        gram: GramMatrices,
        context: Context,
        layer: str,
        deviations: tuple[str, ...],
    ) -> Iterator[Score]:
        """Yields the scores of each k. The draws depend on the seed, k and the labels only."""
        labels = gram.labels
        shots = self._possible_shots(labels)
        factor = leading_factor(gram.train)
        left_out = sorted(set(self.shots) - set(shots))
        if left_out:
            names = ",".join(str(k) for k in left_out)
            deviations += (f"no k={names}, for which a class has too few images",)

        for k in shots:
            drawn = draw(labels.all_train, labels.classes, k, self.draws, context.seed)
            on_test, on_rest = self._mean_precisions(gram, drawn, factor)
            # As published: the cost is chosen by the numbers that are reported.
            best = int(on_test.mean(dim=0).argmax())
            by_draw = on_test[:, best]
            # Shows whether two results are about the same draws.
            drawn_bytes = drawn.cpu().numpy().tobytes()
            digest = hashlib.sha256(drawn_bytes).hexdigest()
            published = Score(
                table="Low-shot SVM, VOC07 protocol, mAP",
                column=f"k={k}",
                layer=layer,
                metric=f"map_k{k}",
                series="map",
                k=k,
                headline=k == closest_to_20(shots),
                value=float(by_draw.mean()),
                n=len(gram.test),
                protocol="3.2",
                deviations=deviations,
                choice=self._choice(best, "test as published"),
                details=(
                    f"{self.draws} draws, mean over them",
                    f"draws {digest[:16]}",
                    *_used_up_details(labels.train, k),
                ),
            )
            yield published

            spreads = {
                "std": by_draw.std(correction=0),
                "min": by_draw.min(),
                "max": by_draw.max(),
            }
            for name, value in spreads.items():
                yield dataclasses.replace(
                    published,
                    table="",
                    variant=f"{name} over draws",
                    headline=False,
                    metric=f"map_k{k}_{name}",
                    spread=name,
                    value=float(value),
                )

            # Without test images: the cost by the training images that were not drawn. All draws of
            # a class leave the same number of its images, so it is nan for all draws or for none.
            if not on_rest.isnan().any():
                chosen = int(on_rest.mean(dim=0).argmax())
                yield dataclasses.replace(
                    published,
                    metric=f"map_k{k}_cv",
                    series="map_cv",
                    variant=CHOSEN_WITHOUT_TEST,
                    headline=False,
                    value=float(on_test[:, chosen].mean()),
                    choice=self._choice(chosen, "the training images not drawn"),
                )

    def _choice(
        self,
        number: int,
        images: str,
    ) -> str:
        """Returns in words which cost was chosen on which images."""
        cost = self.costs[number]
        n_costs = len(self.costs)
        return f"cost {cost:g} of {n_costs} chosen on {images}"

    def _mean_precisions(
        self,
        gram: GramMatrices,
        drawn: DrawnImages,
        factor: Float[Tensor, "n r"],
    ) -> tuple[Float[Tensor, "draws costs"], Float[Tensor, "draws costs"]]:
        """Returns mean average precision in percent, on test and on undrawn training images."""
        n_classes = len(drawn)
        n_costs = len(self.costs)
        # (classes x draws, n, costs)
        coefficients = self._fit(gram.train, drawn.flatten(0, 1), factor)

        # One column per SVM, so that the decision values of all of them are one product.
        by_class = coefficients.view(n_classes, self.draws, -1, n_costs)
        columns = by_class.permute(2, 0, 1, 3).flatten(1)  # (n, classes x draws x costs)
        test_scores = gram.test @ columns
        test_scores = test_scores.view(len(gram.test), n_classes, -1)
        train_scores = gram.train @ columns
        train_scores = train_scores.view(len(gram.train), n_classes, -1)

        on_test = gram.test_map(test_scores)
        presence = gram.labels.train.to(train_scores.device)
        on_rest = 100 * _precision_on_rest(train_scores, presence, drawn, n_costs)
        # One row per draw, one column per cost.
        on_test = on_test.view(self.draws, -1)
        on_rest = on_rest.view(self.draws, -1)
        return on_test, on_rest

    def _fit(
        self,
        gram: Float[Tensor, "n n"],
        drawn: Int[Tensor, "p s"],
        factor: Float[Tensor, "n r"],
    ) -> Float[Tensor, "p n costs"]:
        """Trains an SVM on each of p draws at each cost, and returns coefficients of all n images.

        Images that are not in a draw have the coefficient 0.
        """
        size = drawn.shape[1]
        n_costs = len(self.costs)

        # Signs and weights are equal for all draws, whose positive images come first: (s costs).
        n_positive = size // (1 + _NEGATIVES)
        positive = torch.arange(size, device=gram.device) < n_positive
        signs = torch.where(positive, 1.0, -1.0).double()
        signs = signs.unsqueeze(1).expand(-1, n_costs)
        costs = torch.tensor(
            list(self.costs),
            dtype=torch.float64,
            device=gram.device,
        )
        weights = class_weights(positive).unsqueeze(1) * costs

        # Each draw has a Gram matrix of its own. As many as memory allows are solved at once.
        coefficients = gram.new_zeros(len(drawn), len(gram), n_costs)
        gram_bytes = 8 * size * size
        draws_at_once = max(1, _MOST_GRAM_BYTES // gram_bytes)
        for some_draws in torch.arange(len(drawn)).split(draws_at_once):
            images = drawn[some_draws].to(gram.device)  # (g s)
            shape = (len(images), size, n_costs)
            fitted = fit(
                gram[images.unsqueeze(2), images.unsqueeze(1)],
                signs.expand(shape),
                weights.expand(shape),
                factor=factor[images],
            )
            # From the places in a draw to those among all images.
            targets = images.unsqueeze(2).expand(shape)
            coefficients[some_draws] = coefficients[some_draws].scatter(
                1, targets, fitted.coefficients
            )
        return coefficients


def _used_up_details(presence: Presence, k: int) -> Iterator[str]:
    """Yields a detail if classes have exactly k positive images, so that every draw takes them all.

    No cost can then be judged by the undrawn images of these classes.
    """
    n_classes = presence.shape[1]
    n_positive = (presence == THERE).sum(dim=0)
    n_used_up = int((n_positive == k).sum())
    if n_used_up == n_classes:
        yield "no cost chosen without the test set, as draws leave no positive image"
    elif n_used_up:
        yield f"{n_used_up} of {n_classes} classes have no positive image left to choose a cost by"


def draw(
    presence: Presence,
    classes: Sequence[int],
    k: int,
    draws: int,
    seed: int,
) -> DrawnImages:
    """Draws k images that show a class and 19 k that do not, for each class and each draw.

    Images in which the class is difficult are neither. A draw depends on the seed, the index of the
    class, k, the number of the draw and the labels, and on nothing else that is drawn.
    """
    drawn = []
    for c in classes:
        in_class = presence[:, c]
        positive = (in_class == THERE).nonzero().squeeze(1)
        negative = (in_class == NOT_THERE).nonzero().squeeze(1)
        for number in range(draws):
            # A generator of its own, so that a draw is the same whatever else is measured.
            generator = torch.Generator().manual_seed(
                seed_for(Use.LOW_SHOT_IMAGES, seed, c, k, number)
            )
            positive_order = torch.randperm(len(positive), generator=generator)
            negative_order = torch.randperm(len(negative), generator=generator)
            positive_drawn = positive[positive_order][:k]
            negative_drawn = negative[negative_order][: _NEGATIVES * k]
            drawn.append(torch.cat([positive_drawn, negative_drawn]))
    return torch.stack(drawn).view(len(classes), draws, -1)


def _precision_on_rest(
    scores: Float[Tensor, "n classes m"],
    presence: Presence,
    drawn: DrawnImages,
    n_costs: int,
) -> Float[Tensor, "m"]:
    """Returns average precision on the training images that a draw left, as a mean over classes.

    The m rankings are those of each draw at each cost. Values are from 0 to 1; classes without a
    positive image that was not drawn are left out of the mean.
    """
    n_images, n_classes = presence.shape
    n_draws = drawn.shape[1]
    drawn = drawn.to(scores.device)
    images = drawn.permute(2, 0, 1)  # (s classes draws)
    was_drawn = torch.zeros(
        n_images,
        n_classes,
        n_draws,
        dtype=torch.bool,
        device=scores.device,
    )
    was_drawn.scatter_(0, images, torch.ones_like(images, dtype=torch.bool))

    # From each draw to its rankings, one per cost.
    was_drawn = was_drawn.repeat_interleave(n_costs, dim=2)
    is_clear = (presence != DIFFICULT).unsqueeze(2)
    is_counted = ~was_drawn & is_clear
    is_positive = (presence == THERE).unsqueeze(2).expand_as(scores)
    precision = ap_area(
        scores.reshape(n_images, -1),
        is_positive.reshape(n_images, -1),
        is_counted.reshape(n_images, -1),
    )
    return precision.view(n_classes, -1).nanmean(dim=0)
