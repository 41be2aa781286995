"""What the SVM evaluations of PASCAL VOC share (protocols.md 3.1): features, costs, weights, averages over classes."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.lists import DIFFICULT, THERE, MultiLabeled
from relloc.errors import UsageError
from relloc.evals.metrics import ap_area
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import FeatureSource
from relloc.results import Score

_NORM_EPSILON = 1e-5
_POSITIVE_WEIGHT = 2.0

Presence = Int[Tensor, "n classes"]  # of each image and class: THERE, DIFFICULT or NOT_THERE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What images show of the `classes` that can be learned and tested; `present`: training images, all classes."""

    classes: list[int]
    present: Int[Tensor, "n all"]
    train: Presence
    test: Int[Tensor, "t classes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grams:
    """Inner products of the normalized features of one layer, each feature vector with a 1 appended.

    The 1 is the intercept, which LIBLINEAR regularizes like any weight. `train` is (n, n), `test`
    (test images, n).
    """

    train: Float[Tensor, "n n"]
    test: Float[Tensor, "t n"]
    shown: Shown

    def test_map(self, scores: Float[Tensor, "t classes m"]) -> Float[Tensor, "m"]:
        """Mean over classes of average precision in percent; an image difficult for a class does not count there."""
        truth = self.shown.test.to(scores.device).unsqueeze(2).expand_as(scores)
        flat = [part.reshape(len(scores), -1) for part in (scores, truth == THERE, truth != DIFFICULT)]
        return 100 * ap_area(*flat).view(scores.shape[1], -1).mean(dim=0)


class Voc07(Evaluation):
    """What both evaluations are and check alike; `setting` is where a user finds their constants."""

    kind = "frozen"
    labels = "presence"
    independent_layers = True
    keeps_features = True
    setting: ClassVar[str]

    costs: Sequence[float]

    def __post_init__(self) -> None:
        self.check_inputs(self.setting)
        checks.numbers(f"{self.setting}.costs", self.costs, above=0)

    def check(self, splits: Splits) -> None:
        """Raises `UsageError` where no class can be learned and tested, or one has too few images."""
        present, test_present = (
            torch.as_tensor(images.presence(), dtype=torch.int64)
            for images in (splits.train, splits.held_out)
            if isinstance(images, MultiLabeled)
        )
        self.check_shown(self._shown(present, test_present))

    def run(self, context: Context) -> Iterator[Score]:
        """Scores of each layer. All that is random depends on the seed and the labels alone.

        Raises:
            UsageError: as `check`, or features are not finite.
        """
        for layer in self.layers:
            (x, present), (z, test_present) = (
                _normalized(source, layer, self.batch, context.device) for source in (context.train, context.held_out)
            )
            shown = self._shown(present, test_present)
            self.check_shown(shown)  # again: images that can't be read are not among these
            missing = [name for number, name in enumerate(context.splits.train.classes) if number not in shown.classes]
            left_out = f"without {', '.join(missing)} (no positive image to train on or to test on)"
            known = Grams(train=x @ x.T + 1, test=z @ x.T + 1, shown=shown)
            yield from self.measure(known, context, layer, (left_out,) if missing else ())

    @abc.abstractmethod
    def check_shown(self, shown: Shown) -> None:
        """Raises `UsageError` where a class has too few images."""

    @abc.abstractmethod
    def measure(self, known: Grams, context: Context, layer: str, deviations: tuple[str, ...]) -> Iterator[Score]:
        """Scores of a layer, which deviate from the protocol in `deviations` at the least."""

    def _shown(self, present: Presence, test_present: Int[Tensor, "t classes"]) -> Shown:
        """Raises `UsageError` unless a class is shown and not shown in training images, and shown in a test image."""
        there = present == THERE
        usable = there.any(dim=0) & ~there.all(dim=0) & (test_present == THERE).any(dim=0)
        classes = usable.nonzero().squeeze(1).tolist()
        if not classes:
            raise UsageError(f"{self.setting}: no class has a positive image both to train on and to be tested on")
        return Shown(classes=classes, present=present, train=present[:, classes], test=test_present[:, classes])


def _normalized(
    source: FeatureSource, layer: str, size: int, device: torch.device
) -> tuple[Float[Tensor, "n d"], Presence]:
    """Features in float64, each row divided by its length plus 1e-5, and the labels."""
    rows, labels = [], []
    for features, batch_labels in source.batches(torch.arange(source.n), size, (layer,)):
        x = features[layer].to(device, torch.float64)
        if not x.isfinite().all():
            raise UsageError(
                f"features of {layer} are not finite: the weights have diverged, or the precision is too low "
                "(precision=fp32)"
            )
        rows.append(x / (x.norm(dim=1, keepdim=True) + _NORM_EPSILON))
        labels.append(batch_labels)
    return torch.cat(rows), torch.cat(labels)


def class_weights(positive: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """How much an example counts in the loss: positive ones twice."""
    return 1 + (_POSITIVE_WEIGHT - 1) * positive.double()
