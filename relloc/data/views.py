"""The one fixed view of an image that frozen evaluations use: short side resized, center cropped."""

import dataclasses

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from relloc.data.image_set import ImageSet
from relloc.data.images import crop_resized
from relloc.errors import UnreadableImage
from relloc.geometry import ShortSide


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The view of image `index`, or why there is none."""

    index: int
    pixels: UInt8[Tensor, "3 s s"] | None
    problem: str = ""


class CenterViews(Dataset[View]):
    """Short side `short_px`, then the central `crop_px` square (256 and 224: protocols.md 3.3, 3.7)."""

    def __init__(self, images: ImageSet, *, short_px: int, crop_px: int) -> None:
        if crop_px > short_px:
            raise ValueError(f"view.crop_px {crop_px} is larger than view.short_px {short_px}")
        self.images = images
        self.resize = ShortSide(px=short_px)
        self.crop_px = crop_px

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> View:
        try:
            image = self.images.read(index)
        except UnreadableImage as error:
            return View(index=index, pixels=None, problem=f"{self.images.source(index)}: {error}")
        height, width = self.resize.size(image.height, image.width, 0)
        corner = (round((height - self.crop_px) / 2), round((width - self.crop_px) / 2))
        cropped = crop_resized(image, (height, width), corner, self.crop_px)
        return View(index=index, pixels=torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous())
