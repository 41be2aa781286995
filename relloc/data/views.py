"""What evaluations take of an image: the still views that are measured on, the random ones that are trained on."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from relloc.data.image_set import ImageSet
from relloc.data.images import crop_resized
from relloc.data.loader import Sample
from relloc.errors import UnreadableImage
from relloc.geometry import ShortSide

_MOST_TRIES = 10  # torchvision's, before it takes the middle of the image


@runtime_checkable
class View(Protocol):
    """A square of an image. All its luck comes from `chance`; its `str` says in a protocol what it is."""

    def __call__(self, image: Image.Image, chance: random.Random) -> UInt8[Tensor, "3 s s"]: ...

    def __str__(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Center:
    """Short side `short_px`, then the central `crop_px` square (256 and 224: protocols.md 3.3, 3.7)."""

    short_px: int
    crop_px: int

    def __post_init__(self) -> None:
        _check_fits(self.crop_px, self.short_px)

    def __str__(self) -> str:
        return f"center view {self.short_px}/{self.crop_px} px"

    def __call__(self, image: Image.Image, chance: random.Random) -> UInt8[Tensor, "3 s s"]:
        size = ShortSide(px=self.short_px).size(image.height, image.width, 0)
        return _pixels(crop_resized(image, size, _central(size, self.crop_px), self.crop_px))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squash:
    """Short side `short_px`, then all of it to `side_px` square, the aspect lost (256 and 224: protocols.md 3.1).

    Two bilinear resizes, each rounded to 8 bits, as published.
    """

    short_px: int
    side_px: int

    def __post_init__(self) -> None:
        _check_is_a_side("view.short_px", self.short_px)
        _check_is_a_side("view.side_px", self.side_px)

    def __str__(self) -> str:
        return f"whole image at short side {self.short_px} px squashed to {self.side_px} x {self.side_px} px"

    def __call__(self, image: Image.Image, chance: random.Random) -> UInt8[Tensor, "3 s s"]:
        height, width = ShortSide(px=self.short_px).size(image.height, image.width, 0)
        return _pixels(_resized(_resized(image, width, height), self.side_px, self.side_px))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResized:
    """A box of random area and aspect, resized to `crop_px` square, flipped with probability `flip`.

    Defaults are those of torchvision's RandomResizedCrop and of the published flip (protocols.md 3.3, 3.4,
    3.6): `scale` bounds the box's share of the area, `ratio` its width over height, log-uniform.
    """

    crop_px: int
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_is_a_side("augment.crop_px", self.crop_px)
        _check_range("augment.scale", self.scale, most=1.0)
        _check_range("augment.ratio", self.ratio, most=math.inf)
        _check_probability(self.flip)

    def __str__(self) -> str:
        area, aspect = ("..".join(f"{end:.3g}" for end in ends) for ends in (self.scale, self.ratio))
        return f"random resized crops of {self.crop_px} px (area {area}, aspect {aspect}), flip {self.flip}"

    def __call__(self, image: Image.Image, chance: random.Random) -> UInt8[Tensor, "3 s s"]:
        top, left, bottom, right = self.box(image.height, image.width, chance)
        # Cut before resizing, as torchvision does: at its rim, `resize(box=)` also reads what lies beyond the box.
        cut = image.crop((left, top, right, bottom))
        return _pixels(_flipped(_resized(cut, self.crop_px, self.crop_px), self.flip, chance))

    def box(self, height: int, width: int, chance: random.Random) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) of a random box in a `height` x `width` image."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_MOST_TRIES):
            area = height * width * chance.uniform(*self.scale)
            aspect = math.exp(chance.uniform(low, high))
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                top, left = chance.randint(0, height - box_height), chance.randint(0, width - box_width)
                return top, left, top + box_height, left + box_width
        return self._middle(height, width)

    def _middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        box_height = min(height, max(1, round(width / self.ratio[0])))
        box_width = min(width, max(1, round(height * self.ratio[1])))
        top, left = (height - box_height) // 2, (width - box_width) // 2
        return top, left, top + box_height, left + box_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Short side `short_px`, its central square, of that a random `crop_px` square, flipped with probability `flip`.

    256, 224 and 0.5 are Places205's (protocols.md 3.5).
    """

    short_px: int
    crop_px: int
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_fits(self.crop_px, self.short_px)
        _check_probability(self.flip)

    def __str__(self) -> str:
        return f"random crops of {self.crop_px} px from the central {self.short_px} px, flip {self.flip}"

    def __call__(self, image: Image.Image, chance: random.Random) -> UInt8[Tensor, "3 s s"]:
        size = ShortSide(px=self.short_px).size(image.height, image.width, 0)
        top, left = _central(size, self.short_px)
        room = self.short_px - self.crop_px
        corner = (top + chance.randint(0, room), left + chance.randint(0, room))
        return _pixels(_flipped(crop_resized(image, size, corner, self.crop_px), self.flip, chance))


class Views(Dataset[Sample]):
    """Views by (index, seed): the same pair gives the same view in any worker, process or epoch.

    An image that can't be read has no pixels; `Sample.unreadable` says why.
    """

    def __init__(self, images: ImageSet, view: View) -> None:
        self.images = images
        self.view = view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: tuple[int, int]) -> Sample:
        index, seed = sample
        try:
            image = self.images.read(index)
        except UnreadableImage as error:
            return Sample(index=index, pixels=None, unreadable={self.images.source(index): str(error)})
        return Sample(index=index, pixels=self.view(image, random.Random(seed)))


def _pixels(image: Image.Image) -> UInt8[Tensor, "3 s s"]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _flipped(image: Image.Image, flip: float, chance: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < flip else image


def _central(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Top left corner (row, column) of the central square, rounded as torchvision does."""
    return round((size[0] - side_px) / 2), round((size[1] - side_px) / 2)


def _check_is_a_side(name: str, px: object) -> None:
    if not isinstance(px, int) or isinstance(px, bool) or px < 1:
        raise ValueError(f"{name} is {px}: a side is a whole number of px, at least 1")


def _check_fits(crop_px: Any, short_px: Any) -> None:
    _check_is_a_side("view.crop_px", crop_px)
    _check_is_a_side("view.short_px", short_px)
    if crop_px > short_px:
        raise ValueError(f"view.crop_px {crop_px} is larger than view.short_px {short_px}")


def _check_range(name: str, ends: Any, *, most: float) -> None:
    are_two = isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))
    if not are_two or not 0 < ends[0] <= ends[1] <= most:
        raise ValueError(f"{name} is {ends}: give two numbers above 0, the lower first, up to {most}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_probability(flip: Any) -> None:
    if not _is_number(flip) or not 0 <= flip <= 1:
        raise ValueError(f"augment.flip is {flip}, not a probability from 0 to 1")
