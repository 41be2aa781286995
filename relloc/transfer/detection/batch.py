"""What a detector is given, and what it returns."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from relloc.to_device import on_device
from relloc.transfer.resize import Size

# Padded sides are multiples of this, in pixels, as in the published configurations.
SIDE_MULTIPLE = 32
# Sides of the padded images of a batch without images: convolutions ask for some size.
_SIDE_OF_NO_IMAGES = 64

# True or 1 where a pixel is of the object.
_TargetMasks = Bool[Tensor, "n h w"] | UInt8[Tensor, "n h w"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The objects of one image as training needs them.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the resized image.
        classes: 0 to number of classes - 1.
        masks: one for each object, of the size of the resized image, where masks are trained.
    """

    boxes: Float[Tensor, "n 4"]
    classes: Int[Tensor, "n"]
    masks: _TargetMasks | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DetectionBatch:
    """Images of a training step, with their objects.

    Attributes:
        images: normalized, and padded with zeros at the right and bottom (`pad_images`).
        sizes: height and width of each image before padding.
        targets: the objects of each image.
        groups: number of the group of each image (see `mean_over_groups`).
        seeds: one for each image. All randomness of the anchors and regions that an image is
            trained on comes from its seed, so that it does not depend on the rest of the batch.

    Raises:
        ValueError: the parts are of different numbers of images.
    """

    images: Float[Tensor, "b 3 h w"]
    sizes: Sequence[Size]
    targets: Sequence[Targets]
    groups: Sequence[int]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        n_images = len(self.images)
        for name in ("sizes", "targets", "groups", "seeds"):
            part = getattr(self, name)
            n_given = len(part)
            if n_given != n_images:
                raise ValueError(
                    f"a batch of {n_images} images has {n_given} {name}: give one for each image"
                )


def pad_images(
    images: Sequence[Float[Tensor, "3 _ _"]],
    multiple: int = SIDE_MULTIPLE,
) -> Float[Tensor, "b 3 h w"]:
    """Returns images of several sizes as one tensor, each in the upper left corner.

    The rest is zero. Height and width are the largest ones, rounded up to multiples of `multiple`.
    Of no images it returns an empty tensor on the CPU.
    """
    if not images:
        return torch.zeros(0, 3, _SIDE_OF_NO_IMAGES, _SIDE_OF_NO_IMAGES)
    heights = [image.shape[1] for image in images]
    widths = [image.shape[2] for image in images]
    # A multiple of the strides of all stages, so that each stage halves the map without a rest
    # (mmdetection's size_divisor).
    padded_height = round_up_side(max(heights), multiple)
    padded_width = round_up_side(max(widths), multiple)
    # Zero is the mean color, as images are normalized already.
    shape = (len(images), 3, padded_height, padded_width)
    padded = images[0].new_zeros(shape)
    for target, image in zip(padded, images, strict=True):
        _, height, width = image.shape
        target[:, :height, :width] = image
    return padded


def round_up_side(side: int, multiple: int = SIDE_MULTIPLE) -> int:
    """Returns the side of an image after padding to a multiple of so many pixels."""
    # Twice negated, the division rounds up.
    n_multiples = -(-side // multiple)
    return n_multiples * multiple


def stack_boxes(
    boxes: Sequence[Float[Tensor, "_ 4"]],
    device: torch.device,
) -> tuple[Float[Tensor, "b n 4"], Bool[Tensor, "b n"]]:
    """Returns the boxes of all images as one tensor, and which of them are real.

    Images with fewer boxes than others are filled up with boxes of zeros.
    """
    if not boxes:
        no_boxes = torch.zeros(0, 0, 4, device=device)
        none_real = torch.zeros(0, 0, dtype=torch.bool, device=device)
        return no_boxes, none_real
    # pad_sequence takes no empty list.
    stacked = pad_sequence(list(boxes), batch_first=True)
    # The lengths are known here, so that the device need not be asked which boxes are real.
    lengths = [len(each) for each in boxes]
    counts = on_device(lengths, stacked, torch.int64)
    longest = stacked.shape[1]
    indices = torch.arange(longest, device=stacked.device)
    is_real = indices < counts.unsqueeze(1)
    return stacked, is_real
