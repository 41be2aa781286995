"""The VOC07 SVM benchmark: one linear SVM a class on each layer, its cost by cross-validation (protocols.md 3.1)."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.lists import THERE
from relloc.data.views import View, check_view
from relloc.errors import UsageError
from relloc.evals.metrics import ap_steps
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import Grams, check_usable, class_weights, grams, left_out, presences, usable
from relloc.evaluation.contract import Context, Evaluation
from relloc.results import CHOSEN, LAYERS, Result, Score

_COST_WITHOUT_CHOICE = 1.0
_TABLE = "Linear SVM, VOC07 protocol, mAP"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07Svm(Evaluation):
    """Mean average precision of SVMs whose cost each class chooses by `folds`-fold cross-validation on train.

    `map` is the test's; `map_cv` the cross-validated one on training images (scikit-learn's average
    precision, by which costs are chosen too), where some class has enough positives for that. A class
    without a positive image in train or test is left out, and said so.
    """

    kind = "frozen"
    labels = "presence"
    version = 1
    independent_layers = True
    keeps_features = True

    layers: Sequence[str]
    view: View
    costs: Sequence[float]
    folds: int
    batch: int

    def __post_init__(self) -> None:
        checks.some_of("eval.voc07_svm.layers", self.layers, LAYERS)
        check_view("eval.voc07_svm.view", self.view)
        checks.numbers("eval.voc07_svm.costs", self.costs, above=0)
        checks.whole("eval.voc07_svm.folds", self.folds, at_least=2)
        checks.whole("eval.voc07_svm.batch", self.batch)

    def check(self, splits: Splits) -> None:
        """Raises `UsageError` where no class can be learned and tested, or one can't be parted into `folds`."""
        present, test_present = presences(splits)
        self._check_folds(present, usable(present, test_present))

    def _check_folds(self, present: Int[Tensor, "n classes"], classes: Sequence[int]) -> None:
        check_usable("eval.voc07_svm", classes)
        positive = (present[:, list(classes)] == THERE).sum(dim=0)
        most = int(torch.maximum(positive, len(present) - positive).min())  # the rarer of both may miss in some folds
        if self.folds > most:
            raise UsageError(
                f"eval.voc07_svm.folds is {self.folds}: of {len(present)} training images, some class is in no more "
                f"than {most}, and missing in no more: give {most} folds or fewer, or more images"
            )

    def run(self, context: Context) -> Iterator[Score]:
        """Scores of each layer. Nothing is random.

        Raises:
            UsageError: as `check`, or features are not finite.
        """
        for layer in self.layers:
            known = grams(context.train, context.held_out, layer, self.batch, context.device)
            classes = known.usable
            self._check_folds(known.present, classes)  # again: images that can't be read are not among these
            validated = self._cross_validate(known, classes)  # (costs, classes)
            chosen = _first_best(validated, sorted(self.costs))
            scores = known.test @ self._fit_all(known, classes, chosen)
            tested = Score(
                table=_TABLE,
                column=layer,
                layer=layer,
                metric="map",
                headline=True,
                value=float(known.test_map(scores.unsqueeze(2), classes)),
                n=len(known.test),
                protocol="3.1",
                deviations=left_out(context.splits.train.classes, classes),
                details=(
                    f"SVM a class ({known.present.shape[1]})",
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
                value, n = float(100 * best.max(dim=0).values.mean()), len(known.train)
                as_detail = {"metric": "map_cv", "table": "", "headline": False, "on_train": True}
                yield dataclasses.replace(tested, **as_detail, value=value, n=n)

    def _cross_validate(self, known: Grams, classes: Sequence[int]) -> Float[Tensor, "costs classes"]:
        """Average precision by rising cost and class, mean over folds; nan where none has positives on both sides."""
        positive = (known.present[:, list(classes)] == THERE).to(known.train.device)
        trained = torch.stack([self._trained(one, known.train.device) for one in positive.cpu().mT], dim=1)
        positive = positive.unsqueeze(2).expand_as(trained).flatten(1)
        trained = trained.flatten(1)  # (n, classes x folds)
        signs = torch.where(positive, 1.0, -1.0).double()
        weights = class_weights(positive) * trained
        gram, factor = known.train.unsqueeze(0), leading_factor(known.train).unsqueeze(0)
        found, start = [], None
        for cost in sorted(self.costs):
            fitted = fit(gram, signs.unsqueeze(0), cost * weights.unsqueeze(0), factor=factor, start=start)
            start = fitted.coefficients
            precision = ap_steps(fitted.decisions[0], positive, ~trained)
            precision[~(positive & trained).any(dim=0)] = torch.nan
            found.append(precision.view(len(classes), self.folds).nanmean(dim=1))
        return torch.stack(found)

    def _trained(self, positive: Bool[Tensor, "n"], device: torch.device) -> Bool[Tensor, "n folds"]:
        """For each fold which images are trained on: scikit-learn's folds, stratified and not shuffled."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")  # fewer positives than folds
            split = StratifiedKFold(n_splits=self.folds).split(np.zeros(len(positive)), positive.numpy())
            held = [torch.from_numpy(held) for _, held in split]
        trained = torch.ones(len(positive), self.folds, dtype=torch.bool)
        for fold, indices in enumerate(held):
            trained[indices, fold] = False
        return trained.to(device)

    def _fit_all(
        self, known: Grams, classes: Sequence[int], costs: Float[Tensor, "classes"]
    ) -> Float[Tensor, "n classes"]:
        """The coefficients of each class on all training images, at its own cost."""
        positive = (known.present[:, list(classes)] == THERE).to(known.train.device)
        signs = torch.where(positive, 1.0, -1.0).double().unsqueeze(0)
        weights = (costs.to(positive.device) * class_weights(positive)).unsqueeze(0)
        factor = leading_factor(known.train).unsqueeze(0)
        return fit(known.train.unsqueeze(0), signs, weights, factor=factor).coefficients[0]

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
        yield dataclasses.replace(by_validation, **best, metric="map_best_cv", variant=CHOSEN, choice=choice)


def _first_best(validated: Float[Tensor, "costs classes"], costs: Sequence[float]) -> Float[Tensor, "classes"]:
    """The lowest of the best costs of each class; 1 where none could be validated."""
    place = validated.nan_to_num(-1).argmax(dim=0)
    chosen = torch.tensor(costs, dtype=torch.float64, device=validated.device)[place]
    return torch.where(validated.isnan().all(dim=0), _COST_WITHOUT_CHOICE, chosen)
