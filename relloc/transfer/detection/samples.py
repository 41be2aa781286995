"""Images with objects as detectors are trained and tested on them (docs/protocols.md 3.8, 3.9).

An image is resized so that it fits into a box, mirrored, normalized and padded. The process that
reads a sample draws all random numbers from its seed; pixels are computed on the device.
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc import checks
from relloc.data.annotations import Mask, ObjectImages, Objects, decode_mask
from relloc.to_device import bytes_to_device, to_device
from relloc.transfer.detection.batch import DetectionBatch, Targets, pad_images
from relloc.transfer.resize import (
    Size,
    fitted_size,
    nearest_indices,
    resized_and_normalized,
)

# Pixels of a mask in a byte.
_BITS = 8
_PackedMasks = UInt8[np.ndarray, "n h _"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSample:
    """An image as it was decoded, its objects, and how to resize and mirror both.

    Attributes:
        image: RGB pixels of the original image.
        objects: in pixels of the original image. Their masks are in `packed_masks`.
        packed_masks: for each object, its mask in the original image, eight pixels of a row in each
            byte; None where masks are not trained.
        size: of the resized image.
        flip: whether it is mirrored after that.
        seed: of the anchors and regions that are trained on.
    """

    image: UInt8[np.ndarray, "h w 3"]
    objects: Objects
    packed_masks: _PackedMasks | None
    size: Size
    flip: bool
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSizes:
    """Training images at random sizes, mirrored at random.

    short_px: sizes of the shorter side, of which one is drawn for each image.
    long_px: the longer side is at most this long, for which the shorter side gives way.
    flip: the probability of a horizontal flip.

    Raises:
        UsageError: a setting is out of range.
    """

    short_px: Sequence[int]
    long_px: int
    flip: float = 0.5

    def __post_init__(self) -> None:
        checks.wholes("augment.short_px", self.short_px)
        checks.whole("augment.long_px", self.long_px, at_least=max(self.short_px))
        checks.number("augment.flip", self.flip, at_least=0, at_most=1)

    def __str__(self) -> str:
        # All sizes, as results tell by this text how a training differs from another.
        sizes = ", ".join(map(str, self.short_px))
        return (
            f"shorter side one of {sizes} px, longer side at most {self.long_px} px, "
            f"flip {self.flip}"
        )

    def sample(
        self, images: ObjectImages, index: int, seed: int, *, difficult: bool, masks: bool
    ) -> DetectionSample:
        """Returns a training sample of an image, whose only source of randomness is `seed`.

        Crowds and objects of less than a pixel are left out, so that they count as background, as
        in mmdetection. So are difficult objects, unless `difficult`. `masks` says whether masks
        are trained.

        Raises:
            UnreadableImage: the image or its annotation can't be used.
        """
        # The order of these draws is part of the protocol: another one gives other samples.
        rng = random.Random(seed)
        short_px = rng.choice(list(self.short_px))
        flip = rng.random() < self.flip

        image = np.array(images.read(index))  # a copy that torch may write to
        height, width = image.shape[:2]
        annotated = images.objects(index)
        objects = trained_objects(annotated, difficult=difficult)

        packed_masks = None
        if masks:
            packed_masks = _packed_masks(objects, height, width)
        # Encoded masks would only make the sample larger.
        without_masks = dataclasses.replace(objects, masks=())
        return DetectionSample(
            image=image,
            objects=without_masks,
            packed_masks=packed_masks,
            size=fitted_size(height, width, (self.long_px, short_px)),
            flip=flip,
            seed=seed,
        )


def trained_objects(objects: Objects, *, difficult: bool) -> Objects:
    """Returns the objects that are trained on."""
    # docs/protocols.md 3.9.
    left, top, right, bottom = objects.boxes.T
    is_wide = right - left >= 1
    is_high = bottom - top >= 1
    has_area = objects.areas > 0
    is_trained = ~objects.crowd & is_wide & is_high & has_area
    if not difficult:
        is_trained &= ~objects.difficult

    indices = np.flatnonzero(is_trained)
    masks: tuple[Mask, ...] = ()
    # Sets without masks have none for any object.
    if objects.masks:
        masks = tuple(objects.masks[index] for index in indices)
    return Objects(
        boxes=objects.boxes[indices],
        xywh=objects.xywh[indices],
        classes=objects.classes[indices],
        difficult=objects.difficult[indices],
        crowd=objects.crowd[indices],
        areas=objects.areas[indices],
        masks=masks,
    )


def _packed_masks(objects: Objects, height: int, width: int) -> _PackedMasks:
    """Returns the objects' masks, eight pixels in a byte: an eighth to send between processes."""
    masks = [decode_mask(mask, height, width) for mask in objects.masks]
    if not masks:
        # Twice negated, the division rounds up, as packbits does.
        n_bytes = -(-width // _BITS)
        return np.zeros((0, height, n_bytes), dtype=np.uint8)
    pixels = np.stack(masks)
    return np.packbits(pixels, axis=-1)


def to_batch(
    samples: Sequence[DetectionSample], groups: Sequence[int], device: torch.device
) -> DetectionBatch:
    """Returns the samples as a batch on the device, where their pixels are computed.

    `groups` are the numbers of their groups (see `mean_over_groups`).
    Targets are moved as their images are, and cut at the border of the resized image.
    """
    sizes = [sample.size for sample in samples]
    images = prepared([sample.image for sample in samples], sizes, device)
    for number, sample in enumerate(samples):
        if sample.flip:
            images[number] = images[number].flip(-1)
    return DetectionBatch(
        images=pad_images(images).to(device),
        sizes=sizes,
        targets=moved_targets(samples, device),
        groups=groups,
        seeds=[sample.seed for sample in samples],
    )


def prepared(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], sizes: Sequence[Size], device: torch.device
) -> list[Float[Tensor, "3 _ _"]]:
    """Returns the images on the device, resized and normalized."""
    # Original pixels are sent as bytes, a quarter of what floats would take.
    return resized_and_normalized(bytes_to_device(images, device), sizes)


