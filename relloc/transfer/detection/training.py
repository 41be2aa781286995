"""What the evaluations that fine-tune a detector have in common: training samples and testing."""

import abc
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from relloc import checks, ranks
from relloc.data.annotations import ObjectImages, Objects, images_with_objects
from relloc.data.image_set import ImageSet, Splits
from relloc.data.samples import MakeSample
from relloc.data.subsets import evenly_spaced
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import Context
from relloc.transfer.detection.batch import (
    DetectionBatch,
    pad_images,
)
from relloc.transfer.detection.masks import pasted
from relloc.transfer.detection.samples import (
    DetectionSample,
    RandomSizes,
    prepared,
    to_batch,
    trained_objects,
)
from relloc.transfer.detections import Detections, nothing_found
from relloc.transfer.iterations import ForwardSamples, IterativeFineTuning, own_part
from relloc.transfer.metrics.box_confusion import BoxesOfImage, save_box_confusion
from relloc.transfer.metrics.per_image import PerImage
from relloc.transfer.metrics.pictures import draw_detections
from relloc.transfer.resize import FittedImage, Size
from relloc.transfer.same_settings import same_settings

T = TypeVar("T")
Measured = TypeVar("Measured")
# Images of which a picture is drawn.
_PICTURES = 8


class Detector(Protocol):
    """What this module asks of a network."""

    def losses(self, batch: DetectionBatch) -> dict[str, Float[Tensor, ""]]:
        """Returns losses by name, whose sum is trained."""
        ...

    def detect(self, images: Float[Tensor, "b 3 h w"], sizes: Sequence[Size]) -> list[Detections]:
        """Returns what is found in each image, in pixels of the images as they are given."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeTrainingSample:
    """Makes training samples of images with objects, in worker processes."""

    images: ObjectImages
    augment: RandomSizes
    difficult: bool
    masks: bool

    def __call__(self, index: int, seed: int) -> DetectionSample:
        return self.augment.sample(
            self.images, index, seed, difficult=self.difficult, masks=self.masks
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedImage:
    """What is annotated of an image to test on.

    Attributes:
        index: its number in the split.
        image_id: its id in COCO.
        size: its height and width in pixels.
        objects: in pixels of the image.
    """

    index: int
    image_id: int
    size: Size
    objects: Objects


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TestImage(AnnotatedImage):
    """An image to test on, of RGB pixels."""

    __test__ = False  # pytest takes classes of this name for tests

    pixels: UInt8[np.ndarray, "h w 3"]


def annotation(images: ObjectImages, index: int) -> dict[str, Any]:
    """Returns the fields of the `AnnotatedImage` with this index.

    Raises:
        UnreadableImage: the annotation can't be used.
    """
    return {
        "index": index,
        "image_id": images.image_id(index),
        "size": images.size(index),
        "objects": images.objects(index),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeTestImage:
    """Reads images to test on, in worker processes."""

    images: ObjectImages

    def __call__(self, index: int, seed: int) -> TestImage:
        pixels = np.array(self.images.read(index))  # a copy that torch may write to
        return TestImage(**annotation(self.images, index), pixels=pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionFineTuning(IterativeFineTuning, Generic[T], abc.ABC):
    """A training of a detector on images with objects, and its test on the held-out ones.

    Images of less than 32 px or without any object are left out of the training.

    Attributes:
        augment: sizes of training images.
        view: size of test images.
        test_batch: most images that are tested at once. Only images of one size are, since padding
            would change what a network sees at their border.
        gamma, warmup, warmup_from: of `Milestones`; the warm-up is in iterations.
    """

    masks = False
    # Sizes and images of the published training and test; others are named in results.
    published_augment: ClassVar[RandomSizes | FittedImage]
    published_view: ClassVar = FittedImage(box=[1333, 800])
    published_images: ClassVar[str]  # as in "16,551 images of voc0712 trainval"

    augment: RandomSizes
    view: FittedImage
    test_batch: int = dataclasses.field(repr=False)  # decides no number
    gamma: float
    warmup: float
    warmup_from: float

    @property
    def trains_difficult(self) -> bool:
        """Whether objects that are difficult to recognize are trained on."""
        return False

    @abc.abstractmethod
    def of_image(self, found: Detections, image: AnnotatedImage) -> T:
        """Returns what the metric needs of an image, on the CPU.

        `found` are detections in pixels of the original image.
        """

    @abc.abstractmethod
    def boxes_of(self, value: T) -> BoxesOfImage:
        """Returns the boxes in what `of_image` returned."""

    def check_settings(self, setting: str) -> None:
        super().check_settings(setting)
        checks.whole(f"{setting}.test_batch", self.test_batch)
        checks.number(f"{setting}.gamma", self.gamma, above=0)
        checks.number(f"{setting}.warmup", self.warmup, at_least=0)
        checks.number(f"{setting}.warmup_from", self.warmup_from, at_least=0, at_most=1)

    def check(self, splits: Splits) -> None:
        """Checks that the images have objects.

        Raises:
            UsageError: their data set has none.
            DataError: no image to train on has an object that is trained on, or no held-out image
                one that counts.
        """
        # This comes first, as the checks of the base class ask for objects.
        for images in (splits.train, splits.held_out):
            if not isinstance(images, ObjectImages):
                raise UsageError(
                    f"{images.name} has no boxes of objects, which detectors are trained on: give "
                    "a data set that has them, such as voc0712 or coco2017"
                )
        super().check(splits)
        train = _with_objects(splits.train)
        # A detector would learn that there is nothing anywhere.
        if not self._has_trained_object(train):
            raise DataError(
                f"{train.name} {train.split} has no object to train on: each of its {len(train)} "
                "images shows crowds, difficult objects or ones of less than a pixel alone. Give "
                "images with others."
            )
        # Without such an object no metric has a value, which the training would end with.
        held_out = _with_objects(splits.held_out)
        if not _has_counting_object(held_out):
            raise DataError(
                f"{held_out.name} {held_out.split} has no object to test on: none of its "
                f"{len(held_out)} images shows one that is neither difficult nor a crowd. "
                "Give images that do."
            )

    def _has_trained_object(self, images: ObjectImages) -> bool:
        for index in self.training_indices(images):
            objects = images.objects(index)
            if len(trained_objects(objects, difficult=self.trains_difficult)):
                return True
        return False

    def training_indices(self, images: ImageSet) -> Sequence[int]:
        return images_with_objects(_with_objects(images))

    def deviations(self, length: int) -> Iterator[str]:
        yield from super().deviations(length)
        n_published = int(self.published["images_per_gpu"])
        # Batch norm sees the zeros beyond the border of smaller images.
        if self.forward_images() != (n_published, n_published):
            yield (
                f"images padded to the largest of {self.forward_text()}, "
                f"and of {n_published} as published"
            )

    def image_differences(self, train: ImageSet) -> Iterator[str]:
        """Yields how images and their sizes differ from those of the published training."""
        n_trained = len(self.training_indices(train))
        images = f"{n_trained:,} images of {train.name} {train.split}"
        if images != self.published_images:
            yield f"trained on {images} instead of {self.published_images}"
        if not same_settings(self.augment, self.published_augment):
            yield f"images resized to {self.augment} instead of {self.published_augment}"
        if not same_settings(self.view, self.published_view):
            yield f"tested on {self.view} instead of {self.published_view}"

    def test_differences(self, held_out: ImageSet, n_tested: int) -> Iterator[str]:
        """Yields what became of held-out images that could not be read, if there are any."""
        # What the annotations of these are is not known.
        n_unusable = len(self.unusable(held_out))
        n_unreadable = len(held_out) - n_tested - n_unusable
        if n_unreadable:
            yield (
                f"objects of {n_unreadable:,} of {len(held_out):,} test images, which can't be "
                "read, count as missed"
            )
        if n_unusable:
            yield (
                f"without {n_unusable:,} of {len(held_out):,} test images, whose annotations "
                "can't be used"
            )

    def unusable(self, images: ImageSet) -> Mapping[int, str]:
        return _with_objects(images).unusable()

    def kind_of(self, images: ImageSet, index: int) -> Hashable:
        # mmdetection's GroupSampler: wide images together and high ones together need less padding.
        height, width = _with_objects(images).size(index)
        return width > height

    def make_sample(self, images: ImageSet) -> MakeTrainingSample:
        return MakeTrainingSample(
            images=_with_objects(images),
            augment=self.augment,
            difficult=self.trains_difficult,
            masks=self.masks,
        )

    def batch_of(
        self, forward: ForwardSamples[DetectionSample], device: torch.device
    ) -> DetectionBatch:
        return to_batch(forward.samples, forward.groups, device)

    def loss(self, network: nn.Module, batch: DetectionBatch) -> Tensor:
        losses = cast(Detector, network).losses(batch)
        parts = list(losses.values())
        return torch.stack(parts).sum()

    def make_test_image(self, images: ObjectImages) -> MakeSample[TestImage]:
        """Returns the function that reads an image to test on, in a worker process."""
        return MakeTestImage(images=images)

    def detect_all(self, network: nn.Module, context: Context) -> tuple[PerImage[T], int]:
        """Detects objects in this process's part of the held-out images.

        Returns what the metric needs of each image, to be collected from all processes, and the
        number of images that could be read. In the others nothing is found.
        """
        network.eval()
        held_out = _with_objects(context.splits.held_out)
        unusable = held_out.unusable()

        # Only images of one size share a batch, as padding would change what the network sees at
        # their border. Annotations know it, so that images need not be read to be grouped.
        def size_of(index: int) -> Size | None:
            return None if index in unusable else held_out.size(index)

        batches = self.read_held_out(
            context,
            self.make_test_image(held_out),
            doing="detecting on",
            batch=self.test_batch,
            kind_of=size_of,
        )
        # Only what the metric needs is kept: detections and pixels of all images would fill memory.
        values: PerImage[T] = PerImage()
        read = set()
        for images in batches:
            found = self.detect(network, images, context)
            for image, detections in zip(images, found, strict=True):
                values.add(image.index, self.of_image(detections, image))
                read.add(image.index)
        # Without the objects of the other images, average precision would rise. Objects of a wrong
        # annotation are not known.
        for index in own_part(held_out):
            if index not in read and index not in unusable:
                image = AnnotatedImage(**annotation(held_out, index))
                values.add(index, self.of_image(nothing_found(), image))
        return values, len(read)

    def measure(
        self,
        network: nn.Module,
        context: Context,
        compute: Callable[[Sequence[T]], Measured],
        *,
        final: bool,
    ) -> tuple[Measured, int]:
        """Returns what `compute` gives for the held-out images, and how many could be read.

        All processes call it together. After the last iteration (`final`) it also draws which
        classes are taken for which, and what is found in some images.

        Raises:
            DataError: none can be read.
        """
        values, n_own = self.detect_all(network, context)
        # Over all processes: those that read none of their images still take part.
        n_tested = int(ranks.total(torch.tensor(n_own)))
        if not n_tested:
            images = context.splits.held_out
            raise DataError(
                f"none of the {len(images)} images of {images.name} {images.split} can be read, "
                "so average precision has no value. Repair them."
            )
        images = context.splits.held_out

        # Average precision sorts the detections of all images, so rank 0 computes it for all.
        def compute_and_draw(of_images: Sequence[T]) -> Measured:
            if final:
                save_box_confusion(
                    map(self.boxes_of, of_images),
                    images.classes,
                    context.folder,
                    name=f"{images.name} {images.split}",
                )
            return compute(of_images)

        measured = values.evaluate(compute_and_draw)
        # One process draws, as all would write the same files.
        if final and ranks.rank() == 0:
            self.draw(network, context)
        return measured, n_tested

    def draw(self, network: nn.Module, context: Context) -> None:
        """Draws what is found in some images that are evenly spaced over the held-out ones."""
        images = _with_objects(context.splits.held_out)
        make = self.make_test_image(images)
        # They are detected again: to keep the detections of the test would take memory for all.
        for index in evenly_spaced(len(images), _PICTURES):
            try:
                image = make(index, 0)
            except UnreadableImage:
                continue  # it was counted when it was tested
            (detections,) = self.detect(network, [image], context)
            draw_detections(
                image.pixels,
                detections,
                images.classes,
                context.folder / f"detections_{index}.png",
                truth=image.objects,
            )

    @torch.no_grad()
    def detect(
        self, network: nn.Module, images: Sequence[TestImage], context: Context
    ) -> Iterator[Detections]:
        """Yields what is found in each of some images of one size, in pixels of the original.

        Masks are pasted one image after the other, as those of a large image fill gigabytes.
        """
        height, width = images[0].pixels.shape[:2]
        size = self.view.size(height, width)
        sizes = [size] * len(images)
        resized = prepared([image.pixels for image in images], sizes, context.device)
        padded = pad_images(resized)

        bf16 = context.encode_config.bf16
        with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
            found = cast(Detector, network).detect(padded, sizes)
        # Metrics compare with annotations, which are in pixels of the original image.
        original_size = (height, width)
        for detections in found:
            rescaled = detections.rescaled(size, original_size)
            yield pasted(rescaled, original_size)


def _has_counting_object(images: ObjectImages) -> bool:
    """Returns whether an image has an object that is neither difficult nor a crowd."""
    unusable = images.unusable()
    for index in range(len(images)):
        if index in unusable:
            continue
        objects = images.objects(index)
        counts = ~objects.difficult & ~objects.crowd
        if counts.any():
            return True
    return False


def _with_objects(images: ImageSet) -> ObjectImages:
    """Returns the images as the type that `check` has found them to be."""
    if not isinstance(images, ObjectImages):
        raise TypeError(f"{images.name} {images.split} has no objects")
    return images
