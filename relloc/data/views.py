"""The one fixed view of an image that frozen evaluations use: short side resized, center cropped."""

import numpy as np
import torch
from torch.utils.data import Dataset

from relloc.data.image_set import ImageSet
from relloc.data.images import crop_resized
from relloc.data.loader import Sample
from relloc.errors import UnreadableImage
from relloc.geometry import ShortSide


class CenterViews(Dataset[Sample]):
    """Short side `short_px`, then the central `crop_px` square (256 and 224: protocols.md 3.3, 3.7)."""

    def __init__(self, images: ImageSet, *, short_px: int, crop_px: int) -> None:
        if crop_px > short_px:
            raise ValueError(f"view.crop_px {crop_px} is larger than view.short_px {short_px}")
        self.images = images
        self.resize = ShortSide(px=short_px)
        self.crop_px = crop_px

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = self.images.read(index)
        except UnreadableImage as error:
            return Sample(index=index, pixels=None, unreadable={self.images.source(index): str(error)})
        height, width = self.resize.size(image.height, image.width, 0)
        corner = (round((height - self.crop_px) / 2), round((width - self.crop_px) / 2))
        cropped = crop_resized(image, (height, width), corner, self.crop_px)
        return Sample(index=index, pixels=torch.from_numpy(np.array(cropped)).permute(2, 0, 1))