def moved_targets(samples: Sequence[DetectionSample], device: torch.device) -> list[Targets]:
    """Returns the objects of each sample in pixels of its resized, mirrored image."""
    if not samples:
        return []
    counts = [len(sample.objects) for sample in samples]
    # One copy for the boxes of all images, and one for their classes.
    boxes = torch.from_numpy(np.concatenate([_boxes(sample) for sample in samples]))
    classes = torch.from_numpy(np.concatenate([sample.objects.classes for sample in samples]))
    targets = []
    for image_boxes, image_classes, masks in zip(
        to_device(boxes, device).split(counts),
        to_device(classes, device).split(counts),
        _resized_masks(samples, device),
        strict=True,
    ):
        targets.append(Targets(boxes=image_boxes, classes=image_classes, masks=masks))
    return targets


def _boxes(sample: DetectionSample) -> Float[np.ndarray, "n 4"]:
    """Returns the boxes of a sample in pixels of its resized, mirrored image."""
    original_height, original_width = sample.image.shape[:2]
    height, width = sample.size
    # Each side has its own scale, since resized sides are rounded to whole pixels.
    scale_x = width / original_width
    scale_y = height / original_height
    scales = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
    # Annotated boxes may reach over the border (mmdetection's bbox_clip_border).
    limits = np.array([width, height, width, height], dtype=np.float32)
    scaled = sample.objects.boxes * scales
    boxes = scaled.clip(0, limits)

    if sample.flip:
        # The mirrored right edge is the left one.
        left, top, right, bottom = boxes.T
        mirrored_left = width - right
        mirrored_right = width - left
        boxes = np.stack([mirrored_left, top, mirrored_right, bottom], axis=1)
    return boxes.astype(np.float32)


def _resized_masks(
    samples: Sequence[DetectionSample], device: torch.device
) -> list[UInt8[Tensor, "_ _ _"] | None]:
    """Returns the masks of each sample at the size of its resized image.

    Each pixel is the nearest one of the original mask. None stands for samples without masks.
    """
    masks: list[UInt8[Tensor, "_ _ _"] | None] = [None] * len(samples)
    with_masks = []
    packed: list[_PackedMasks] = []
    tables = []
    for index, sample in enumerate(samples):
        if sample.packed_masks is None:
            continue
        with_masks.append(index)
        packed.append(sample.packed_masks)
        for original_side, side in zip(sample.image.shape[:2], sample.size, strict=True):
            tables.append(torch.from_numpy(nearest_indices(original_side, side)))
    if not with_masks:
        return masks
    lengths = [len(table) for table in tables]
    indices = to_device(torch.cat(tables), device).split(lengths)
    rows_of, columns_of = indices[::2], indices[1::2]
    for index, image_masks, rows, columns in zip(
        with_masks, bytes_to_device(packed, device), rows_of, columns_of, strict=True
    ):
        if samples[index].flip:
            columns = columns.flip(0)
        # Rows are taken while they are packed, so that an eighth of the bytes is moved.
        packed_rows = image_masks[:, rows]
        # The pixel of a column is one bit of its byte, the highest one first.
        byte_of_column = columns // _BITS
        bit_of_column = columns % _BITS
        shifts = (_BITS - 1 - bit_of_column).to(torch.uint8)
        column_bytes = packed_rows[:, :, byte_of_column]
        masks[index] = (column_bytes >> shifts) & 1
    return masks
