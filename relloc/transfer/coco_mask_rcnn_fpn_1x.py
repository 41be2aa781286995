"""COCO: Mask R-CNN with a feature pyramid, fine-tuned for 12 epochs (docs/protocols.md 3.9).

The constants are those of mmselfsup 0.x's configs/benchmarks/mmdetection/coco/
mask_rcnn_r50_fpn_mstrain_1x_coco.py, with what it inherits from mmdetection 2.28.2.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import nn

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.errors import UsageError
from relloc.evaluation.contract import Context
from relloc.models.backbone import Backbone
from relloc.results import Score
from relloc.transfer import order
from relloc.transfer.detection.mask_rcnn import MaskRCNNFPN, MaskRcnnSettings, level_strides
from relloc.transfer.detection.samples import RandomSizes
from relloc.transfer.detection.training import AnnotatedImage, DetectionFineTuning
from relloc.transfer.detections import Detections
from relloc.transfer.metrics.box_confusion import BoxesOfImage
from relloc.transfer.metrics.coco_ap import CocoImage, Kind, coco_image, coco_scores
from relloc.transfer.metrics.more_scores import scores_by_class
from relloc.transfer.schedule import Milestones

_SETTING = "eval.coco_mask_rcnn_fpn_1x"
_TABLE = "COCO, Mask R-CNN FPN 1x"
# 12 epochs of 117,266 images, of which the last step of each orientation and epoch is filled up.
_PUBLISHED_ITERATIONS = 87_960
_PUBLISHED_MILESTONES = (8 / 12, 11 / 12)  # as shares of the training
# What COCO's statistics are compared by, and what that is called in metrics and columns.
_KINDS: tuple[tuple[Kind, str], ...] = (("boxes", "box"), ("masks", "mask"))
# COCO's statistics that are reported, as they end the names of metrics, and those of columns: the
# card has no columns for sizes of objects.
_STATISTICS = (
    ("AP", "ap", "AP"),
    ("AP50", "ap50", "AP50"),
    ("AP75", "ap75", "AP75"),
    ("AP_small", "ap_small", ""),
    ("AP_medium", "ap_medium", ""),
    ("AP_large", "ap_large", ""),
)


class ImageOfId(NamedTuple):
    """What the metric needs of an image, with its id: images count in the order of ids."""

    image_id: int
    image: CocoImage


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoPrecisions:
    """Average precisions, from 0 to 1.

    Attributes:
        of_all: for each metric its column in reports and its value.
        by_class: for each metric its value of each class; nan for a class without true objects.
    """

    of_all: dict[str, tuple[str, float]]
    by_class: dict[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoMaskRcnnFpn1x(DetectionFineTuning[ImageOfId]):
    """Average precision of boxes and masks of Mask R-CNN on COCO, after fine-tuning all weights.

    Attributes:
        iterations: None for those that `epochs` have, of the images that are trained on.
        epochs: how long the published training is.
        milestone_epochs: its milestones. They and the warm-up, which is that of 87,960 iterations,
            are in proportion to the length of the training.

    Raises:
        UsageError: a setting is out of range.
    """

    # 1: images came from an endless stream, and masks were not padded beside their images
    # 2: objects of test images that can't be read did not count
    version = 3
    masks = True
    # mmdetection trains for epochs here, and for iterations on VOC.
    deal = staticmethod(order.steps_by_epochs)
    published: ClassVar = {
        "iterations": _PUBLISHED_ITERATIONS,
        "batch": 16,
        "images_per_gpu": 2,
        "learning_rate": 0.02,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "gamma": 0.1,
        "warmup": 1000,
        "warmup_from": 0.001,
    }
    published_augment: ClassVar = RandomSizes(
        short_px=[640, 672, 704, 736, 768, 800],
        long_px=1333,
    )
    published_images: ClassVar = "117,266 images of coco2017 train"

    epochs: int
    milestone_epochs: Sequence[int]

    def __post_init__(self) -> None:
        self.check_settings(_SETTING)
        checks.wholes(f"{_SETTING}.milestone_epochs", self.milestone_epochs)
        checks.increasing(f"{_SETTING}.milestone_epochs", self.milestone_epochs)

    def check_length(self, setting: str) -> None:
        checks.whole(f"{setting}.epochs", self.epochs)
        if self.iterations is not None:
            super().check_length(setting)

    def length(self, images: ImageSet) -> int:
        if self.iterations is not None:
            return self.iterations
        steps_per_epoch = order.steps_in_epoch(
            self.training_indices(images),
            lambda index: self.kind_of(images, index),
            self.batch,
        )
        return self.epochs * steps_per_epoch

    def schedule(self, length: int) -> Milestones:
        milestones = []
        for epoch in self.milestone_epochs:
            milestones.append(epoch * length / self.epochs)
        return Milestones(
            milestones=milestones,
            gamma=self.gamma,
            warmup=self.warmup * length / _PUBLISHED_ITERATIONS,
            warmup_from=self.warmup_from,
        )

    def check_network(self, backbone: Backbone) -> None:
        strides = level_strides(backbone)
        expected = [strides[0] * 2**number for number in range(len(strides))]
        if backbone.own_strides and strides != expected:
            raise UsageError(
                f"{_SETTING}: with {backbone.own_strides} the maps of the network have strides of "
                f"{', '.join(map(str, strides))} px, and those of a feature pyramid double from "
                "one to the next: give strides=standard"
            )

    def make_network(self, context: Context) -> nn.Module:
        settings = MaskRcnnSettings()
        n_classes = len(context.splits.train.classes)
        return MaskRCNNFPN(context.backbone, n_classes, settings, seed=context.seed)

    def of_image(self, found: Detections, image: AnnotatedImage) -> ImageOfId:
        measured = coco_image(found, image.objects, image.size)
        return ImageOfId(image.image_id, measured)

    def boxes_of(self, value: ImageOfId) -> BoxesOfImage:
        image = value.image
        return BoxesOfImage(
            found_boxes=_corners(image.found_boxes),
            found_scores=image.found_scores,
            found_classes=image.found_classes,
            true_boxes=_corners(image.true_boxes),
            true_classes=image.true_classes,
            # COCO marks no object as difficult.
            difficult=np.zeros(len(image.true_classes), dtype=bool),
            crowd=image.crowd,
        )

    def test(self, network: nn.Module, context: Context, *, final: bool) -> list[Score]:
        n_trained = len(self.training_indices(context.splits.train))
        images = context.splits.held_out

        def compute(values: Sequence[ImageOfId]) -> CocoPrecisions:
            return _precisions(values, len(images.classes))

        precisions, n_tested = self.measure(network, context, compute, final=final)
        scores = []
        for metric, (column, precision) in precisions.of_all.items():
            score = Score(
                table=_TABLE,
                column=column,
                metric=metric,
                headline=metric == "box_ap",
                value=100 * precision,
                n=n_tested,
                protocol="3.9",
                deviations=(
                    *self.image_differences(context.splits.train),
                    *self.test_differences(images, n_tested),
                ),
                details=(f"trained on {n_trained:,} images, {self.augment}",),
            )
            scores.append(score)
        # They are too many for curves.
        if final:
            for metric, values in precisions.by_class.items():
                scores += scores_by_class(scores[0], metric, images.classes, values)
        return scores

    def deviations(self, length: int) -> Iterator[str]:
        yield from super().deviations(length)
        shares = tuple(epoch / self.epochs for epoch in self.milestone_epochs)
        if shares != _PUBLISHED_MILESTONES:
            epochs = ", ".join(map(str, self.milestone_epochs))
            yield f"milestones at epochs {epochs} of {self.epochs} instead of 8, 11 of 12"


def _corners(xywh: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Returns boxes of x, y, width and height as x1 y1 x2 y2."""
    upper_left = xywh[:, :2]
    sides = xywh[:, 2:]
    return np.concatenate([upper_left, upper_left + sides], axis=1)


def _precisions(values: Sequence[ImageOfId], n_classes: int) -> CocoPrecisions:
    """Returns average precisions. Metrics of sizes that no true object has are left out."""
    by_id = sorted(values, key=lambda value: value.image_id)
    images = [value.image for value in by_id]
    of_all = {}
    by_class = {}
    for kind, name in _KINDS:
        scores = coco_scores(images, kind, n_classes=n_classes)
        for statistic, ending, column in _STATISTICS:
            value = scores.statistics[statistic]
            if not math.isnan(value):
                of_all[f"{name}_{ending}"] = (column and f"{name} {column}", value)
        by_class[f"{name}_ap"] = scores.by_class.tolist()
    return CocoPrecisions(of_all=of_all, by_class=by_class)
