"""The data set that pretraining reads: one square crop of each image, as large as the patch grid.

The grid of patches is cut out of the crop later, on the training device (`relloc.patches`).
"""

import dataclasses
import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset

from relloc.data.cuts import Cut, apply, square_of_resized
from relloc.data.image_set import ImageSet, read_undecoded
from relloc.data.images import Undecoded, size_of
from relloc.data.loader import Reasons, Sample
from relloc.data.shards import ShardImages
from relloc.data.undecoded import UndecodedSample
from relloc.errors import UnreadableImage
from relloc.geometry import PatchGrid
from relloc.seeds import Use, seed_for

T = TypeVar("T")

# How many images in a row are tried before a crop is given up. More are hardly bad luck.
_MOST_TRIES = 50


@dataclasses.dataclass
class Crops(Dataset[Sample]):
    """A PyTorch data set of square crops, `grid.span_px` pixels a side.

    A key is (index, *numbers), such as (index, epoch). The same key returns the same crop in any
    worker or process: all randomness comes from a seed made of `use`, `seed`, the numbers and the
    index. `Sample.unreadable` names the images that could not be read.

    For training (`centered` false) a crop is at a random position, and mirrored left to right with
    probability `flip`. An image that can't be read is replaced by the next one, so that batches
    stay full. For evaluation (`centered` true) a crop is the center of the image, and no image is
    replaced.

    Example:
        >>> crops = Crops(images, grid, use=Use.CROP, seed=0, centered=False)
        >>> crops[3, 0].pixels.shape  # image 3 in epoch 0
    """

    images: ImageSet
    grid: PatchGrid
    _: dataclasses.KW_ONLY
    use: Use
    seed: int
    centered: bool
    flip: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        index, pixels, unreadable = self._first_readable(key, self._crop)
        return Sample(index=index, pixels=pixels, unreadable=unreadable)

    def undecoded(self, key: tuple[int, ...]) -> UndecodedSample:
        """Returns the crop of a key before it is decoded; `self[key]` decodes it."""
        index, found, unreadable = self._first_readable(key, self._undecoded)
        image, cut = found or (None, None)
        return UndecodedSample(index=index, image=image, cut=cut, unreadable=unreadable)

    def _first_readable(
        self, key: tuple[int, ...], read: Callable[[int, random.Random], T]
    ) -> tuple[int, T | None, Reasons]:
        """Returns the first image from that of the key on that `read` can read.

        That are its index, what was read of it (None if no image could be), and why those before
        could not.
        """
        index, *numbers = key
        seed = seed_for(self.use, self.seed, *numbers, index)
        unreadable: Reasons = {}
        tries = 1 if self.centered else min(_MOST_TRIES, len(self))
        for offset in range(tries):
            candidate = (index + offset) % len(self)
            # Each candidate starts with the same seed, however many before it were broken.
            try:
                found = read(candidate, random.Random(seed))
            except UnreadableImage as error:
                unreadable[self.images.source(candidate)] = str(error)
            else:
                return candidate, found, unreadable
        return index, None, unreadable

    def _crop(self, index: int, rng: random.Random) -> UInt8[np.ndarray, "s s 3"]:
        """Returns the crop of one image; `rng` is the only source of randomness."""
        # Packed images are read as arrays: an image that is only cut takes 1.4 times as long
        # through Pillow.
        if isinstance(self.images, ShardImages):
            image = self.images.read_array(index)
            height, width = image.shape[:2]
        else:
            image = self.images.read(index)
            height, width = image.height, image.width
        cut = self._cut(height, width, rng)
        if isinstance(image, np.ndarray):
            (step,) = cut.steps
            # An image that has its size already, as packing leaves it, is only cut.
            if step.is_copy:
                top, left, bottom, right = step.whole_box
                image = image[top:bottom, left:right]
                if not cut.mirrored:
                    return image
                # NumPy would take several times as long to copy columns in the other order.
                mirrored = Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                return np.asarray(mirrored)
            image = Image.fromarray(image)
        return np.asarray(apply(image, cut))

    def _undecoded(self, index: int, rng: random.Random) -> tuple[Undecoded, Cut]:
        """Returns one image before it is decoded, and how to cut the crop that `_crop` returns."""
        image = read_undecoded(self.images, index)
        return image, self._cut(*size_of(image), rng)

    def _cut(self, height: int, width: int, rng: random.Random) -> Cut:
        """Returns how the crop of an image of `height` x `width` px is made.

        Raises:
            UnreadableImage: the image is smaller than the grid, which may not be enlarged.
        """
        side = self.grid.span_px
        # The size that the image is resized to; one that is smaller than the grid may be refused.
        try:
            size = self.grid.resized(height, width, rng.random())
        except ValueError as error:
            raise UnreadableImage(str(error)) from error

        if self.centered:
            top = (size[0] - side) // 2
            left = (size[1] - side) // 2
        else:
            top = rng.randint(0, size[0] - side)
            left = rng.randint(0, size[1] - side)
        step = square_of_resized(height, width, size, (top, left), side)
        # Drawn last, so that the place of a crop does not depend on `flip`
        return Cut(steps=(step,), mirrored=not self.centered and rng.random() < self.flip)
