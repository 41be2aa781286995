"""Base class of the evaluations that fine-tune a fully convolutional network on class maps."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc import checks, ranks
from relloc.data.annotations import SegmentedImages
from relloc.data.image_set import ImageSet, Splits
from relloc.data.samples import MakeSample
from relloc.data.subsets import evenly_spaced
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import Context
from relloc.results import Score
from relloc.transfer.iterations import (
    ForwardSamples,
    IterativeFineTuning,
    left_out_of_test,
)
from relloc.transfer.metrics.class_confusion import save_class_confusion
from relloc.transfer.metrics.mean_iou import SegmentationMetric, SegmentationScores
from relloc.transfer.metrics.more_scores import scores_beside, scores_by_class
from relloc.transfer.metrics.pictures import draw_class_maps
from relloc.transfer.same_settings import same_settings
from relloc.transfer.schedule import Poly, Schedule
from relloc.transfer.segmentation.batch import SegmentationBatch
from relloc.transfer.segmentation.fcn import FullyConvolutionalNetwork
from relloc.transfer.segmentation.inference import SlidingWindows, WholeImage
from relloc.transfer.segmentation.samples import MakeCrop, MakeTested, TestedImage
from relloc.transfer.segmentation.transforms import CropSample, TrainingCrops

# Held-out images whose class maps are drawn beside the true ones.
_PICTURES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FcnFineTuning(IterativeFineTuning):
    """mIoU of a fully convolutional network, all of whose weights are fine-tuned on class maps.

    Attributes:
        power: of the polynomial by which the learning rate falls.
        lowest_rate: the learning rate at the end.
        augment: the crops that the network is trained on.
        view: how held-out images are tested.

    Raises:
        UsageError: a setting is out of range.
    """

    one_size = True
    # The name of the evaluation in the config.
    name: ClassVar[str]
    table: ClassVar[str]
    protocol: ClassVar[str]
    # How logits are resized (see `FullyConvolutionalNetwork`).
    align_corners: ClassVar[bool]
    # Number of training images, crops and test of the published training.
    published_images: ClassVar[int]
    published_augment: ClassVar[TrainingCrops]
    published_view: ClassVar[WholeImage | SlidingWindows]

    # mmsegmentation synchronizes batch norm over GPUs and takes the mean loss over all pixels of a
    # step, so that it does not matter which images a GPU has: each image is a group.
    images_per_gpu: int = dataclasses.field(default=1, init=False)
    power: float
    lowest_rate: float
    augment: TrainingCrops
    view: WholeImage | SlidingWindows

    def __post_init__(self) -> None:
        setting = f"eval.{self.name}"
        self.check_settings(setting)
        checks.number(f"{setting}.power", self.power, above=0)
        checks.number(
            f"{setting}.lowest_rate",
            self.lowest_rate,
            at_least=0,
            at_most=self.learning_rate,
        )

    def check(self, splits: Splits) -> None:
        """Checks that all images have class maps, of the same classes.

        Raises:
            UsageError: they have none, or the splits have different classes.
        """
        for images in (splits.train, splits.held_out):
            self._segmented(images)
        # The classifier has one output for each class of the training images.
        if splits.train.classes != splits.held_out.classes:
            raise UsageError(
                f"eval.{self.name}: {splits.train.name} has {len(splits.train.classes)} classes "
                f"for training, but {len(splits.held_out.classes)} others for the test. "
                "Give splits of the same classes."
            )
        super().check(splits)

    def make_network(self, context: Context) -> FullyConvolutionalNetwork:
        return FullyConvolutionalNetwork(
            context.backbone,
            len(context.splits.train.classes),
            align_corners=self.align_corners,
            seed=context.seed,
        )

    def schedule(self, length: int) -> Schedule:
        # Schedules are factors on the learning rate, and the setting is a rate (mmcv's min_lr).
        floor = self.lowest_rate / self.learning_rate
        return Poly(length=length, power=self.power, floor=floor)

    def training_indices(self, images: ImageSet) -> Sequence[int]:
        return range(len(images))

    def make_sample(self, images: ImageSet) -> MakeSample[CropSample]:
        return MakeCrop(images=self._segmented(images), augment=self.augment)

    def batch_of(
        self, forward: ForwardSamples[CropSample], device: torch.device
    ) -> SegmentationBatch:
        return self.augment.batch(forward.samples, device)

    def loss(
        self, network: FullyConvolutionalNetwork, batch: SegmentationBatch
    ) -> Float[Tensor, ""]:
        losses = network.losses(batch)
        parts = list(losses.values())
        return torch.stack(parts).sum()

    def test(
        self,
        network: FullyConvolutionalNetwork,
        context: Context,
        *,
        final: bool,
    ) -> list[Score]:
        # Batch norm takes its averages, so that images don't depend on each other.
        network.eval()
        images = context.splits.held_out
        metric = SegmentationMetric(len(images.classes))
        # Pictures are for the finished network alone.
        pictured = evenly_spaced(len(images), _PICTURES) if final else ()
        n_tested = 0
        for tested, predicted in self._class_maps(network, context):
            # Counted on the device, where the prediction is.
            truth = torch.from_numpy(tested.class_map).to(context.device)
            metric.add(tested.index, predicted=predicted, truth=truth)
            n_tested += 1
            if tested.index in pictured:
                _draw(tested, predicted, images.classes, context.folder)
        scores = metric.evaluate()
        # Over all processes: those that read none of their images still take part.
        n_tested = int(ranks.total(torch.tensor(n_tested)))
        if not n_tested:
            raise DataError(
                f"none of the images of {images.name} {images.split} can be read, so mIoU has no "
                "value. Repair them."
            )
        # All processes have the same scores; one draws them.
        if final and ranks.rank() == 0:
            save_class_confusion(
                scores.confusion,
                images.classes,
                context.folder,
                title=f"{images.name} {images.split}, mIoU {scores.printed_mean_iou:.2f} %",
            )
        return self._scores(scores, n_tested, context.splits)

    def _class_maps(
        self,
        network: FullyConvolutionalNetwork,
        context: Context,
    ) -> Iterator[tuple[TestedImage, UInt8[Tensor, "h w"]]]:
        """Yields this process's held-out images, and the predicted class of each pixel."""
        make = MakeTested(images=self._segmented(context.splits.held_out))
        bf16 = context.encode_config.bf16
        # Images have different sizes, so that each is a batch of its own.
        for (tested,) in self.read_held_out(context, make, doing="segmenting", batch=1):
            pixels = torch.from_numpy(tested.image).to(context.device, non_blocking=True)
            with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
                predicted = self.view.class_map(network, pixels)
            yield tested, predicted

    def _scores(self, scores: SegmentationScores, n: int, splits: Splits) -> list[Score]:
        """Returns mIoU, the IoU of each class that is somewhere, and the share of right pixels."""
        # They are part of each score, as scores are read one by one.
        deviations = (
            *self._differences(splits.train),
            *left_out_of_test(splits.held_out, n),
        )
        details = (f"trained on {self.augment}",)
        miou = Score(
            table=self.table,
            column="mIoU",
            metric="miou",
            value=scores.printed_mean_iou,
            n=n,
            headline=True,
            protocol=self.protocol,
            deviations=deviations,
            details=details,
        )
        numbers = {
            "miou_unrounded": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
        }
        all_scores = [miou, *scores_beside(miou, numbers)]
        by_class = scores.iou_by_class.tolist()
        all_scores += scores_by_class(miou, "iou", splits.held_out.classes, by_class)
        return all_scores

    def _segmented(self, images: ImageSet) -> SegmentedImages:
        """Returns the images. Raises `UsageError` if they have no class maps."""
        if not isinstance(images, SegmentedImages):
            raise UsageError(
                f"eval.{self.name} needs images with the class of each pixel: {images.name} "
                f"{images.split} has none. Leave out eval.{self.name}.data, or give its root."
            )
        return images

    def _differences(self, train: ImageSet) -> Iterator[str]:
        """Yields how images and crops differ from those of the published training."""
        # Such results stand beside published ones, which they are not comparable with.
        if len(train) != self.published_images:
            yield f"trained on {len(train):,} images instead of {self.published_images:,}"
        if not same_settings(self.augment, self.published_augment):
            yield f"trained on {self.augment} instead of {self.published_augment}"
        if not same_settings(self.view, self.published_view):
            yield f"tested on {self.view} instead of {self.published_view}"


def _draw(
    tested: TestedImage,
    predicted: UInt8[Tensor, "h w"],
    classes: Sequence[str],
    folder: Path,
) -> None:
    """Draws an image with its true and its predicted class map."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_class_maps(
        tested.image,
        predicted.cpu().numpy(),
        tested.class_map,
        classes,
        folder / f"image_{tested.index}.png",
    )
