"""VOC2007 detection by Fast R-CNN on given proposals (docs/protocols.md 3.16).

The constants are those of the project fast-rcnn (rbgirshick/fast-rcnn at commit e107cae) with its
CaffeNet. Later papers of networks like AlexNet use that code; how long they trained, and with which
head, is not known. The network and its rescaling are those of the fine-tuned classification (3.15).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from relloc import checks
from relloc.data.annotations import ObjectImages, ProposedImages
from relloc.data.image_set import ImageSet, Splits
from relloc.data.samples import MakeSample
from relloc.data.views import RandomSquare, View, check_view
from relloc.errors import UsageError
from relloc.evaluation.contract import Context
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import Backbone
from relloc.results import Score
from relloc.transfer.alexnet import FineTunedAlexNet
from relloc.transfer.detection.batch import pad_images
from relloc.transfer.detection.fast_rcnn import (
    FastRcnn,
    alexnet_fast_rcnn,
    region_calibration_forward,
    staged_fast_rcnn,
)
from relloc.transfer.detection.given_proposals import (
    NO_MULTIPLE,
    MakeRegionSample,
    MirroredToo,
    RegionBatch,
    RegionSample,
    scales_to,
    target_statistics,
    to_region_batch,
)
from relloc.transfer.detection.samples import prepared
from relloc.transfer.detection.training import (
    AnnotatedImage,
    DetectionFineTuning,
    TestImage,
    annotation,
)
from relloc.transfer.detections import Detections
from relloc.transfer.iterations import ForwardSamples
from relloc.transfer.metrics.box_confusion import BoxesOfImage, boxes_of_voc
from relloc.transfer.metrics.more_scores import scores_beside, scores_by_class
from relloc.transfer.metrics.voc_ap import (
    MMDET,
    MMDET_AREA,
    VocImage,
    average_precision,
    mean_ap,
    voc_image,
)
from relloc.transfer.rescaled_alexnet import (
    n_rescaling_images,
    rescale_for_fine_tuning,
    rescales,
)
from relloc.transfer.resize import FittedImage
from relloc.transfer.same_settings import same_settings
from relloc.transfer.schedule import Milestones, in_proportion

_TABLE = "Detection, VOC07 protocol of AlexNet-like networks, mAP"
_COLUMN = "Fast R-CNN"
# The prototxt has lr_mult 2 and decay_mult 0 for all biases.
_BIAS_RATE = 2
_BIAS_DECAY = 0.0
# In iterations of the published training; others have them in proportion.
_PUBLISHED_ITERATIONS = 40_000
_PUBLISHED_MILESTONES = (30_000,)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProposedTestImage(TestImage):
    """An image to test on, with its proposals in pixels of the image, corners included."""

    proposals: Float32[np.ndarray, "n 4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeProposedTestImage:
    """Reads images to test on, in worker processes."""

    images: ProposedImages

    def __call__(self, index: int, seed: int) -> ProposedTestImage:
        pixels = np.array(self.images.read(index))  # a copy that torch may write to
        return ProposedTestImage(
            **annotation(self.images, index),
            pixels=pixels,
            proposals=self.images.proposals(index),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07FastRcnn(DetectionFineTuning[VocImage]):
    """mAP of Fast R-CNN on PASCAL VOC 2007, after fine-tuning all layers but the first.

    Attributes:
        augment: size of training images. Each is also trained on as its mirror image.
        rescale: whether layers are rescaled by data first; None where that is defined, which is for
            the AlexNet-like network: one with batch norm has no such scales.
        rescaling_view: views of training images by which layers are rescaled.
        milestones, gamma: the rate is multiplied by `gamma` at each of these iterations.

    Raises:
        UsageError: a setting is out of range.
    """

    version = 1
    calibration_version = 1  # 0: fc6 was recalibrated by its embedding
    setting: ClassVar = "eval.voc07_fast_rcnn"
    published: ClassVar = {
        "iterations": _PUBLISHED_ITERATIONS,
        "batch": 2,
        "images_per_gpu": 2,
        "learning_rate": 0.001,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "gamma": 0.1,
    }
    published_augment: ClassVar = FittedImage(box=[1000, 600])
    published_view: ClassVar = FittedImage(box=[1000, 600])
    published_rescaling_view: ClassVar = RandomSquare(crop_px=227)
    published_images: ClassVar = "5,011 images of voc2007 trainval"

    augment: FittedImage
    # There is no warm-up.
    warmup: float = dataclasses.field(default=0, init=False)
    warmup_from: float = dataclasses.field(default=1, init=False)
    rescale: bool | None
    rescaling_view: View
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        self.check_settings(self.setting)
        checks.one_of(f"{self.setting}.rescale", self.rescale, (None, True, False))
        check_view(f"{self.setting}.rescaling_view", self.rescaling_view)
        checks.wholes(f"{self.setting}.milestones", self.milestones, may_be_empty=True)
        checks.increasing(f"{self.setting}.milestones", self.milestones)

    @property
    def trains_difficult(self) -> bool:
        return True

    def check(self, splits: Splits) -> None:
        """Checks that the images have objects and proposals.

        Raises:
            UsageError: their data set has none.
            DataError: no image to train or to test on has an object that counts.
        """
        for images in (splits.train, splits.held_out):
            if not isinstance(images, ProposedImages):
                raise UsageError(
                    f"{self.setting}: {images.name} has no proposals, which Fast R-CNN classifies: "
                    "give a data set that has them, such as voc2007_proposals"
                )
        super().check(splits)

    def schedule(self, length: int) -> Milestones:
        return Milestones(milestones=self.milestones, gamma=self.gamma)

    def training_images(self, images: ImageSet) -> MirroredToo:
        return MirroredToo(_with_proposals(images))

    def kind_of(self, images: ImageSet, index: int) -> None:
        # Wide and high images share a batch in fast-rcnn.
        return None

    def make_sample(self, images: ImageSet) -> MakeRegionSample:
        return MakeRegionSample(images=_with_proposals(images), augment=self.augment)

    def make_test_image(self, images: ObjectImages) -> MakeSample[TestImage]:
        return MakeProposedTestImage(images=_with_proposals(images))

    def make_network(self, context: Context) -> nn.Module:
        """Returns the network, rescaled if that is asked for.

        Raises:
            UsageError: a network with batch norm is to be rescaled, or its layers can't be.
        """
        backbone = context.backbone
        is_rescaled = rescales(self.rescale, backbone, self.setting)
        images = self.training_images(context.splits.train)
        means, stds = target_statistics(images, self.training_indices(images))
        settings: dict[str, Any] = {
            "means": means,
            "stds": stds,
            "seed": context.seed,
        }
        if not isinstance(backbone, AlexNetBackbone):
            return staged_fast_rcnn(backbone, **settings)
        # Rescaled as a classifier of whole images, which is what magic_init.py is given.
        n_classes = len(context.splits.train.classes)
        classifier = FineTunedAlexNet(backbone, n_classes, seed=context.seed)
        if is_rescaled:
            classifier = classifier.to(context.device)
            rescale_for_fine_tuning(classifier, self.rescaling_view, context)
        return alexnet_fast_rcnn(classifier, **settings)

    def calibration_input(self, batch: RegionBatch) -> RegionBatch:
        return batch

    def calibration_forward(self, backbone: Backbone) -> Callable[[RegionBatch], Any]:
        return region_calibration_forward(backbone)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        first_stage = _fast_rcnn(network).first_stage
        left_out = {id(parameter) for parameter in first_stage.parameters()}
        weights, biases = [], []
        for module in network.modules():
            is_layer = isinstance(module, nn.Conv2d | nn.Linear)
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in left_out:
                    (biases if is_layer and name == "bias" else weights).append(parameter)
        fast_rate = _BIAS_RATE * self.learning_rate
        return [
            {"params": weights},
            {"params": biases, "lr": fast_rate, "weight_decay": _BIAS_DECAY},
        ]

    def batch_of(self, forward: ForwardSamples[RegionSample], device: torch.device) -> RegionBatch:
        return to_region_batch(forward.samples, forward.groups, device)

    def before_forward(self, network: nn.Module) -> None:
        # Of a stage that is not trained, batch norm must not move either.
        _fast_rcnn(network).first_stage.eval()

    def loss(self, network: nn.Module, batch: RegionBatch) -> Tensor:
        losses = _fast_rcnn(network).losses(batch)
        return torch.stack(list(losses.values())).sum()

    @torch.no_grad()
    def detect(
        self, network: nn.Module, images: Sequence[TestImage], context: Context
    ) -> Iterator[Detections]:
        proposed = [cast(ProposedTestImage, image) for image in images]
        original_size = images[0].pixels.shape[:2]
        size = self.view.size(*original_size)
        sizes = [size] * len(images)
        resized = prepared([image.pixels for image in images], sizes, context.device)
        scales = scales_to(size, original_size)
        regions = []
        proposals = []
        for image in proposed:
            regions.append(torch.from_numpy(image.proposals * scales).to(context.device))
            proposals.append(torch.from_numpy(image.proposals).to(context.device))
        bf16 = context.encode_config.bf16
        with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
            yield from _fast_rcnn(network).detect(
                pad_images(resized, NO_MULTIPLE),
                regions,
                proposals,
                [original_size] * len(images),
            )

    def of_image(self, found: Detections, image: AnnotatedImage) -> VocImage:
        return voc_image(found, image.objects)

    def boxes_of(self, value: VocImage) -> BoxesOfImage:
        return boxes_of_voc(value)

    def test(self, network: nn.Module, context: Context, *, final: bool) -> list[Score]:
        images = context.splits.held_out

        def compute(values: Sequence[VocImage]) -> tuple[dict[str, float], list[float]]:
            return _precisions(values, len(images.classes))

        (precisions, by_class), n_tested = self.measure(network, context, compute, final=final)
        rescaled = rescales(self.rescale, context.backbone, self.setting)
        headline = Score(
            table=_TABLE,
            column=_COLUMN,
            variant="rescaled" if rescaled else "",
            metric="map",
            headline=True,
            value=100 * precisions.pop("map"),
            n=n_tested,
            protocol="3.16",
            deviations=(
                *self._own_deviations(context, rescaled),
                *self.test_differences(images, n_tested),
            ),
            details=tuple(self._own_details(context, rescaled)),
        )
        scores = [headline, *scores_beside(headline, precisions)]
        # They are too many for curves.
        if final:
            scores += scores_by_class(headline, "ap", images.classes, by_class)
        return scores

    def deviations(self, length: int) -> Iterator[str]:
        yield from super().deviations(length)
        milestones = in_proportion(_PUBLISHED_MILESTONES, _PUBLISHED_ITERATIONS, length)
        if list(self.milestones) != milestones:
            yield f"milestones {list(self.milestones)} instead of {milestones}"

    def _own_deviations(self, context: Context, rescaled: bool) -> Iterator[str]:
        """Yields what differs from the published protocol beside the constants of the training."""
        if isinstance(context.backbone, AlexNetBackbone):
            yield (
                "head of the paper's detector, as head and iterations of the published rows are "
                "not known"
            )
        else:
            yield "regions of the fourth stage, and the fifth in place of fc6 and fc7"
        yield from self.image_differences(context.splits.train)
        is_published = same_settings(self.rescaling_view, self.published_rescaling_view)
        if rescaled and not is_published:
            yield f"rescaled by {self.rescaling_view} instead of {self.published_rescaling_view}"

    def _own_details(self, context: Context, rescaled: bool) -> Iterator[str]:
        images = context.splits.train
        n_trained = len(self.training_indices(images))
        yield (
            f"trained on {n_trained} images of {images.name} {images.split} and their mirror "
            f"images, {self.augment}"
        )
        yield "all layers but the first stage trained"
        yield "proposals of selective search"
        if rescaled:
            yield f"rescaled by views of {n_rescaling_images(images)} training images"


def _precisions(images: Sequence[VocImage], n_classes: int) -> tuple[dict[str, float], list[float]]:
    """Returns mAP by its metric's name, and the average precision of each class, from 0 to 1.

    Boxes include the pixels of both corners. `map` is VOC's definition of 2007, of 11 points, which
    fast-rcnn uses for the images of 2007; `map_area` that since 2010. Of classes it is the former,
    which is nan for a class without true boxes.
    """
    (by_class,) = average_precision(images, n_classes=n_classes, definition=MMDET)
    (by_area,) = average_precision(images, n_classes=n_classes, definition=MMDET_AREA)
    return {"map": mean_ap(by_class), "map_area": mean_ap(by_area)}, by_class.tolist()


def _with_proposals(images: ImageSet) -> ProposedImages:
    """Returns the images as the type that `check` has found them to be."""
    if not isinstance(images, ProposedImages):
        raise TypeError(f"{images.name} {images.split} has no proposals")
    return images


def _fast_rcnn(network: nn.Module) -> FastRcnn:
    if not isinstance(network, FastRcnn):
        raise TypeError(f"{type(network).__name__} is no network of this evaluation")
    return network
