"""Mean intersection over union (mIoU) of class maps, as mmsegmentation 0.30 computes it.

Pixels of all images are counted together: the IoU of a class is the number of pixels where
prediction and truth agree on it, divided by the number where at least one of them says it. Void
pixels of the truth count nowhere. A class that is neither predicted nor true in any image has no
IoU and is left out of the mean (mmseg's nanmean).
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, UInt8
from torch import Tensor

from relloc.data.annotations import VOID
from relloc.errors import DataError
from relloc.transfer.metrics.per_image import PerImage

ClassMap = UInt8[Tensor, "h w"] | Int[Tensor, "h w"]
_ByClass = Float64[Tensor, "classes"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationScores:
    """The pixels of all images by true class (row) and predicted class (column)."""

    confusion: Int64[Tensor, "classes classes"]

    @property
    def iou_by_class(self) -> _ByClass:
        """The IoU of each class, from 0 to 1; nan for a class that is nowhere."""
        agreed = self.confusion.diagonal().double()
        n_true = self.confusion.sum(dim=1)
        n_predicted = self.confusion.sum(dim=0)
        # The sum has the pixels on which both agree twice.
        union = n_true + n_predicted - agreed
        # 0 / 0 is nan.
        return agreed / union

    @property
    def mean_iou(self) -> float:
        """The mean IoU of the classes that are somewhere, from 0 to 1; nan if there are none."""
        return self.iou_by_class.nanmean().item()

    @property
    def printed_mean_iou(self) -> float:
        """The mean IoU as mmseg prints it: in percent, rounded to 2 decimals."""
        return round(100 * self.mean_iou, 2)

    @property
    def pixel_accuracy(self) -> float:
        """The share of pixels that are right, from 0 to 1 (mmseg's aAcc); nan if there are none."""
        n_pixels = self.confusion.sum().double()
        n_right = self.confusion.diagonal().sum()
        share = n_right / n_pixels
        return share.item()


class SegmentationMetric:
    """Counts the pixels of a split that the processes of a run have divided.

    Counting waits for no device. Each image keeps its own counts until the end, (classes² + 1)
    numbers of 64 bits on its device, so that one that several processes predicted counts once.

    Example:
        metric = SegmentationMetric(21)
        for index in own_indices:
            metric.add(index, predicted=logits.argmax(0), truth=class_map)
        scores = metric.evaluate()

    Args:
        n_classes: number of classes, void not among them.
        void: the value of true pixels that count nowhere.
    """

    def __init__(self, n_classes: int, *, void: int = VOID) -> None:
        self._n_classes = n_classes
        self._void = void
        self._counts: dict[int, Tensor] = {}

    def add(self, image: int, *, predicted: ClassMap, truth: ClassMap) -> None:
        """Counts the pixels of an image; `image` numbers the images of the split.

        Both maps are on the same device. Predicted classes are from 0 to n_classes - 1.
        """
        n_classes = self._n_classes
        true_classes = truth.flatten().long()
        predicted_classes = predicted.flatten().long()
        # Each pair of true and predicted class has one bin.
        bins = true_classes * n_classes + predicted_classes
        # Void and unknown classes have bins of their own behind the others. Leaving their pixels
        # out would make the host wait for their number.
        void_bin = n_classes**2
        unknown_bin = void_bin + 1
        is_unknown = (true_classes < 0) | (true_classes >= n_classes)
        bins = bins.masked_fill(is_unknown, unknown_bin)
        is_void = true_classes == self._void
        bins = bins.masked_fill(is_void, void_bin)
        # Sums of whole numbers, which are the same in any order; bincount would wait for the
        # largest bin.
        counts = bins.new_zeros(n_classes**2 + 2)
        ones = torch.ones_like(bins)
        self._counts[image] = counts.scatter_add_(0, bins, ones)

    def evaluate(self) -> SegmentationScores:
        """Returns the scores over the images of all processes, which call it together.

        Raises:
            DataError: a true class map has a value that is neither a class nor void.
        """
        images: PerImage[np.ndarray] = PerImage()
        if self._counts:
            # In one piece, since each copy from a GPU waits for it.
            stacked = torch.stack(list(self._counts.values()))
            on_cpu = stacked.cpu().numpy()
            for image, counts in zip(self._counts, on_cpu, strict=True):
                images.add(image, counts)
        # Pixels of all images are counted together, and an image that two processes had once.
        n_bins = self._n_classes**2 + 2
        no_pixels = np.zeros(n_bins, dtype=np.int64)
        counts = images.evaluate(lambda of_images: sum(of_images, start=no_pixels))
        n_unknown = int(counts[-1])
        if n_unknown:
            raise DataError(
                f"{n_unknown:,} pixels of true class maps are neither one of {self._n_classes} "
                f"classes nor void ({self._void}). Check the masks with relloc.prepare."
            )
        # The bins of void and unknown classes are left out.
        of_classes = counts[: self._n_classes**2]
        confusion = of_classes.reshape(self._n_classes, self._n_classes)
        return SegmentationScores(confusion=torch.from_numpy(confusion))
