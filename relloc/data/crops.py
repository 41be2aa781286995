"""What pretraining takes from each image: one square crop, as large as the grid's span."""

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

_MOST_TRIES = 50


@dataclasses.dataclass
class Crops(Dataset[Sample]):
    """Crops by keys (index, *numbers): the same key gives the same crop in any worker or process.

    What is random about a crop comes from the seed of `use` for `seed`, the numbers (such as an epoch) and the index.
    To train, crops lie anywhere, and an image that can't be read is replaced by the next one, so that batches stay
    full unless many in a row are broken. `centered` ones, to be asked about, are the middle of each image, and no
    image stands in for another. `Sample.unreadable` names what could not be read.
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
        for tried in range(1 if self.centered else min(_MOST_TRIES, len(self))):
            candidate = (index + tried) % len(self)
            try:
                pixels = self._crop(candidate, random.Random(seed))
            except UnreadableImage as error:
                unreadable[self.images.source(candidate)] = str(error)
            else:
                return Sample(index=candidate, pixels=pixels, unreadable=unreadable)
        return Sample(index=index, pixels=None, unreadable=unreadable)

    def _crop(self, index: int, rng: random.Random) -> UInt8[np.ndarray, "s s 3"]:
        images, side = self.images, self.grid.span_px
        # Through Pillow an image that is only cut takes 1.4 times as long.
        image = images.read_array(index) if isinstance(images, ShardImages) else images.read(index)
        height, width = (
            image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        )
        try:
            size = self.grid.resized(height, width, rng.random())
        except ValueError as error:
            raise UnreadableImage(str(error)) from error
        corner = ((size[0] - side) // 2, (size[1] - side) // 2)
        if not self.centered:
            corner = (rng.randint(0, size[0] - side), rng.randint(0, size[1] - side))
        if isinstance(image, np.ndarray):
            if image.shape[:2] == size:
                return image[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
            image = Image.fromarray(image)
        return np.asarray(crop_resized(image, size, corner, side))
