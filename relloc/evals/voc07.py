"""Base class of the SVM evaluations on PASCAL VOC 2007 (protocols.md 3.1 and 3.2).

Both evaluations normalize features, train linear SVMs on their inner products, and report average
precision as a mean over classes.
"""

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
from relloc.evaluation.average_precision import ap_area
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import FeatureSource
from relloc.results import Score

_NORM_EPSILON = 1e-5  # added to the length that features are divided by
_POSITIVE_WEIGHT = 2.0  # of positive examples in the loss; negative ones have 1

Presence = Int[Tensor, "n classes"]  # for each image and class: THERE, DIFFICULT or NOT_THERE


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocLabels:
    """The labels of training and test images for classes that can be learned and tested."""

    classes: list[int]  # the indices of these classes
    all_train: Int[Tensor, "n all"]  # the presence of all classes in the training images
    # The presence of the usable classes in training and test images.
    train: Presence
    test: Int[Tensor, "t classes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GramMatrices:
    """Inner products of the normalized features of one layer, each vector with a 1 appended.

    The 1 is the intercept, which LIBLINEAR regularizes like any weight.
    """

    train: Float[Tensor, "n n"]  # of the training images with one another
    test: Float[Tensor, "t n"]  # of the test images with the training images
    labels: VocLabels

    def test_map(self, scores: Float[Tensor, "t classes m"]) -> Float[Tensor, "m"]:
        """Returns the mean over classes of average precision on the test images, in percent.

        Images in which a class is marked as difficult do not count for this class.
        """
        n_images, n_classes, _ = scores.shape
        # All m rankings of a class have the same labels.
        presence = self.labels.test.to(scores.device)
        presence = presence.unsqueeze(2).expand_as(scores)
        precision = ap_area(
            scores.reshape(n_images, -1),
            (presence == THERE).reshape(n_images, -1),
            (presence != DIFFICULT).reshape(n_images, -1),
        )
        return 100 * precision.view(n_classes, -1).mean(dim=0)


class Voc07(Evaluation):
    """Base class of both evaluations; `setting` is the name under which a user configures one."""

    kind = "frozen"
    labels = "presence"
    may_decode_on_device = True
    independent_layers = True
    keeps_features = True  # both evaluations read the same ones
    setting: ClassVar[str]

    costs: Sequence[float]

    def __post_init__(self) -> None:
        self.check_inputs(self.setting)
        checks.numbers(f"{self.setting}.costs", self.costs, above=0)

    def check(self, splits: Splits) -> None:
        """Checks the labels before features are computed.

        Raises:
            UsageError: no class can be both learned and tested, or a class has too few images.
        """
        presence = []
        for images in (splits.train, splits.held_out):
            if isinstance(images, MultiLabeled):  # which `NamedEvaluation.check_images` has checked
                presence.append(torch.as_tensor(images.presence(), dtype=torch.int64))
        train, test = presence
        self.check_labels(self._labels_of(train, test))

    def run(self, context: Context) -> Iterator[Score]:
        """Yields the scores of each layer. Random draws depend on the seed and the labels only.

        Raises:
            UsageError: as in `check`, or features are not finite.
        """
        for layer in self.layers:
            train, train_presence = _normalized(
                context.train,
                layer,
                self.batch,
                context.device,
            )
            test, test_presence = _normalized(
                context.held_out,
                layer,
                self.batch,
                context.device,
            )
            labels = self._labels_of(train_presence, test_presence)
            # Once more after `check`, as images that cannot be read are missing here.
            self.check_labels(labels)

            deviations = ()
            missing = []
            for number, name in enumerate(context.splits.train.classes):
                if number not in labels.classes:
                    missing.append(name)
            if missing:
                deviations = (
                    f"without {', '.join(missing)} (no positive image to train on or to test on)",
                )

            # Adding 1 to an inner product is the same as appending a 1 to both vectors.
            gram = GramMatrices(
                train=train @ train.T + 1,
                test=test @ train.T + 1,
                labels=labels,
            )
            yield from self.measure(gram, context, layer, deviations)

    @abc.abstractmethod
    def check_labels(self, labels: VocLabels) -> None:
        """Raises `UsageError` if a class has too few images."""

    @abc.abstractmethod
    def measure(
        self,
        gram: GramMatrices,
        context: Context,
        layer: str,
        deviations: tuple[str, ...],
    ) -> Iterator[Score]:
        """Yields the scores of a layer; `deviations` from the protocol are to be part of each."""

    def _labels_of(
        self,
        train: Presence,
        test: Int[Tensor, "t classes"],
    ) -> VocLabels:
        """Returns the labels of the usable classes.

        A class is usable if some training images show it and some do not, and a test image shows
        it.

        Raises:
            UsageError: no class is usable.
        """
        in_train = train == THERE
        in_test = test == THERE
        has_positive = in_train.any(dim=0)
        has_negative = ~in_train.all(dim=0)
        can_be_tested = in_test.any(dim=0)
        is_usable = has_positive & has_negative & can_be_tested
        classes = is_usable.nonzero().squeeze(1).tolist()
        if not classes:
            raise UsageError(
                f"{self.setting}: no class has a positive image both to train on "
                "and to be tested on: give more images"
            )
        return VocLabels(
            classes=classes,
            all_train=train,
            train=train[:, classes],
            test=test[:, classes],
        )


def _normalized(
    source: FeatureSource,
    layer: str,
    size: int,
    device: torch.device,
) -> tuple[Float[Tensor, "n d"], Presence]:
    """Returns features in float64, each row divided by its length plus 1e-5, and the labels.

    The constant is that of the protocol's code (protocols.md 3.1). `size` is the number of images
    per batch.

    Raises:
        UsageError: features are not finite.
    """
    rows = []
    presence = []
    indices = torch.arange(source.n)
    for features, labels in source.batches(indices, size, (layer,)):
        x = features[layer].to(device, torch.float64)
        if not x.isfinite().all():
            raise UsageError(
                f"features of {layer} are not finite: the weights have diverged, or the precision "
                "is too low. Give other weights, or precision=fp32"
            )
        lengths = x.norm(dim=1, keepdim=True)
        rows.append(x / (lengths + _NORM_EPSILON))
        presence.append(labels)
    return torch.cat(rows), torch.cat(presence)


def class_weights(positive: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the weight of each example in the loss: 2 for positive and 1 for negative ones.

    It is the protocol's `class_weight={1: 2, -1: 1}` (protocols.md 3.1).
    """
    return 1 + (_POSITIVE_WEIGHT - 1) * positive.double()
