"""VOC2007 classification, fine-tuned as Krähenbühl et al. 2015 do (docs/protocols.md 3.15).

The constants are those of the authors' code, philkr/voc-classification, src/train_cls.py at commit
c209779, and of the data layer that it reads images with (caffe's TransformationLayer in the branch
transforming_fast_hdf5). Later papers of networks like AlexNet use the same code.
"""

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from relloc import checks
from relloc.data.image_set import ImageSet, Splits
from relloc.data.lists import DIFFICULT, THERE, MultiLabeled
from relloc.data.views import RandomSquare, View, check_view
from relloc.errors import DataError, UsageError
from relloc.evaluation.average_precision import ap_area, ap_steps
from relloc.evaluation.contract import Context
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import Backbone
from relloc.patches.normalize import ByDataset
from relloc.results import Score
from relloc.transfer.alexnet import FineTunedAlexNet, calibration_forward
from relloc.transfer.classifier import Classifier
from relloc.transfer.dropout import dropout_seeds
from relloc.transfer.iterations import (
    ForwardSamples,
    IterativeFineTuning,
    left_out_of_test,
)
from relloc.transfer.metrics.class_answers import (
    draw_ap_by_class,
    draw_examples,
    strongest_answers,
)
from relloc.transfer.metrics.more_scores import scores_beside
from relloc.transfer.metrics.per_image import PerImage
from relloc.transfer.rescaled_alexnet import (
    n_rescaling_images,
    rescale_for_fine_tuning,
    rescales,
)
from relloc.transfer.same_settings import same_settings
from relloc.transfer.schedule import Milestones, in_proportion

TRAINED = ("fc6-8", "all layers")
_TABLE = "Classification, VOC07 fine-tuned, mAP"
# Biases of the layer that train_cls.py adds.
_NEW_BIAS = 0.1
# train_cls.py has `setLR(t, 1, 2)`: biases learn at twice the rate of weights.
_BIAS_RATE = 2
# In iterations of the published training; others have them in proportion.
_PUBLISHED_ITERATIONS = 80_000
_PUBLISHED_MILESTONES = (10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 70_000)
# Convolutions ask for some height and width, also of no images.
_SIDE_OF_NO_IMAGES = 227

