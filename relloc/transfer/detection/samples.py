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
from relloc.data.annotations import ObjectImages, Objects, decode_mask
from relloc.patches.normalize import ByDataset
from relloc.transfer.detection.batch import DetectionBatch, Size, Targets, pad_images
from relloc.transfer.resize import check_box, fitted_size, nearest_indices, resized

_BITS = 8


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
    packed_masks: UInt8[np.ndarray, "n h _"] | None
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
        lowest, highest = min(self.short_px), max(self.short_px)
        return (
            f"shorter side one of {len(self.short_px)} from {lowest} to {highest} px, longer side "
            f"at most {self.long_px} px, flip {self.flip:g}"
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
        rng = random.Random(seed)
        short_px = rng.choice(list(self.short_px))
        flip = rng.random() < self.flip
        image = np.array(images.read(index))  # a copy that torch may write to
        objects = _trained(images.objects(index), difficult=difficult)
        height, width = image.shape[:2]
        return DetectionSample(
            image=image,
            # Encoded masks would only make the sample larger.
            objects=dataclasses.replace(objects, masks=()),
            packed_masks=_packed_masks(objects, height, width) if masks else None,
            size=fitted_size(height, width, (self.long_px, short_px)),
            flip=flip,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedImage:
    """The whole image, resized so that it fits into the box (long, short) of pixels.

    Raises:
        UsageError: `box` is no such box.
    """

    box: Sequence[int]

    def __post_init__(self) -> None:
        check_box("view.box", self.box)

    def __str__(self) -> str:
        return f"whole image fitted into {self.box[0]} x {self.box[1]} px"

    def size(self, height: int, width: int) -> Size:
        """Returns the size of an image after it was resized."""
        return fitted_size(height, width, self.box)


def _trained(objects: Objects, *, difficult: bool) -> Objects:
    """Returns the objects that are trained on."""
    widths = objects.boxes[:, 2] - objects.boxes[:, 0]
    heights = objects.boxes[:, 3] - objects.boxes[:, 1]
    is_trained = ~objects.crowd & (widths >= 1) & (heights >= 1) & (objects.areas > 0)
    if not difficult:
        is_trained &= ~objects.difficult
    indices = np.flatnonzero(is_trained)
    return Objects(
        boxes=objects.boxes[indices],
        xywh=objects.xywh[indices],
        classes=objects.classes[indices],
        difficult=objects.difficult[indices],
        crowd=objects.crowd[indices],
        areas=objects.areas[indices],
        masks=tuple(objects.masks[index] for index in indices) if objects.masks else (),
    )


def _packed_masks(objects: Objects, height: int, width: int) -> UInt8[np.ndarray, "n h _"]:
    masks = [decode_mask(mask, height, width) for mask in objects.masks]
    if not masks:
        return np.zeros((0, height, -(-width // _BITS)), dtype=np.uint8)
    return np.packbits(np.stack(masks), axis=-1)


def to_batch(samples: Sequence[DetectionSample], device: torch.device) -> DetectionBatch:
    """Returns the samples as a batch on the device, where their pixels are computed.

    Targets are moved as their images are, and cut at the border of the resized image.
    """
    images = []
    targets = []
    for sample in samples:
        pixels = torch.from_numpy(sample.image).to(device, non_blocking=True)
        image = prepared(pixels, sample.size)
        images.append(image.flip(-1) if sample.flip else image)
        targets.append(_targets(sample, device))
    return DetectionBatch(
        images=pad_images(images).to(device),
        sizes=[sample.size for sample in samples],
        targets=targets,
        seeds=[sample.seed for sample in samples],
    )


def prepared(image: UInt8[Tensor, "h w 3"], size: Size) -> Float[Tensor, "3 h2 w2"]:
    """Returns the resized and normalized image."""
    pixels = resized(image, size).permute(2, 0, 1)
    return ByDataset()(pixels.unsqueeze(0))[0]


def _targets(sample: DetectionSample, device: torch.device) -> Targets:
    """Returns the objects of a sample in pixels of its resized, mirrored image."""
    original_height, original_width = sample.image.shape[:2]
    height, width = sample.size
    # Each side has its own scale, since resized sides are rounded to whole pixels.
    scale_x, scale_y = width / original_width, height / original_height
    scales = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
    limits = np.array([width, height, width, height], dtype=np.float32)
    boxes = (sample.objects.boxes * scales).clip(0, limits)
    if sample.flip:
        left, top, right, bottom = boxes.T
        boxes = np.stack([width - right, top, width - left, bottom], axis=1)
    masks = None
    if sample.packed_masks is not None:
        masks = _resized_masks(sample, sample.packed_masks, device)
    return Targets(
        boxes=torch.from_numpy(boxes.astype(np.float32)).to(device, non_blocking=True),
        classes=torch.from_numpy(sample.objects.classes).to(device, non_blocking=True),
        masks=masks,
    )


def _resized_masks(
    sample: DetectionSample, packed: UInt8[np.ndarray, "n h _"], device: torch.device
) -> UInt8[Tensor, "n h2 w2"]:
    """Returns the masks at the size of the resized image, each pixel from the nearest original."""
    original_height, original_width = sample.image.shape[:2]
    height, width = sample.size
    rows = torch.from_numpy(nearest_indices(original_height, height)).to(device)
    columns = torch.from_numpy(nearest_indices(original_width, width)).to(device)
    if sample.flip:
        columns = columns.flip(0)
    packed_rows = torch.from_numpy(packed).to(device)[:, rows]
    # The pixel of a column is one bit of its byte, the highest one first.
    shifts = (_BITS - 1 - columns % _BITS).to(torch.uint8)
    return (packed_rows[:, :, columns // _BITS] >> shifts) & 1
