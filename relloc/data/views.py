"""What evaluations take of an image: the still views that are measured on, the random ones that are trained on."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.data.images import crop_resized
from relloc.data.loader import Sample
from relloc.errors import UnreadableImage, UsageError
from relloc.geometry import ShortSide

_MOST_TRIES = 10  # torchvision's, before it takes the middle of the image

Pixels = UInt8[np.ndarray, "s s 3"]


@runtime_checkable
class View(Protocol):
    """A square of an image. All that is random about it comes from `rng`; its `str` says in a protocol what it is."""

    def __call__(self, image: Image.Image, rng: random.Random) -> Pixels: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Center:
    """Short side `short_px`, then the central `crop_px` square (256 and 224: protocols.md 3.3, 3.7)."""

    short_px: int
    crop_px: int

    def __post_init__(self) -> None:
        _check_fits(self.crop_px, self.short_px)

    def __str__(self) -> str:
        return f"center view {self.short_px}/{self.crop_px} px"

    def __call__(self, image: Image.Image, rng: random.Random) -> Pixels:
        size = ShortSide(px=self.short_px).size(image.height, image.width, 0)
        return np.asarray(crop_resized(image, size, _central(size, self.crop_px), self.crop_px))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squash:
    """Short side `short_px`, then all of it to `side_px` square, the aspect lost (256 and 224: protocols.md 3.1).

    Two bilinear resizes, each rounded to 8 bits, as published.
    """

    short_px: int
    side_px: int

    def __post_init__(self) -> None:
        checks.whole("view.short_px", self.short_px)
        checks.whole("view.side_px", self.side_px)

    def __str__(self) -> str:
        return f"whole image at short side {self.short_px} px squashed to {self.side_px} x {self.side_px} px"

    def __call__(self, image: Image.Image, rng: random.Random) -> Pixels:
        height, width = ShortSide(px=self.short_px).size(image.height, image.width, 0)
        return np.asarray(_resized(_resized(image, width, height), self.side_px, self.side_px))


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
        checks.whole("augment.crop_px", self.crop_px)
        _check_range("augment.scale", self.scale, most=1.0)
        _check_range("augment.ratio", self.ratio, most=math.inf)
        checks.number("augment.flip", self.flip, at_least=0, at_most=1)

    def __str__(self) -> str:
        area, aspect = (
            "..".join(f"{end:.3g}" for end in ends) for ends in (self.scale, self.ratio)
        )
        return f"random resized crops of {self.crop_px} px (area {area}, aspect {aspect}), flip {self.flip}"

    def __call__(self, image: Image.Image, rng: random.Random) -> Pixels:
        top, left, bottom, right = self.box(image.height, image.width, rng)
        # Cut before resizing, as torchvision does: at its rim, `resize(box=)` also reads what lies beyond the box.
        cut = image.crop((left, top, right, bottom))
        return np.asarray(_flipped(_resized(cut, self.crop_px, self.crop_px), self.flip, rng))

    def box(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) of a random box in a `height` x `width` image."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_MOST_TRIES):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
                break
        else:  # the middle of the image, as torchvision takes it
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
        checks.number("augment.flip", self.flip, at_least=0, at_most=1)

    def __str__(self) -> str:
        return f"random crops of {self.crop_px} px from the central {self.short_px} px, flip {self.flip}"

    def __call__(self, image: Image.Image, rng: random.Random) -> Pixels:
        size = ShortSide(px=self.short_px).size(image.height, image.width, 0)
        top, left = _central(size, self.short_px)
        room = self.short_px - self.crop_px
        corner = (top + rng.randint(0, room), left + rng.randint(0, room))
        return np.asarray(_flipped(crop_resized(image, size, corner, self.crop_px), self.flip, rng))


@dataclasses.dataclass
class Views(Dataset[Sample]):
    """Views by (index, seed): the same pair gives the same view in any worker, process or epoch.

    An image that can't be read has no pixels; `Sample.unreadable` says why.
    """

    images: ImageSet
    view: View

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: tuple[int, int]) -> Sample:
        index, seed = sample
        try:
            image = self.images.read(index)
        except UnreadableImage as error:
            return Sample(
                index=index, pixels=None, unreadable={self.images.source(index): str(error)}
            )
        return Sample(index=index, pixels=self.view(image, random.Random(seed)))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _flipped(image: Image.Image, flip: float, rng: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < flip else image


def _central(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Top left corner (row, column) of the central square, rounded as torchvision does."""
    return round((size[0] - side_px) / 2), round((size[1] - side_px) / 2)


def check_view(setting: str, view: object) -> None:
    """Raises `UsageError` unless `view` can be taken of an image."""
    if not isinstance(view, View):
        raise UsageError(
            f"{setting} is {view}: an evaluation sees images in a view, such as relloc.data.views.Center"
        )


def _check_fits(crop_px: Any, short_px: Any) -> None:
    checks.whole("view.crop_px", crop_px)
    checks.whole("view.short_px", short_px)
    if crop_px > short_px:
        raise UsageError(f"view.crop_px {crop_px} is larger than view.short_px {short_px}")


def _check_range(setting: str, ends: Any, *, most: float) -> None:
    checks.numbers(setting, ends, above=0, at_most=most)
    if len(ends) != 2 or ends[0] > ends[1]:
        raise UsageError(f"{setting} is {ends}: give two numbers, the lower first")
