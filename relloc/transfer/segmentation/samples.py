"""How worker processes read images with their class maps, for training and for the test."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from relloc.data.annotations import SegmentedImages, read_with_class_map
from relloc.transfer.segmentation.transforms import CropSample, TrainingCrops


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeCrop:
    """Makes the training sample of an image: a random crop that its seed decides.

    Raises:
        UnreadableImage: the image or its class map can't be read.
    """

    images: SegmentedImages
    augment: TrainingCrops

    def __call__(self, index: int, seed: int) -> CropSample:
        # Both are read together, so that sizes that differ are noticed here.
        image, class_map = read_with_class_map(self.images, index)
        return self.augment.sample(image, class_map, seed)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TestedImage:
    """An image of the split, at its own size, and the true class of each pixel."""

    __test__ = False  # the name looks like that of a test to pytest

    index: int
    image: UInt8[np.ndarray, "h w 3"]
    class_map: UInt8[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeTested:
    """Reads an image and its class map as they are; the seed has no effect.

    Raises:
        UnreadableImage: the image or its class map can't be read.
    """

    images: SegmentedImages

    def __call__(self, index: int, seed: int) -> TestedImage:
        # Not resized: mIoU counts the pixels of the original class map.
        image, class_map = read_with_class_map(self.images, index)
        return TestedImage(index=index, image=image, class_map=class_map)
