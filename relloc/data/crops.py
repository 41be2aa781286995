"""The data set that pretraining reads: one square crop of each image, as large as the patch grid.

The grid of patches is cut out of the crop later, on the training device (`relloc.patches`).
"""

import dataclasses
import random

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset

from relloc.data.image_set import ImageSet
from relloc.data.images import crop_resized
from relloc.data.loader import Sample
from relloc.data.shards import ShardImages
from relloc.errors import UnreadableImage
from relloc.geometry import PatchGrid
from relloc.seeds import Use, seed_for

# How many images in a row are tried before a crop is given up. More are hardly bad luck.
_MOST_TRIES = 50


@dataclasses.dataclass
class Crops(Dataset[Sample]):
    """A PyTorch data set of square crops, `grid.span_px` pixels a side.

    A key is (index, *numbers), such as (index, epoch). The same key returns the same crop in any
    worker or process: all randomness comes from a seed made of `use`, `seed`, the numbers and the
    index. `Sample.unreadable` names the images that could not be read.

    For training (`centered` false) a crop is at a random position, and an image that can't be read
    is replaced by the next one, so that batches stay full. For evaluation (`centered` true) it is
    the center of the image, and no image is replaced.

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

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        index, *numbers = key
        seed = seed_for(self.use, self.seed, *numbers, index)
        unreadable: dict[str, str] = {}
        tries = 1 if self.centered else min(_MOST_TRIES, len(self))
        for offset in range(tries):
            candidate = (index + offset) % len(self)
            # Each candidate starts with the same seed, however many before it were broken.
            try:
                pixels = self._crop(candidate, random.Random(seed))
            except UnreadableImage as error:
                unreadable[self.images.source(candidate)] = str(error)
            else:
                return Sample(index=candidate, pixels=pixels, unreadable=unreadable)
        return Sample(index=index, pixels=None, unreadable=unreadable)

    def _crop(self, index: int, rng: random.Random) -> UInt8[np.ndarray, "s s 3"]:
        """Returns the crop of one image; `rng` is the only source of randomness."""
        side = self.grid.span_px
        # Packed images are read as arrays: an image that is only cut takes 1.4 times as long
        # through Pillow.
        if isinstance(self.images, ShardImages):
            image = self.images.read_array(index)
            height, width = image.shape[:2]
        else:
            image = self.images.read(index)
            height, width = image.height, image.width

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

        if isinstance(image, np.ndarray):
            # An image that has this size already, as packing leaves it, is only cut.
            if image.shape[:2] == size:
                return image[top : top + side, left : left + side]
            image = Image.fromarray(image)
        return np.asarray(crop_resized(image, size, (top, left), side))
