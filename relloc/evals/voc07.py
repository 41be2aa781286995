"""What the SVM evaluations of PASCAL VOC share (protocols.md 3.1): features, costs, weights, averages over classes."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relloc.data.image_set import Splits
from relloc.data.lists import DIFFICULT, THERE, MultiLabeled
from relloc.errors import UsageError
from relloc.evals.metrics import ap_area
from relloc.features.source import FeatureSource

_NORM_EPSILON = 1e-5
_POSITIVE_WEIGHT = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grams:
    """Inner products of the normalized features of one layer, each feature vector with a 1 appended.

    The 1 is the intercept, which LIBLINEAR regularizes like any weight. `train` is (n, n), `test`
    (test images, n); `present` and `test_present` are the labels of both, 1, 0 or -1.
    """

    train: Float[Tensor, "n n"]
    test: Float[Tensor, "t n"]
    present: Int[Tensor, "n classes"]
    test_present: Int[Tensor, "t classes"]

    @property
    def usable(self) -> list[int]:
        """The classes with a positive and another image to train on, and a positive one to be tested on."""
        return usable(self.present, self.test_present)

    def test_map(self, scores: Float[Tensor, "t classes m"], classes: Sequence[int]) -> Float[Tensor, "m"]:
        """Mean over `classes` of average precision in percent; an image difficult for a class does not count there."""
        truth = self.test_present[:, list(classes)].to(scores.device).unsqueeze(2).expand_as(scores)
        flat = [part.reshape(len(scores), -1) for part in (scores, truth == THERE, truth != DIFFICULT)]
        return 100 * ap_area(*flat).view(len(classes), -1).mean(dim=0)


def usable(present: Int[Tensor, "n classes"], test_present: Int[Tensor, "t classes"]) -> list[int]:
    """The classes with a positive and another image to train on, and a positive one to be tested on."""
    there, tested = (labels == THERE for labels in (present, test_present))
    return [c for c in range(there.shape[1]) if there[:, c].any() and not there[:, c].all() and tested[:, c].any()]


def presences(splits: Splits) -> tuple[Int[Tensor, "n classes"], Int[Tensor, "t classes"]]:
    """What the images of both splits show, as `Grams` has it, before any feature is computed."""
    train, held_out = (
        torch.as_tensor(images.presence(), dtype=torch.int64)
        for images in (splits.train, splits.held_out)
        if isinstance(images, MultiLabeled)
    )
    return train, held_out


def check_usable(setting: str, classes: Sequence[int]) -> None:
    """Raises `UsageError` where there is no class to learn and test."""
    if not classes:
        raise UsageError(f"{setting}: no class has a positive image both to train on and to be tested on")


def grams(train: FeatureSource, test: FeatureSource, layer: str, size: int, device: torch.device) -> Grams:
    """Reads the features of `layer`, `size` images at a time.

    Raises:
        UsageError: features that are not finite.
    """
    (x, present), (z, test_present) = (_normalized(source, layer, size, device) for source in (train, test))
    return Grams(train=x @ x.T + 1, test=z @ x.T + 1, present=present, test_present=test_present)


def _normalized(
    source: FeatureSource, layer: str, size: int, device: torch.device
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n classes"]]:
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


def left_out(classes: Sequence[str], usable: Sequence[int]) -> tuple[str, ...]:
    """The deviation that classes which could not be learned or tested are; none if there are no such."""
    missing = [name for number, name in enumerate(classes) if number not in usable]
    return (f"without {', '.join(missing)} (no positive image to train on or to test on)",) if missing else ()
