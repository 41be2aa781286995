"""Image transforms of evaluations: the squares of an image that a backbone is trained or tested on.

`Center` and `Squash` are deterministic and used for testing; `RandomResized`, `RandomCrop` and
`RandomSquare` are random and used for training. `Views` is the PyTorch data set of such squares.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset

from relloc import checks
from relloc.data.cuts import Cut, Resampling, apply, square_of_resized, whole
from relloc.data.image_set import ImageSet, read_undecoded
from relloc.data.images import size_of
from relloc.data.loader import Reasons, Sample
from relloc.data.undecoded import UndecodedSample
from relloc.errors import UnreadableImage, UsageError
from relloc.geometry import ShortSide

# RandomResizedCrop of torchvision tries as often before it takes the center of the image.
_MOST_TRIES = 10

ViewPixels = UInt8[np.ndarray, "s s 3"]  # a view as RGB values


@runtime_checkable
class View(Protocol):
    """A transform that returns a square of an image; `rng` is its only source of randomness.

    Its `str` describes it in the protocols of results.
    """

    def __call__(self, image: Image.Image, rng: random.Random) -> ViewPixels: ...


@runtime_checkable
class CutView(View, Protocol):
    """A view that follows from the size of an image alone, so that a device can make it.

    `cut` returns how; `rng` is its only source of randomness. Called on an image, the view makes
    the same square by Pillow.
    """

    def cut(self, height: int, width: int, rng: random.Random) -> Cut: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Center:
    """A resize of the image's short side to `short_px`, then the central square of `crop_px`.

    256 and 224 px are published settings (docs/protocols.md 3.3, 3.7).
    """

    short_px: int
    crop_px: int

    def __post_init__(self) -> None:
        _check_fits(self.crop_px, self.short_px)

    def __str__(self) -> str:
        return f"center view {self.short_px}/{self.crop_px} px"

    def __call__(self, image: Image.Image, rng: random.Random) -> ViewPixels:
        return _made(self, image, rng)

    def cut(self, height: int, width: int, rng: random.Random) -> Cut:
        # Only the pixels of the crop are resized: the others would be thrown away.
        size = _resized_size(height, width, self.short_px)
        corner = _central(size, self.crop_px)
        return Cut(steps=(square_of_resized(height, width, size, corner, self.crop_px),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squash:
    """A resize of the image's short side to `short_px`, then of the whole image to a square.

    The square has `side_px` pixels a side; the aspect ratio is lost. 256 and 224 px are published
    settings, as are two bilinear resizes, each rounded to 8 bits (docs/protocols.md 3.1).
    """

    short_px: int
    side_px: int

    def __post_init__(self) -> None:
        checks.whole("view.short_px", self.short_px)
        checks.whole("view.side_px", self.side_px)

    def __str__(self) -> str:
        return (
            f"whole image at short side {self.short_px} px "
            f"squashed to {self.side_px} x {self.side_px} px"
        )

    def __call__(self, image: Image.Image, rng: random.Random) -> ViewPixels:
        return _made(self, image, rng)

    def cut(self, height: int, width: int, rng: random.Random) -> Cut:
        # Two resizes: a single one would give other pixels than the published ones.
        size = _resized_size(height, width, self.short_px)
        square = (self.side_px, self.side_px)
        return Cut(steps=(whole(height, width, size), whole(*size, square)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResized:
    """A box of random area and aspect ratio, resized to a square of `crop_px`, randomly flipped.

    `scale` is the range of the box's share of the image area (uniform), `ratio` that of its width
    divided by its height (log-uniform), `flip` the probability of a horizontal flip. The defaults
    are those of torchvision's RandomResizedCrop and the published flip (docs/protocols.md 3.3,
    3.4, 3.6).
    """

    crop_px: int
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        checks.whole("augment.crop_px", self.crop_px)
        # No box is larger than the image.
        _check_range("augment.scale", self.scale, most=1.0)
        _check_range("augment.ratio", self.ratio, most=math.inf)
        _check_flip(self.flip)

    def __str__(self) -> str:
        area = _range_in_words(self.scale)
        aspect = _range_in_words(self.ratio)
        return (
            f"random resized crops of {self.crop_px} px (area {area}, aspect {aspect}), "
            f"flip {self.flip}"
        )

    def __call__(self, image: Image.Image, rng: random.Random) -> ViewPixels:
        return _made(self, image, rng)

    def cut(self, height: int, width: int, rng: random.Random) -> Cut:
        top, left, bottom, right = self.box(height, width, rng)
        # The box is cut before it is resized, as torchvision does, so that no pixel beyond its
        # border is read.
        step = Resampling(
            within=(top, left, bottom, right),
            box=(0, 0, bottom - top, right - left),
            size=(self.crop_px, self.crop_px),
        )
        return Cut(steps=(step,), mirrored=_is_flipped(self.flip, rng))

    def box(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Returns a random box (top, left, bottom, right) in an image of `height` x `width` px."""
        narrowest, widest = self.ratio
        lowest = math.log(narrowest)
        highest = math.log(widest)
        # A box of random area and aspect ratio may be larger than the image: try again.
        for _ in range(_MOST_TRIES):
            # The order of the draws is fixed: another one would give other boxes.
            share = rng.uniform(*self.scale)
            area = height * width * share
            log_aspect = rng.uniform(lowest, highest)
            aspect = math.exp(log_aspect)
            box_width = round(math.sqrt(area * aspect))
            box_height = round(math.sqrt(area / aspect))
            fits = box_width <= width and box_height <= height
            # Of a tiny image, a side may be rounded to 0.
            if fits and box_width > 0 and box_height > 0:
                top = rng.randint(0, height - box_height)
                left = rng.randint(0, width - box_width)
                break
        # After all tries, torchvision takes the largest central box of an allowed aspect ratio.
        else:
            box_height = round(width / narrowest)
            box_height = min(height, max(1, box_height))
            box_width = round(height * widest)
            box_width = min(width, max(1, box_width))
            top = (height - box_height) // 2
            left = (width - box_width) // 2
        bottom = top + box_height
        right = left + box_width
        return top, left, bottom, right


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A random square of `crop_px` within the central square of the image, randomly flipped.

    First the image's short side is resized to `short_px`. `flip` is the probability of a
    horizontal flip. 256 px, 224 px and 0.5 are the settings of Places205 (docs/protocols.md 3.5).
    """

    short_px: int
    crop_px: int
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_fits(self.crop_px, self.short_px)
        _check_flip(self.flip)

    def __str__(self) -> str:
        return (
            f"random crops of {self.crop_px} px from the central {self.short_px} px, "
            f"flip {self.flip}"
        )

    def __call__(self, image: Image.Image, rng: random.Random) -> ViewPixels:
        return _made(self, image, rng)

    def cut(self, height: int, width: int, rng: random.Random) -> Cut:
        # The corner of the central square, in pixels of the resized image
        size = _resized_size(height, width, self.short_px)
        top, left = _central(size, self.short_px)
        # The crop stays within the central square, however long the image is.
        largest_shift = self.short_px - self.crop_px
        top += rng.randint(0, largest_shift)
        left += rng.randint(0, largest_shift)
        step = square_of_resized(height, width, size, (top, left), self.crop_px)
        return Cut(steps=(step,), mirrored=_is_flipped(self.flip, rng))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSquare:
    """A square of random size and place, resized to `crop_px` pixels a side, randomly flipped.

    The side of the square is `crop_px` times a number within `scale` (uniform), as far as the image
    is so large. Pixels are interpolated linearly without antialiasing. `flip` is the probability of
    a horizontal flip. The defaults are those of voc-classification (docs/protocols.md 3.15).
    """

    crop_px: int
    scale: Sequence[float] = (0.5, 2.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        checks.whole("augment.crop_px", self.crop_px)
        _check_range("augment.scale", self.scale, most=math.inf)
        _check_flip(self.flip)

    def __str__(self) -> str:
        rounded = [f"{end:.3g}" for end in self.scale]
        ends = " to ".join(rounded)
        return (
            f"random squares of {ends} times {self.crop_px} px resized to {self.crop_px} px, "
            f"flip {self.flip}"
        )

    def __call__(self, image: Image.Image, rng: random.Random) -> ViewPixels:
        top, left, bottom, right = self.box(
            image.height,
            image.width,
            rng,
        )
        # EXTENT takes borders in parts of a pixel, which `crop` would round.
        resized = image.transform(
            (self.crop_px, self.crop_px),
            Image.Transform.EXTENT,
            (left, top, right, bottom),
            resample=Image.Resampling.BILINEAR,
        )
        if _is_flipped(self.flip, rng):
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(resized)

    def box(self, height: int, width: int, rng: random.Random) -> tuple[float, ...]:
        """Returns a random square (top, left, bottom, right) in an image of `height` x `width`."""
        least, most = self.scale
        # The square lies within the image, also where that is smaller than the smallest square.
        highest_scale = height / self.crop_px
        widest_scale = width / self.crop_px
        largest = min(most, highest_scale, widest_scale)
        smallest = min(least, largest)
        side = self.crop_px * rng.uniform(smallest, largest)
        # Rounding could lead beyond the border by a part of a pixel, which would be black.
        side = min(side, height, width)
        top = rng.uniform(0, height - side)
        left = rng.uniform(0, width - side)
        bottom = min(top + side, height)
        right = min(left + side, width)
        return top, left, bottom, right


@dataclasses.dataclass
class Views(Dataset[Sample]):
    """A PyTorch data set of views of images.

    A key is (index, seed): the same key returns the same view in any worker, process or epoch. The
    sample of an image that can't be read has no pixels; `Sample.unreadable` gives the reason.

    With `draw`, a key has a second seed behind these, and samples have the random numbers that
    `draw` returns for it. They are drawn here since worker processes have time for it.

    Example:
        >>> views = Views(images, Center(short_px=256, crop_px=224))
        >>> views[3, 0].pixels.shape
        (224, 224, 3)
    """

    images: ImageSet
    view: View
    draw: Callable[[int], Sequence[float]] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        # The seed travels with the key, so that workers need no state of their own.
        index, seed, *seeds_to_draw = key
        try:
            image = self.images.read(index)
        except UnreadableImage as error:
            # An evaluation goes on without the image, and reports it.
            reasons = self._reasons(index, error)
            return Sample(index=index, pixels=None, unreadable=reasons)
        # A generator of its own for each sample, so that no other sample changes this one.
        rng = random.Random(seed)
        pixels = self.view(image, rng)
        return Sample(index=index, pixels=pixels, drawn=self._drawn(seeds_to_draw))

    def undecoded(self, key: tuple[int, ...]) -> UndecodedSample:
        """Returns the sample of a key before it is decoded; the view has to be a `CutView`."""
        index, seed, *seeds_to_draw = key
        try:
            image = read_undecoded(self.images, index)
        except UnreadableImage as error:
            reasons = self._reasons(index, error)
            return UndecodedSample(index=index, image=None, unreadable=reasons)
        height, width = size_of(image)
        view = cast(CutView, self.view)
        cut = view.cut(height, width, random.Random(seed))
        return UndecodedSample(index=index, image=image, cut=cut, drawn=self._drawn(seeds_to_draw))

    def _drawn(self, seeds: Sequence[int]) -> Sequence[float] | None:
        """Returns the random numbers of a sample: those of its only seed, or None for none."""
        if not self.draw:
            return None
        [seed] = seeds
        return self.draw(seed)

    def _reasons(self, index: int, error: UnreadableImage) -> Reasons:
        name = self.images.source(index)
        return {name: str(error)}


def _made(view: CutView, image: Image.Image, rng: random.Random) -> ViewPixels:
    """Returns the square that a view draws of an image."""
    cut = view.cut(image.height, image.width, rng)
    return np.asarray(apply(image, cut))


def _resized_size(height: int, width: int, short_px: int) -> tuple[int, int]:
    """Returns the height and width of an image whose short side is resized to `short_px`."""
    short_side = ShortSide(px=short_px)
    return short_side.size(height, width, 0)


def _is_flipped(flip: float, rng: random.Random) -> bool:
    """Returns whether an image is mirrored left to right: true with probability `flip`."""
    # A number is drawn in any case, so that later draws do not depend on `flip`.
    return rng.random() < flip


def _central(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Returns the top left corner (row, column) of the central square, rounded as torchvision."""
    height, width = size
    top = round((height - side_px) / 2)
    left = round((width - side_px) / 2)
    return top, left