Presence = Int[np.ndarray, "n classes"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ViewSample:
    """A view of an image, for each class whether the image shows it, and the seed of the view."""

    pixels: UInt8[np.ndarray, "s s 3"]
    presence: Int[np.ndarray, "classes"]
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ViewBatch:
    """Normalized views, what they show, and the seeds of dropout (`relloc.transfer.dropout`)."""

    images: Float[Tensor, "b 3 s s"]
    presence: Int[Tensor, "b classes"]
    seeds: Int[Tensor, "b"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CropsOfImage:
    """Random views of an image, and its number in the split."""

    index: int
    pixels: UInt8[np.ndarray, "crops s s 3"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MakeView:
    """Makes training samples, in worker processes."""

    images: ImageSet
    presence: Presence
    view: View

    def __call__(self, index: int, seed: int) -> ViewSample:
        pixels = self.view(self.images.read(index), random.Random(seed))
        return ViewSample(pixels=pixels, presence=self.presence[index], seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MakeCrops:
    """Makes the views of an image that it is tested on, in worker processes."""

    images: ImageSet
    view: View
    crops: int

    def __call__(self, index: int, seed: int) -> CropsOfImage:
        image = self.images.read(index)
        rng = random.Random(seed)
        crops = [self.view(image, rng) for _ in range(self.crops)]
        return CropsOfImage(index=index, pixels=np.stack(crops))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07Finetune(IterativeFineTuning):
    """mAP of multi-label classification on PASCAL VOC 2007, after fine-tuning.

    Attributes:
        trained: "fc6-8", the layers behind pool5, or "all layers". A backbone that is not the
            AlexNet-like one has one linear layer on its average pool in place of fc6 to fc8.
        rescale: whether layers are rescaled by data first; None where that is defined, which is for
            the AlexNet-like network: one with batch norm has no such scales.
        view: random views of `crop_px` pixels, to train and to test on.
        crops: views of each test image, whose answers are averaged.
        clip_norm: the largest norm of the gradient of a step.
        milestones, gamma: the rate is multiplied by `gamma` at each of these iterations.

    Raises:
        UsageError: a setting is out of range.
    """

    labels = "presence"
    one_size = True
    version = 2  # 1: dropout was drawn by forward
    calibration_version = 1  # 0: fc6 was recalibrated by its embedding
    setting: ClassVar = "eval.voc07_finetune"
    published: ClassVar = {
        "iterations": _PUBLISHED_ITERATIONS,
        "batch": 16,
        "learning_rate": 0.001,
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "clip_norm": 10,
        "gamma": 0.5,
        "crops": 10,
    }

    published_view: ClassVar = RandomSquare(crop_px=227)
    published_images: ClassVar = "5,011 images of voc2007 trainval"

    # Losses and batch norm know no groups of images: each image is one.
    images_per_gpu: int = dataclasses.field(default=1, init=False)
    trained: str
    rescale: bool | None
    view: View
    crops: int
    clip_norm: float
    milestones: Sequence[int]
    gamma: float

    def __post_init__(self) -> None:
        self.check_settings(self.setting)
        checks.one_of(f"{self.setting}.trained", self.trained, TRAINED)
        checks.one_of(f"{self.setting}.rescale", self.rescale, (None, True, False))
        check_view(f"{self.setting}.view", self.view)
        checks.whole(f"{self.setting}.crops", self.crops)
        checks.number(f"{self.setting}.clip_norm", self.clip_norm, above=0)
        checks.wholes(f"{self.setting}.milestones", self.milestones, may_be_empty=True)
        checks.increasing(f"{self.setting}.milestones", self.milestones)
        checks.number(f"{self.setting}.gamma", self.gamma, above=0, at_most=1)

    def check(self, splits: Splits) -> None:
        """Checks that some class can be trained and tested.

        Raises:
            UsageError: there is no such class, or no image to train on.
        """
        super().check(splits)
        if not usable_classes(splits).any():
            raise UsageError(
                f"{self.setting}: no class has images to train on, with it and without it, and an "
                "image with it to be tested on: give more images"
            )

    def schedule(self, length: int) -> Milestones:
        return Milestones(milestones=self.milestones, gamma=self.gamma)

    def training_indices(self, images: ImageSet) -> Sequence[int]:
        return range(len(images))

    def make_sample(self, images: ImageSet) -> MakeView:
        return MakeView(images=images, presence=presence_of(images), view=self.view)

    def make_network(self, context: Context) -> nn.Module:
        """Returns the network, rescaled if that is asked for.

        Raises:
            UsageError: a network with batch norm is to be rescaled, or its layers can't be.
        """
        backbone = context.backbone
        n_classes = len(context.splits.train.classes)
        is_rescaled = rescales(self.rescale, backbone, self.setting)
        if isinstance(backbone, AlexNetBackbone):
            network = FineTunedAlexNet(backbone, n_classes, seed=context.seed)
            network = network.to(context.device)
            if is_rescaled:
                rescale_for_fine_tuning(network, self.view, context)
            return network
        network = Classifier(copy.deepcopy(backbone), n_classes, seed=context.seed)
        nn.init.constant_(network.head.bias, _NEW_BIAS)
        return network

    def calibration_forward(self, backbone: Backbone) -> Callable[[Tensor], Any]:
        return calibration_forward(backbone)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        trained = network if self.trained == "all layers" else _head(network)
        weights, biases = [], []
        for module in trained.modules():
            is_layer = isinstance(module, nn.Conv2d | nn.Linear)
            for name, parameter in module.named_parameters(recurse=False):
                (biases if is_layer and name == "bias" else weights).append(parameter)
        fast_rate = _BIAS_RATE * self.learning_rate
        return [{"params": weights}, {"params": biases, "lr": fast_rate}]

    def gradient_limit(self) -> float:
        return self.clip_norm

    def batch_of(self, forward: ForwardSamples[ViewSample], device: torch.device) -> ViewBatch:
        samples = forward.samples
        pixels = np.zeros((0, _SIDE_OF_NO_IMAGES, _SIDE_OF_NO_IMAGES, 3), dtype=np.uint8)
        presence = np.zeros((0, 1), dtype=np.int64)  # beside any number of classes
        if samples:
            pixels = np.stack([sample.pixels for sample in samples])
            presence = np.stack([sample.presence for sample in samples])
        return ViewBatch(
            images=_normalized(pixels, device),
            presence=torch.from_numpy(presence).to(device),
            seeds=dropout_seeds([sample.seed for sample in samples], device),
        )

    def before_forward(self, network: nn.Module) -> None:
        if self.trained == "fc6-8":
            # Of layers that are not trained, batch norm must not move either.
            _trunk(network).eval()

    def loss(self, network: nn.Module, batch: ViewBatch) -> Float[Tensor, ""]:
        """Returns the binary cross-entropy, summed over classes, as a mean over images.

        A class that is marked as difficult in an image does not count there.
        """
        if isinstance(network, FineTunedAlexNet):
            logits = network(batch.images, batch.seeds)
        else:
            logits = network(batch.images)
        return multi_label_loss(logits.float(), batch.presence)

    def test(self, network: nn.Module, context: Context, *, final: bool) -> list[Score]:
        answers = self._answers(network, context)
        classes = usable_classes(context.splits)
        presence = torch.from_numpy(presence_of(context.splits.held_out))

        def precisions(of_images: Sequence[tuple[int, Tensor]]) -> tuple[int, dict[str, float]]:
            indices = [index for index, _ in of_images]
            logits = torch.stack([logits for _, logits in of_images])
            if final and indices:
                self._draw(context, indices, logits)
            return len(indices), self._precisions(
                logits[:, :, classes], presence[indices][:, classes]
            )

        n_images, values = answers.evaluate(precisions)
        rescaled = rescales(self.rescale, context.backbone, self.setting)
        headline = Score(
            table=_TABLE,
            column=self.trained,
            variant="rescaled" if rescaled else "",
            metric="map",
            headline=True,
            value=100 * values.pop("map"),
            n=n_images,
            protocol="3.15",
            deviations=(
                *self._own_deviations(context, classes),
                *left_out_of_test(context.splits.held_out, n_images),
            ),
            details=tuple(self._own_details(context, rescaled)),
        )
        return [headline, *scores_beside(headline, values)]

    @torch.no_grad()
    def _answers(self, network: nn.Module, context: Context) -> PerImage[tuple[int, Tensor]]:
        """Returns the logits (crops x classes) of this process's part of the held-out images."""
        network.eval()
        make = MakeCrops(images=context.splits.held_out, view=self.view, crops=self.crops)
        bf16 = context.encode_config.bf16
        answers: PerImage[tuple[int, Tensor]] = PerImage()
        for samples in self.read_held_out(context, make, doing="classifying", batch=self.batch):
            pixels = np.concatenate([sample.pixels for sample in samples])
            with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
                logits = network(_normalized(pixels, context.device))
            by_image = logits.float().cpu().split(self.crops)
            for sample, of_crops in zip(samples, by_image, strict=True):
                answers.add(sample.index, (sample.index, of_crops.clone()))
        return answers

    def _precisions(
        self, logits: Float[Tensor, "n crops c"], presence: Int[Tensor, "n c"]
    ) -> dict[str, float]:
        """Returns mAP from 0 to 1, by its metric's name. Classes are those that can be tested."""
        if not len(logits):
            raise DataError("none of the images to test on can be read, so mAP has no value")
        positive, counted = presence == THERE, presence != DIFFICULT
        answers = logits.double().mean(dim=1)
        return {
            "map": float(ap_steps(answers, positive, counted).nanmean()),
            # As VOC's own development kit computes it since 2010.
            "map_area": float(ap_area(answers, positive, counted).nanmean()),
            # The code also prints the result of a single view.
            "map_1crop": float(ap_steps(logits[:, 0].double(), positive, counted).nanmean()),
        }

    def _draw(
        self, context: Context, indices: Sequence[int], logits: Float[Tensor, "n crops c"]
    ) -> None:
        """Draws the average precision of each class, and the strongest right and wrong answers.

        `indices` are the numbers of the images that were read.
        """
        images = context.splits.held_out
        presence = torch.from_numpy(presence_of(images)[np.array(indices)])
        positive, counted = presence == THERE, presence != DIFFICULT
        answers = logits.double().mean(dim=1)
        by_class = ap_steps(answers, positive, counted).tolist()
        probabilities = answers.sigmoid().numpy()
        is_usable = usable_classes(context.splits).tolist()
        precisions, counts, examples = {}, {}, {}
        for number, name in enumerate(images.classes):
            # A class without training images has no answers worth showing. One of which no image
            # could be read has no average precision.
            if not is_usable[number] or math.isnan(by_class[number]):
                continue
            precisions[name] = by_class[number]
            counts[name] = int(positive[:, number].sum())
            examples[name] = strongest_answers(
                probabilities[:, number],
                positive[:, number].numpy(),
                counted[:, number].numpy(),
                indices,
            )
        if not precisions:
            return
        mean = 100 * sum(precisions.values()) / len(precisions)
        title = f"{images.name} {images.split}, {self.trained} trained"
        draw_ap_by_class(
            precisions,
            counts,
            context.folder / "ap_by_class.png",
            title=f"{title}: mAP {mean:.2f} %",
        )
        draw_examples(
            examples,
            images,
            context.folder / "examples.png",
            title=f"{title}: strongest answers, with the probability of the class",
        )

    def deviations(self, length: int) -> Iterator[str]:
        yield from super().deviations(length)
        milestones = in_proportion(_PUBLISHED_MILESTONES, _PUBLISHED_ITERATIONS, length)
        if list(self.milestones) != milestones:
            yield f"milestones {list(self.milestones)} instead of {milestones}"

    def _own_deviations(self, context: Context, classes: Bool[Tensor, "all"]) -> Iterator[str]:
        """Yields what differs from the published protocol beside the constants of the training."""
        if isinstance(context.backbone, AlexNetBackbone):
            yield "head of the paper's detector, as that of the published rows is not known"
        else:
            yield "a linear layer on the average pool in place of fc6 to fc8"
        train = context.splits.train
        images = f"{len(train):,} images of {train.name} {train.split}"
        if images != self.published_images:
            yield f"trained on {images} instead of {self.published_images}"
        if not same_settings(self.view, self.published_view):
            yield f"{self.view} instead of {self.published_view}"
        missing = []
        for name, is_usable in zip(context.splits.train.classes, classes.tolist(), strict=True):
            if not is_usable:
                missing.append(name)
        if missing:
            yield f"without {', '.join(missing)} (no positive image to train on or to test on)"

    def _own_details(self, context: Context, rescaled: bool) -> Iterator[str]:
        images = context.splits.train
        yield f"trained on {len(images)} images of {images.name} {images.split}, {self.view}"
        yield f"{self.trained} trained"
        yield f"mean of {self.crops} random crops"
        if rescaled:
            yield f"rescaled by views of {n_rescaling_images(images)} training images"


def presence_of(images: ImageSet) -> Presence:
    """Returns for each image and class whether it is there: 1, 0 (difficult) or -1."""
    if not isinstance(images, MultiLabeled):
        raise TypeError(f"{images.name} {images.split} does not say which classes are in an image")
    return np.array(images.presence(), dtype=np.int64)


def usable_classes(splits: Splits) -> Bool[Tensor, "classes"]:
    """Returns of each class whether training images are with it and without it, and a test image.

    A test image has to show the class, as its average precision has no value otherwise.
    """
    in_train = torch.from_numpy(presence_of(splits.train)) == THERE
    in_test = torch.from_numpy(presence_of(splits.held_out)) == THERE
    return in_train.any(dim=0) & ~in_train.all(dim=0) & in_test.any(dim=0)


def multi_label_loss(
    logits: Float[Tensor, "n classes"], presence: Int[Tensor, "n #classes"]
) -> Float[Tensor, ""]:
    """Returns the binary cross-entropy without difficult classes: a sum over classes, mean over n.

    Of no images it is NaN, but its gradients are zero; their `presence` may have one column.
    """
    targets = (presence == THERE).to(logits.dtype).expand_as(logits)
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * (presence != DIFFICULT)).sum() / len(logits)


def _normalized(pixels: UInt8[np.ndarray, "n s s 3"], device: torch.device) -> Tensor:
    """Returns images (n 3 s s) on the device, as networks take them."""
    images = torch.from_numpy(pixels).to(device, non_blocking=True)
    return ByDataset()(images.permute(0, 3, 1, 2).float())


def _trunk(network: nn.Module) -> nn.Module:
    if isinstance(network, FineTunedAlexNet):
        return network.trunk
    return _as_classifier(network).backbone


def _head(network: nn.Module) -> nn.Module:
    if isinstance(network, FineTunedAlexNet):
        return network.head
    return _as_classifier(network).head


def _as_classifier(network: nn.Module) -> Classifier:
    if not isinstance(network, Classifier):
        raise TypeError(f"{type(network).__name__} is no network of this evaluation")
    return network
