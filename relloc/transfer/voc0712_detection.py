"""VOC07+12 detection: Faster R-CNN C4, fine-tuned for 24,000 iterations (docs/protocols.md 3.8).

Two trainings of this name are published, and half of the literature's rows are of each kind. That
of mmdetection 2.28.2 is `reference="mmdet"`. That of OpenSelfSup and MoCo, by detectron2, differs
in six things, which `reference="detectron2"` changes together.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc import checks, ranks
from relloc.data.annotated_folders import ObjectFolder
from relloc.data.image_set import ImageSet, Splits
from relloc.errors import UsageError
from relloc.evaluation.contract import Context
from relloc.results import Score
from relloc.transfer.detection.faster_rcnn_c4 import C4Settings, FasterRCNNC4
from relloc.transfer.detection.rpn import RpnTraining
from relloc.transfer.detection.samples import RandomSizes
from relloc.transfer.detection.training import AnnotatedImage, DetectionFineTuning
from relloc.transfer.detections import Detections
from relloc.transfer.metrics.box_confusion import BoxesOfImage, boxes_of_voc
from relloc.transfer.metrics.more_scores import scores_by_class
from relloc.transfer.metrics.voc_ap import (
    AP_IOUS,
    DETECTRON2,
    MMDET,
    MMDET_AREA,
    VocImage,
    average_precision,
    mean_ap,
    printed_ap,
    voc_image,
)
from relloc.transfer.schedule import Milestones, in_proportion

REFERENCES = ("mmdet", "detectron2")
_SETTING = "eval.voc0712_detection"
_TABLE = "Detection, VOC07+12 protocol"
# In iterations of the published training; others have them in proportion.
_PUBLISHED_ITERATIONS = 24_000
_PUBLISHED_MILESTONES = (18_000, 22_000)
_PUBLISHED_WARMUP = 100
# detectron2's TEST.PRECISE_BN.NUM_ITER.
_PUBLISHED_PRECISE_BATCHES = 200
# The config rounds scaled numbers to six digits.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc0712Detection(DetectionFineTuning[VocImage]):
    """Average precision of Faster R-CNN C4 on PASCAL VOC, after fine-tuning all weights.

    `reference` is "mmdet" or "detectron2". The latter trains on difficult objects and on all
    anchors, has no weight decay on norm layers, estimates batch norm anew before each test, reads
    boxes otherwise (the data set's `reference`), and computes AP by its own code.
    `precise_batches` is the number of batches of that estimate. `milestones` are in iterations.

    Raises:
        UsageError: a setting is out of range.
    """

    # 2: batch norm of detectron2's kind was estimated in float32, whatever the precision was
    # 3: objects of test images that can't be read did not count
    version = 4
    published: ClassVar = {
        "iterations": _PUBLISHED_ITERATIONS,
        "batch": 16,
        "images_per_gpu": 2,
        "learning_rate": 0.02,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "gamma": 0.1,
        "warmup_from": 0.001,
    }
    published_augment: ClassVar = RandomSizes(
        short_px=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        long_px=1333,
    )
    published_images: ClassVar = "16,551 images of voc0712 trainval"

    reference: str
    precise_batches: int
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        self.check_settings(_SETTING)
        checks.one_of(f"{_SETTING}.reference", self.reference, REFERENCES)
        checks.whole(f"{_SETTING}.precise_batches", self.precise_batches)
        # The config leaves none to a training of one or two iterations.
        checks.wholes(f"{_SETTING}.milestones", self.milestones, may_be_empty=True)
        checks.increasing(f"{_SETTING}.milestones", self.milestones)

    def check(self, splits: Splits) -> None:
        """Checks that the images have objects, whose boxes are read as `reference` does.

        Raises:
            UsageError: their data set has none, or reads boxes as the other reference does.
            DataError: no image to train or to test on has an object that counts.
        """
        super().check(splits)
        for images in (splits.train, splits.held_out):
            self._check_reading(images)

    def _check_reading(self, images: ImageSet) -> None:
        """Checks that boxes are read as `reference` does. Raises `UsageError`."""
        reading = images.reading if isinstance(images, ObjectFolder) else None
        # The references differ in several things, of which a mixture was never published.
        if reading not in (None, self.reference):
            raise UsageError(
                f"{_SETTING}.data.source.reference is {reading}, and {_SETTING}.reference is "
                f"{self.reference}: give the second one alone, which sets both"
            )

    def schedule(self, length: int) -> Milestones:
        return Milestones(
            milestones=self.milestones,
            gamma=self.gamma,
            warmup=self.warmup,
            warmup_from=self.warmup_from,
        )

    def deviations(self, length: int) -> Iterator[str]:
        yield from super().deviations(length)
        milestones = in_proportion(_PUBLISHED_MILESTONES, _PUBLISHED_ITERATIONS, length)
        if list(self.milestones) != milestones:
            yield f"milestones {list(self.milestones)} instead of {milestones}"
        warmup = _PUBLISHED_WARMUP * length / _PUBLISHED_ITERATIONS
        if not math.isclose(self.warmup, warmup, rel_tol=_ROUNDING):
            yield f"warmup {self.warmup:g} instead of {warmup:g}"
        # The other reference makes no use of them.
        if self._is_detectron2 and self.precise_batches != _PUBLISHED_PRECISE_BATCHES:
            yield f"precise batches {self.precise_batches} instead of {_PUBLISHED_PRECISE_BATCHES}"

    @property
    def _is_detectron2(self) -> bool:
        return self.reference == "detectron2"

    @property
    def trains_difficult(self) -> bool:
        return self._is_detectron2

    def make_network(self, context: Context) -> nn.Module:
        # detectron2's RPN.BOUNDARY_THRESH of -1 keeps anchors that leave the image.
        rpn = RpnTraining(use_crossing_anchors=self._is_detectron2)
        settings = C4Settings(rpn=rpn)
        n_classes = len(context.splits.train.classes)
        return FasterRCNNC4(context.backbone, n_classes, settings, seed=context.seed)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        if not self._is_detectron2:
            return super().parameter_groups(network)
        # detectron2's WEIGHT_DECAY_NORM is 0.
        norm_parameters = []
        other_parameters = []
        for module in network.modules():
            own_parameters = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm):
                norm_parameters += own_parameters
            else:
                other_parameters += own_parameters
        return [
            {"params": other_parameters},
            {"params": norm_parameters, "weight_decay": 0.0},
        ]

    def of_image(self, found: Detections, image: AnnotatedImage) -> VocImage:
        return voc_image(found, image.objects)

    def boxes_of(self, value: VocImage) -> BoxesOfImage:
        return boxes_of_voc(value)

    def test(self, network: nn.Module, context: Context, *, final: bool) -> list[Score]:
        if self._is_detectron2:
            self._estimate_batch_norm(network, context)
        images = context.splits.held_out

        def compute(
            values: Sequence[VocImage],
        ) -> tuple[dict[str, tuple[str, float]], list[float]]:
            return self._precisions(values, len(images.classes))

        (precisions, ap50_by_class), n_tested = self.measure(network, context, compute, final=final)
        scores = []
        # Results are in percent, and average precisions in shares.
        for metric, (column, precision) in precisions.items():
            score = Score(
                table=_TABLE,
                column=column,
                variant="detectron2" if self._is_detectron2 else "",
                metric=metric,
                headline=metric == "ap50",
                value=100 * precision,
                n=n_tested,
                protocol="3.8",
                deviations=(
                    *self.image_differences(context.splits.train),
                    *self.test_differences(images, n_tested),
                ),
                details=tuple(self._test_details(context)),
            )
            scores.append(score)
        # They are too many for curves.
        if final:
            scores += scores_by_class(scores[0], "ap50", images.classes, ap50_by_class)
        return scores

    def _precisions(
        self, images: Sequence[VocImage], n_classes: int
    ) -> tuple[dict[str, tuple[str, float]], list[float]]:
        """Returns average precisions, from 0 to 1.

        For each metric its column in reports and its value, and AP50 of each class, which is nan
        for a class without true boxes.
        """
        definition = DETECTRON2 if self._is_detectron2 else MMDET
        table = average_precision(
            images,
            n_classes=n_classes,
            definition=definition,
            ious=AP_IOUS,
        )
        ap50_by_class = table[AP_IOUS.index(0.5)].tolist()
        by_iou = {}
        for iou, by_class in zip(AP_IOUS, table, strict=True):
            by_iou[iou] = mean_ap(by_class)
        mean_over_ious = sum(by_iou.values()) / len(by_iou)
        precisions = {
            "ap50": ("AP50", by_iou[0.5]),
            "ap": ("AP", mean_over_ious),
            "ap75": ("AP75", by_iou[0.75]),
        }
        if self._is_detectron2:
            return precisions, ap50_by_class
        # As mmdetection's code prints it: a share of three decimals.
        precisions["ap50"] = ("AP50", printed_ap(by_iou[0.5]))
        # No published row has AP50 by area, so it has no column.
        (by_area,) = average_precision(
            images,
            n_classes=n_classes,
            definition=MMDET_AREA,
        )
        precisions["ap50_area"] = ("", mean_ap(by_area))
        return precisions, ap50_by_class

    def _estimate_batch_norm(self, network: nn.Module, context: Context) -> None:
        """Replaces the statistics of batch norm by averages over the forwards of training batches.

        detectron2 calls it precise BN. The network is trained on nothing here.
        """
        norms = []
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                norms.append(module)
        # Running averages weigh the last batches most; here all batches count alike.
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's way to ask for the plain average of all batches
        # The loss is computed for its forward alone, by which the norms of the heads see regions.
        images = context.splits.train
        self.forward_training_batches(
            network,
            context,
            self.precise_batches,
            what=f"estimating batch norm on {images.name} {images.split}",
        )
        # The training may go on after this test, with its own momentum.
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _test_details(self, context: Context) -> Iterator[str]:
        images = context.splits.train
        n_trained = len(self.training_indices(images))
        yield f"trained on {n_trained} images of {images.name} {images.split}, {self.augment}"
        yield f"as {self.reference} does"
        if self._is_detectron2:
            yield f"batch norm estimated before the test in {self._precise_forwards()}"

    def _precise_forwards(self) -> str:
        """Returns how many forwards of how many images batch norm is estimated in."""
        n_forwards = self.precise_batches * self.forwards_in_step()
        text = f"{n_forwards} forwards of {self.forward_text()} images"
        n_processes = ranks.world_size()
        return f"{text} on each of {n_processes} processes" if n_processes > 1 else text