def check_view(setting: str, view: object) -> None:
    """Raises `UsageError` unless `view` is a `View`; `setting` is its name in the configuration."""
    if not isinstance(view, View):
        raise UsageError(
            f"{setting} is {view}: an evaluation sees images in a view, "
            "such as relloc.data.views.Center"
        )


def check_cut_view(setting: str, view: object) -> None:
    """Raises `UsageError` unless a device can make `view`; `setting` is its name."""
    if not isinstance(view, CutView):
        raise UsageError(
            f"decode=device, but {setting} is {view}, which can't be cut on a device: give "
            "decode=cpu, or a view that is a relloc.data.views.CutView, such as Center"
        )


def _check_fits(crop_px: Any, short_px: Any) -> None:
    checks.whole("view.crop_px", crop_px)
    checks.whole("view.short_px", short_px)
    if crop_px > short_px:
        raise UsageError(f"view.crop_px {crop_px} is larger than view.short_px {short_px}")


def _check_flip(flip: Any) -> None:
    checks.number("augment.flip", flip, at_least=0, at_most=1)


def _range_in_words(ends: Sequence[float]) -> str:
    # Three digits, so that 3/4 and 4/3 are 0.75 and 1.33.
    rounded = [f"{end:.3g}" for end in ends]
    return "..".join(rounded)


def _check_range(setting: str, ends: Any, *, most: float) -> None:
    checks.numbers(setting, ends, above=0, at_most=most)
    is_range = len(ends) == 2 and ends[0] <= ends[1]
    if not is_range:
        raise UsageError(f"{setting} is {ends}: give two numbers, the lower first")
