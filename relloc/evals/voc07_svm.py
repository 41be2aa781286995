"""The VOC07 SVM benchmark: one linear SVM a class on each layer, its cost by cross-validation (protocols.md 3.1)."""

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
from relloc.evals.metrics import ap_steps
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import Grams, Shown, Voc07, class_weights
from relloc.evaluation.contract import Context
from relloc.results import CHOSEN_WITHOUT_TEST, Result, Score

_COST_WITHOUT_CHOICE = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07Svm(Voc07):
    """Mean average precision of SVMs whose cost each class chooses by `folds`-fold cross-validation on train.

    `map` is the test's; `map_cv` the cross-validated one on training images (scikit-learn's average
    precision, by which costs are chosen too), where some class has enough positives for that. A class
    without a positive image in train or test is left out, and said so.
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

    def check_shown(self, shown: Shown) -> None:
        """Raises `UsageError` where a class can't be parted into `folds`."""
        n = len(shown.train)
        positive = (shown.train == THERE).sum(dim=0)
        most = int(torch.maximum(positive, n - positive).min())  # the rarer of both may miss in some folds
        if self.folds > most:
            raise UsageError(
                f"eval.voc07_svm.folds is {self.folds}: of {n} training images, some class is in no more "
                f"than {most}, and missing in no more: give {most} folds or fewer, or more images"
            )

    def measure(self, known: Grams, context: Context, layer: str, deviations: tuple[str, ...]) -> Iterator[Score]:
        """The test's score, and the cross-validated one. Nothing is random."""
        positive = (known.shown.train == THERE).to(known.train.device)
        factor = leading_factor(known.train).unsqueeze(0)
        validated = self._cross_validate(known.train, positive, factor)
        # All training images, each class at its own cost
        signs = torch.where(positive, 1.0, -1.0).double().unsqueeze(0)
        weights = _first_best(validated, sorted(self.costs)) * class_weights(positive)
        fitted = fit(known.train.unsqueeze(0), signs, weights.unsqueeze(0), factor=factor)
        scores = known.test @ fitted.coefficients[0]
        tested = Score(
            table="Linear SVM, VOC07 protocol, mAP",
            column=layer,
            layer=layer,
            metric="map",
            headline=True,
            value=float(known.test_map(scores.unsqueeze(2))),
            n=len(known.test),
            protocol="3.1",
            deviations=deviations,
            details=(
                f"SVM a class ({known.shown.present.shape[1]})",
                "squared hinge",
                "positives twice",
                "difficult images negative in training",
                f"cost among {len(self.costs)} by {self.folds}-fold cross-validation",
                "all-point AP",
            ),
        )
        yield tested
        best = validated[:, ~validated.isnan().all(dim=0)].nan_to_num(-1)
        if best.shape[1]:
            yield dataclasses.replace(
                tested,
                table="",
                metric="map_cv",
                headline=False,
                value=float(100 * best.max(dim=0).values.mean()),
                n=len(known.train),
                on_train=True,
            )

    def _cross_validate(
        self, gram: Float[Tensor, "n n"], positive: Bool[Tensor, "n classes"], factor: Float[Tensor, "1 n r"]
    ) -> Float[Tensor, "costs classes"]:
        """Average precision by rising cost and class, mean over folds; nan where none has positives on both sides."""
        trained = torch.stack([self._trained(one) for one in positive.cpu().mT], dim=1).to(gram.device)
        n_classes = positive.shape[1]
        positive = positive.unsqueeze(2).expand_as(trained).flatten(1)
        trained = trained.flatten(1)  # (n, classes x folds)
        signs = torch.where(positive, 1.0, -1.0).double().unsqueeze(0)
        weights = (class_weights(positive) * trained).unsqueeze(0)
        found, start = [], None
        for cost in sorted(self.costs):
            fitted = fit(gram.unsqueeze(0), signs, cost * weights, factor=factor, start=start)
            start = fitted.coefficients
            precision = ap_steps(fitted.decisions[0], positive, ~trained)
            precision[~(positive & trained).any(dim=0)] = torch.nan
            found.append(precision.view(n_classes, self.folds).nanmean(dim=1))
        return torch.stack(found)

    def _trained(self, positive: Bool[Tensor, "n"]) -> Bool[Tensor, "n folds"]:
        """For each fold which images are trained on: scikit-learn's folds, stratified and not shuffled."""
        trained = torch.ones(len(positive), self.folds, dtype=torch.bool)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")  # fewer positives than folds
            split = StratifiedKFold(n_splits=self.folds).split(np.zeros(len(positive)), positive.numpy())
            for fold, (_, held) in enumerate(split):
                trained[torch.from_numpy(held), fold] = False
        return trained

    def summary(self, rows: Sequence[Result]) -> Iterator[Result]:
        """The best layer: chosen on test as published, and by cross-validation on train."""
        tested, validated = ([row for row in rows if row.metric == metric] for metric in ("map", "map_cv"))
        if not tested:
            return
        best = {"column": "best layer", "headline": False}
        by_test = max(tested, key=lambda row: row.value)
        choice = f"best of {len(tested)} layers, chosen on test as published"
        yield dataclasses.replace(by_test, **best, metric="map_best", choice=choice)
        if not validated:
            return
        layer = max(validated, key=lambda row: row.value).layer
        by_validation = next(row for row in tested if row.layer == layer)
        choice = f"best of {len(tested)} layers, chosen by cross-validation on train"
        yield dataclasses.replace(
            by_validation, **best, metric="map_best_cv", variant=CHOSEN_WITHOUT_TEST, choice=choice
        )


def _first_best(validated: Float[Tensor, "costs classes"], costs: Sequence[float]) -> Float[Tensor, "classes"]:
    """The lowest of the best costs of each class; 1 where none could be validated."""
    place = validated.nan_to_num(-1).argmax(dim=0)
    chosen = torch.tensor(costs, dtype=torch.float64, device=validated.device)[place]
    return torch.where(validated.isnan().all(dim=0), _COST_WITHOUT_CHOICE, chosen)
