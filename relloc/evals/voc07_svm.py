"""The VOC07 SVM benchmark: linear SVMs on the frozen features of each layer (protocols.md 3.1).

There is one SVM per class. The cost of each is chosen by cross-validation on the training images.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from relloc import checks
from relloc.data.lists import THERE
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import GramMatrices, Voc07, VocLabels, class_weights
from relloc.evaluation.average_precision import ap_steps
from relloc.evaluation.contract import Context
from relloc.results import CHOSEN_WITHOUT_TEST, Result, Score

# The cost of classes that could not be validated at any cost.
_COST_WITHOUT_CHOICE = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07Svm(Voc07):
    """Mean average precision of linear SVMs whose cost each class chooses by cross-validation.

    It yields `map`, measured on the test images, and `map_cv`, the cross-validated one on the
    training images, if some class has enough positive images for it. Costs are chosen by the
    latter, which uses scikit-learn's definition of average precision. Classes without a positive
    image in train or test are left out, and listed in the deviations.

    `layers`: the layers to measure. `view`: how images are cropped and resized.
    `costs`: the SVM costs to choose from. `folds`: the number of folds of the cross-validation.
    `batch`: the number of images that are read at once.

    Raises:
        UsageError: one of these is wrong.
    """

    setting = "eval.voc07_svm"
    version = 1

    layers: Sequence[str]
    view: View
    costs: Sequence[float]
    folds: int
    batch: int

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("eval.voc07_svm.folds", self.folds, at_least=2)

    def check_labels(self, labels: VocLabels) -> None:
        """Raises `UsageError` if the images of a class cannot be divided into `folds` folds."""
        n_images = len(labels.train)
        n_positive = (labels.train == THERE).sum(dim=0)
        # The rarer of the two kinds of images may be missing in some folds, the other may not.
        n_more_frequent = torch.maximum(n_positive, n_images - n_positive)
        most_folds = int(n_more_frequent.min())
        if self.folds > most_folds:
            raise UsageError(
                f"eval.voc07_svm.folds is {self.folds}: of {n_images} training images, some class "
                f"is in no more than {most_folds}, and missing in no more: give {most_folds} folds "
                "or fewer, or more images"
            )

    def measure(
        self,
        gram: GramMatrices,
        context: Context,
        layer: str,
        deviations: tuple[str, ...],
    ) -> Iterator[Score]:
        """Yields the score on the test images and the cross-validated one. Nothing is random."""
        positive = (gram.labels.train == THERE).to(gram.train.device)
        factor = leading_factor(gram.train).unsqueeze(0)
        validated = self._cross_validate(gram.train, positive, factor)

        # Final SVMs on all training images, each class at the cost that it has chosen.
        signs = torch.where(positive, 1.0, -1.0).double()
        costs = _choose_costs(validated, sorted(self.costs))
        weights = costs * class_weights(positive)
        fitted = fit(
            gram.train.unsqueeze(0),
            signs.unsqueeze(0),
            weights.unsqueeze(0),
            factor=factor,
        )
        scores = gram.test @ fitted.coefficients[0]
        tested = Score(
            table="Linear SVM, VOC07 protocol, mAP",
            column=layer,
            layer=layer,
            metric="map",
            headline=True,
            value=float(gram.test_map(scores.unsqueeze(2))),
            n=len(gram.test),
            protocol="3.1",
            deviations=deviations,
            details=(
                f"SVM a class ({gram.labels.all_train.shape[1]})",
                "squared hinge",
                "positives twice",
                "difficult images negative in training",
                f"cost among {len(self.costs)} by {self.folds}-fold cross-validation",
                "all-point AP",
            ),
        )
        yield tested

        # Classes with too few positive images to validate on have nan at every cost.
        has_value = ~validated.isnan().all(dim=0)
        best = validated[:, has_value].nan_to_num(-1)
        if best.shape[1]:
            mean = best.max(dim=0).values.mean()
            yield dataclasses.replace(
                tested,
                table="",
                metric="map_cv",
                headline=False,
                value=float(100 * mean),
                n=len(gram.train),
                on_train=True,
            )

    def _cross_validate(
        self,
        gram: Float[Tensor, "n n"],
        positive: Bool[Tensor, "n classes"],
        factor: Float[Tensor, "1 n r"],
    ) -> Float[Tensor, "costs classes"]:
        """Returns average precision by rising cost and by class, from 0 to 1, as a mean over folds.

        A fold counts only with positive images on both sides; nan where there is no such fold.
        """
        by_class = [self._training_folds(column) for column in positive.cpu().mT]
        in_training = torch.stack(by_class, dim=1).to(gram.device)  # (n classes folds)

        # The SVMs of all classes and folds are fitted together: (n, classes x folds).
        n_classes = positive.shape[1]
        positive = positive.unsqueeze(2).expand_as(in_training).flatten(1)
        in_training = in_training.flatten(1)
        signs = torch.where(positive, 1.0, -1.0).double()
        signs = signs.unsqueeze(0)
        # Images of the held-out fold have weight 0: they are not part of the problem.
        weights = (class_weights(positive) * in_training).unsqueeze(0)
        has_positives = (positive & in_training).any(dim=0)

        by_cost = []
        start = None
        for cost in sorted(self.costs):
            fitted = fit(
                gram.unsqueeze(0),
                signs,
                cost * weights,
                factor=factor,
                start=start,
            )
            # The solution at one cost is near that of the next.
            start = fitted.coefficients
            precision = ap_steps(fitted.decisions[0], positive, ~in_training)
            # Without a positive image to train on there is nothing to learn; without one to
            # validate on, average precision is nan by itself. `nanmean` leaves both out.
            precision[~has_positives] = torch.nan
            by_fold = precision.view(n_classes, self.folds)
            by_cost.append(by_fold.nanmean(dim=1))
        return torch.stack(by_cost)

    def _training_folds(self, positive: Bool[Tensor, "n"]) -> Bool[Tensor, "n folds"]:
        """Returns for each fold the images that are trained on.

        Folds are those of scikit-learn's StratifiedKFold without shuffling, as published.
        """
        n_images = len(positive)
        in_training = torch.ones(n_images, self.folds, dtype=torch.bool)
        with warnings.catch_warnings():
            # scikit-learn warns where a class has fewer positive images than there are folds.
            warnings.filterwarnings("ignore", message="The least populated class")
            splitter = StratifiedKFold(n_splits=self.folds)
            folds = splitter.split(np.zeros(n_images), positive.numpy())
            for fold, (_, held_out) in enumerate(folds):
                in_training[torch.from_numpy(held_out), fold] = False
        return in_training

    def summary(self, rows: Sequence[Result]) -> Iterator[Result]:
        """Yields the best layer twice: chosen on test as published, and by cross-validation."""
        tested = [row for row in rows if row.metric == "map"]
        validated = [row for row in rows if row.metric == "map_cv"]
        if not tested:
            return
        best_by_test = max(tested, key=lambda row: row.value)
        yield dataclasses.replace(
            best_by_test,
            column="best layer",
            headline=False,
            metric="map_best",
            choice=f"best of {len(tested)} layers, chosen on test as published",
        )
        if not validated:
            return
        # Chosen by the cross-validated number, but reported on test.
        layer = max(validated, key=lambda row: row.value).layer
        best_by_validation = next(row for row in tested if row.layer == layer)
        yield dataclasses.replace(
            best_by_validation,
            column="best layer",
            headline=False,
            metric="map_best_cv",
            variant=CHOSEN_WITHOUT_TEST,
            choice=f"best of {len(tested)} layers, chosen by cross-validation on train",
        )


def _choose_costs(
    validated: Float[Tensor, "costs classes"],
    costs: Sequence[float],
) -> Float[Tensor, "classes"]:
    """Returns the cost of each class with the best validated precision, the lowest on a tie.

    Classes that could not be validated at any cost get the cost 1.
    """
    # nan, where nothing could be validated, becomes -1 so that it is never the best.
    best = validated.nan_to_num(-1).argmax(dim=0)
    values = torch.tensor(
        costs,
        dtype=torch.float64,
        device=validated.device,
    )
    has_no_value = validated.isnan().all(dim=0)
    return torch.where(has_no_value, _COST_WITHOUT_CHOICE, values[best])
