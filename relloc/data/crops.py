"""What pretraining takes from each image: one square crop, as large as the grid's span."""

import random

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from relloc.data.image_set import ImageSet, ReadsArrays
from relloc.data.images import crop_resized
from relloc.data.loader import Sample
from relloc.errors import UnreadableImage
from relloc.geometry import PatchGrid

_MOST_TRIES = 50


class Crops(Dataset[Sample]):
    """Crops by (index, seed): the same pair gives the same crop in any worker, process or epoch.

    To train, crops lie anywhere, and an image that can't be read is replaced by the next one, so
    that batches stay full unless many in a row are broken. `centered` ones, to be asked about, are
    the middle of each image, and no image stands in for another. `Sample.unreadable` names what
    could not be read.
    """

    def __init__(self, images: ImageSet, grid: PatchGrid, *, centered: bool) -> None:
        self.images = images
        self.grid = grid
        self.centered = centered

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: tuple[int, int]) -> Sample:
        index, seed = sample
        unreadable: dict[str, str] = {}
        for tried in range(1 if self.centered else min(_MOST_TRIES, len(self))):
            place = (index + tried) % len(self)
            try:
                pixels = self._crop(place, random.Random(seed))
            except UnreadableImage as error:
                unreadable[self.images.source(place)] = str(error)
            else:
                return Sample(index=place, pixels=pixels, unreadable=unreadable)
        return Sample(index=index, pixels=None, unreadable=unreadable)

    def _crop(self, index: int, chance: random.Random) -> UInt8[Tensor, "3 s s"]:
        images = self.images  # through Pillow an image that is only cut takes 1.4 times as long
        image = images.read_array(index) if isinstance(images, ReadsArrays) else images.read(index)
        own = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        side = self.grid.span_px
        try:
            height, width = self.grid.resized(own[0], own[1], chance.random())
        except ValueError as error:
            raise UnreadableImage(str(error)) from error
        corner = ((height - side) // 2, (width - side) // 2)
        if not self.centered:
            corner = (chance.randint(0, height - side), chance.randint(0, width - side))
        if isinstance(image, np.ndarray) and own == (height, width):
            cropped = image[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        else:
            whole = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            cropped = np.array(crop_resized(whole, (height, width), corner, side))
        return torch.from_numpy(cropped).permute(2, 0, 1)
