"""The regions that Fast R-CNN is trained on: given proposals with the objects themselves.

All is as in the project fast-rcnn (docs/protocols.md 3.16), in pixels of the original image: the
corners of a box are pixels of it, so that overlaps are computed with sides of x2 - x1 + 1. Offsets
are computed with sides of x2 - x1 there.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from relloc.data.annotations import Objects, ProposedImages
from relloc.seeds import Use, seed_for
from relloc.to_device import to_device
from relloc.transfer.detection.batch import pad_images
from relloc.transfer.detection.boxes import encode
from relloc.transfer.detection.regions import Regions
from relloc.transfer.detection.samples import prepared
from relloc.transfer.resize import FittedImage, Size

# fast-rcnn pads images to the largest of a batch, and no further.
NO_MULTIPLE = 1
# Offsets are divided by nothing here, as those of each class have their own deviations.
UNIT_STDS = (1.0, 1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionRule:
    """Which regions of an image are trained on. The defaults are those of fast-rcnn.

    Attributes:
        regions_per_image: number of regions.
        positive_share: largest share of them that are of an object.
        positive_overlap: a region of this overlap with an object or more is of that object.
        background_overlap: a region of less overlap than `positive_overlap`, but at least this one,
            is background. Others are not trained on.
    """

    regions_per_image: int = 64
    positive_share: float = 0.25
    positive_overlap: float = 0.5
    background_overlap: float = 0.1


FAST_RCNN_RULE = RegionRule()


class MirroredToo:
    """The images of a set, and after them the mirror image of each: `ProposedImages`.

    So fast-rcnn doubles its epochs, where others mirror an image at random.
    """

    def __init__(self, images: ProposedImages) -> None:
        self.images = images
        self.name = images.name
        self.split = images.split
        self.labels = None
        self.classes = images.classes

    def __len__(self) -> int:
        return 2 * len(self.images)

    def read(self, index: int) -> Image.Image:
        original, is_mirrored = self._original(index)
        image = self.images.read(original)
        return ImageOps.mirror(image) if is_mirrored else image

    def objects(self, index: int) -> Objects:
        original, is_mirrored = self._original(index)
        objects = self.images.objects(original)
        if not is_mirrored:
            return objects
        _, width = self.images.size(original)
        x, y, box_width, box_height = objects.xywh.T
        mirrored_x = width - 1 - (x + box_width)
        return dataclasses.replace(
            objects,
            boxes=_mirrored(objects.boxes, width),
            xywh=np.stack([mirrored_x, y, box_width, box_height], axis=1),
        )

    def proposals(self, index: int) -> Float32[np.ndarray, "n 4"]:
        original, is_mirrored = self._original(index)
        boxes = self.images.proposals(original)
        if not is_mirrored:
            return boxes
        _, width = self.images.size(original)
        return _mirrored(boxes, width)

    def count(self, index: int) -> int:
        return self.images.count(self._original(index)[0])

    def size(self, index: int) -> tuple[int, int]:
        return self.images.size(self._original(index)[0])

    def image_id(self, index: int) -> int:
        return self.images.image_id(self._original(index)[0])

    def unusable(self) -> Mapping[int, str]:
        reasons = {}
        for index, reason in self.images.unusable().items():
            reasons[index] = reason
            reasons[index + len(self.images)] = reason
        return reasons

    def source(self, index: int) -> str:
        return self.images.source(self._original(index)[0])

    def digest(self) -> str:
        return self.images.digest()

    def _original(self, index: int) -> tuple[int, bool]:
        """Returns the index of the original image, and whether it is mirrored."""
        is_mirrored = index >= len(self.images)
        return index - len(self.images) * is_mirrored, is_mirrored


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The objects of an image and its proposals, each with the object that it overlaps most.

    Attributes:
        boxes: objects first.
        overlaps: the overlap with that object, 0 to 1.
        objects: the number of the object; 0 in an image without objects.
    """

    boxes: Float32[np.ndarray, "n 4"]
    overlaps: Float64[np.ndarray, "n"]
    objects: Int64[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RegionSample:
    """An image as it was decoded, the size it is brought to, and the regions to train on.

    Attributes:
        image: RGB pixels, mirrored if the sample is.
        size: height and width after resizing.
        boxes: the regions, in pixels of `image`; those of objects first.
        object_boxes: box of the object that each is of; the region itself where it is background.
        classes: class of that object; the number of classes for background.
        positive: whether it is of an object.
        seeds: of the dropout of each.
    """

    image: UInt8[np.ndarray, "h w 3"]
    size: Size
    boxes: Float32[np.ndarray, "n 4"]
    object_boxes: Float32[np.ndarray, "n 4"]
    classes: Int64[np.ndarray, "n"]
    positive: Bool[np.ndarray, "n"]
    seeds: Int64[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RegionBatch:
    """Images of a training step, and the regions of them that are trained on.

    Attributes:
        images: normalized, and padded with zeros at the right and bottom.
        regions: in pixels of the resized images.
        groups: number of the group of each image (see `mean_over_groups`).
        seeds: of the dropout of each region, so that it does not depend on the rest of the batch.
    """

    images: Float[Tensor, "b 3 h w"]
    regions: Regions
    groups: Sequence[int]
    seeds: Int[Tensor, "n"]

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MakeRegionSample:
    """Makes training samples, in worker processes."""

    images: ProposedImages
    augment: FittedImage
    rule: RegionRule = FAST_RCNN_RULE

    def __call__(self, index: int, seed: int) -> RegionSample:
        image = np.array(self.images.read(index))  # a copy that torch may write to
        height, width = image.shape[:2]
        objects = self.images.objects(index)
        candidates = candidates_of(objects, self.images.proposals(index))
        chosen, n_positive = choose_candidates(candidates, self.rule, seed)
        boxes = candidates.boxes[chosen]
        own_objects = candidates.objects[chosen]

        positive = np.arange(len(chosen)) < n_positive
        object_boxes = boxes.copy()
        object_boxes[positive] = objects.boxes[own_objects[positive]]
        classes = np.full(len(chosen), len(self.images.classes))
        classes[positive] = objects.classes[own_objects[positive]]
        seeds = [seed_for(Use.REGION_DROPOUT, seed, number) for number in range(len(chosen))]
        return RegionSample(
            image=image,
            size=self.augment.size(height, width),
            boxes=boxes,
            object_boxes=object_boxes,
            classes=classes,
            positive=positive,
            seeds=np.array(seeds, dtype=np.int64),
        )


def pixel_overlaps(
    boxes: Float32[np.ndarray, "n 4"], others: Float32[np.ndarray, "m 4"]
) -> Float64[np.ndarray, "n m"]:
    """Returns the intersection over union of boxes whose corners are pixels of them."""
    rows = boxes.astype(np.float64)[:, None]
    columns = others.astype(np.float64)[None]
    top_left = np.maximum(rows[..., :2], columns[..., :2])
    bottom_right = np.minimum(rows[..., 2:], columns[..., 2:])
    # Sides are negative where boxes lie apart.
    sides = np.maximum(bottom_right - top_left + 1, 0)
    intersection = sides.prod(axis=-1)
    areas = []
    for each in (rows, columns):
        own_sides = each[..., 2:] - each[..., :2] + 1
        areas.append(own_sides.prod(axis=-1))
    return intersection / (areas[0] + areas[1] - intersection)


def candidates_of(objects: Objects, proposals: Float32[np.ndarray, "n 4"]) -> Candidates:
    """Returns the objects of an image and its proposals as candidates to train on.

    Difficult objects count too. An object overlaps itself, also if others have the same box. Of
    several objects that a proposal overlaps alike it belongs to the first.
    """
    n_objects = len(objects)
    own_numbers = np.arange(n_objects)
    own_overlaps = np.ones(n_objects)
    numbers = np.zeros(len(proposals), dtype=np.int64)
    best_overlaps = np.zeros(len(proposals))
    # Without objects there is no largest overlap.
    if n_objects:
        overlaps = pixel_overlaps(proposals, objects.boxes)
        numbers = overlaps.argmax(axis=1)
        best_overlaps = overlaps.max(axis=1)
    return Candidates(
        boxes=np.concatenate([objects.boxes, proposals]),
        overlaps=np.concatenate([own_overlaps, best_overlaps]),
        objects=np.concatenate([own_numbers, numbers]),
    )


def choose_candidates(
    candidates: Candidates, rule: RegionRule, seed: int
) -> tuple[Int64[np.ndarray, "m"], int]:
    """Returns the candidates to train on, those of objects first, and how many of these there are.

    Both kinds are drawn without replacement. Background fills up what objects leave free. There may
    be fewer than the rule asks for, and none.
    """
    rng = np.random.default_rng(seed_for(Use.REGION_SAMPLE, seed))
    is_positive = candidates.overlaps >= rule.positive_overlap
    is_background = ~is_positive & (candidates.overlaps >= rule.background_overlap)
    most_positive = round(rule.regions_per_image * rule.positive_share)

    of_objects = np.flatnonzero(is_positive)
    n_positive = min(most_positive, len(of_objects))
    positive = rng.choice(of_objects, n_positive, replace=False)
    background = np.flatnonzero(is_background)
    n_background = min(rule.regions_per_image - n_positive, len(background))
    negative = rng.choice(background, n_background, replace=False)
    return np.concatenate([positive, negative]), n_positive


def target_statistics(
    images: ProposedImages, indices: Sequence[int], rule: RegionRule = FAST_RCNN_RULE
) -> tuple[Float[Tensor, "classes 4"], Float[Tensor, "classes 4"]]:
    """Returns mean and standard deviation of the offsets to the objects of each class.

    They are over all candidates of the images `indices` that are of an object of the class, also
    the objects themselves. A deviation of 0, as of a class that no candidate is of, is given as 1,
    since offsets are divided by it.
    """
    n_classes = len(images.classes)
    counts = torch.zeros(n_classes, 1, dtype=torch.float64)
    sums = torch.zeros(n_classes, 4, dtype=torch.float64)
    square_sums = torch.zeros(n_classes, 4, dtype=torch.float64)
    for index in indices:
        objects = images.objects(index)
        candidates = candidates_of(objects, images.proposals(index))
        positive = np.flatnonzero(candidates.overlaps >= rule.positive_overlap)
        # Whatever a candidate overlaps in an image without objects, it is not enough.
        own_objects = candidates.objects[positive]
        boxes = torch.from_numpy(candidates.boxes[positive])
        object_boxes = torch.from_numpy(objects.boxes[own_objects])
        classes = torch.from_numpy(objects.classes[own_objects])
        offsets = encode(boxes, object_boxes, UNIT_STDS).double()
        counts.index_add_(0, classes, torch.ones(len(classes), 1, dtype=torch.float64))
        sums.index_add_(0, classes, offsets)
        square_sums.index_add_(0, classes, offsets.square())
    means = sums / counts.clamp(min=1)
    mean_squares = square_sums / counts.clamp(min=1)
    # Rounding may bring a variance of 0 below it.
    stds = (mean_squares - means.square()).clamp(min=0).sqrt()
    stds = torch.where(stds > 0, stds, 1.0)
    return means.float(), stds.float()


def to_region_batch(
    samples: Sequence[RegionSample], groups: Sequence[int], device: torch.device
) -> RegionBatch:
    """Returns the samples as a batch on the device, where their pixels are computed.

    `groups` are the numbers of their groups (see `mean_over_groups`).
    """
    sizes = [sample.size for sample in samples]
    images = prepared([sample.image for sample in samples], sizes, device)
    seeds = [np.zeros(0, np.int64), *(sample.seeds for sample in samples)]
    return RegionBatch(
        images=pad_images(images, NO_MULTIPLE).to(device),
        regions=_regions(samples, device),
        groups=groups,
        seeds=_on_device(seeds, device),
    )


def _regions(samples: Sequence[RegionSample], device: torch.device) -> Regions:
    """Returns the regions of all samples on the device, in pixels of the resized images."""
    boxes = [np.zeros((0, 4), np.float32)]
    object_boxes = [np.zeros((0, 4), np.float32)]
    numbers = [np.zeros(0, np.int64)]
    classes = [np.zeros(0, np.int64)]
    positive = [np.zeros(0, bool)]
    for number, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        scales = scales_to(sample.size, (height, width))
        boxes.append(sample.boxes * scales)
        object_boxes.append(sample.object_boxes * scales)
        numbers.append(np.full(len(sample.boxes), number))
        classes.append(sample.classes)
        positive.append(sample.positive)
    image = _on_device(numbers, device)
    return Regions(
        boxes=_on_device(boxes, device),
        images=image,
        objects=torch.zeros_like(image),
        classes=_on_device(classes, device),
        object_boxes=_on_device(object_boxes, device),
        positive=_on_device(positive, device),
    )


def scales_to(size: Size, original_size: Size) -> Float32[np.ndarray, "4"]:
    """Returns what x1, y1, x2, y2 are multiplied by when an image is brought to another size."""
    height, width = size
    original_height, original_width = original_size
    # Each side has its own scale, since resized sides are rounded to whole pixels.
    scale_x = width / original_width
    scale_y = height / original_height
    return np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)


def _mirrored(boxes: Float32[np.ndarray, "n 4"], width: int) -> Float32[np.ndarray, "n 4"]:
    left, top, right, bottom = boxes.T
    # The last column has the number width - 1.
    return np.stack([width - 1 - right, top, width - 1 - left, bottom], axis=1)


def _on_device(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.concatenate(parts)), device)
