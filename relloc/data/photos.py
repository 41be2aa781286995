"""A small data set for tests and first steps: `data=photos`, ten photographs cut into tiles.

The color photographs come with scikit-image and scikit-learn, so that nothing is downloaded. Tiles
overlap. A strip at the far end of each photograph is held out, and training tiles lie wholly in the
rest, so that the two splits share no pixel. The label of a tile is its photograph.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from relloc import checks
from relloc.data.image_set import Role, Splits
from relloc.data.images import read_rgb
from relloc.errors import DataError

# The package that each photograph comes with, and its path in there
_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}


def read_photo(name: str) -> Image.Image:
    """Returns one of the photographs in RGB. Raises `DataError` if its package is missing."""
    package, file = _FILES[name]
    # importlib.resources would import the package, which takes seconds.
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise DataError(
            f"data=photos needs {package}, which is not installed: install relloc again"
        )
    path = Path(folders[0], file)
    return read_rgb(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A square of a photograph by its left and top border and its side, in pixels."""

    photo: str
    left: int
    top: int
    side_px: int


def _starts(low: int, high: int, stride: float) -> list[int]:
    """Returns evenly spaced whole numbers from low to high, both included.

    They are about `stride` apart, but at least 1.
    """
    extent = high - low
    # The stride is changed a little, so that a whole number of steps reaches the end.
    n_steps = round(extent / max(stride, 1))
    n_steps = max(1, n_steps)
    # A set, as rounding may give the same number twice.
    starts = set()
    for step in range(n_steps + 1):
        offset = round(step * extent / n_steps)
        starts.add(low + offset)
    return sorted(starts)


def tiles_of(
    photo: str,
    width: int,
    height: int,
    *,
    split: Role,
    tiles: Sequence[float],
    stride: float,
) -> list[Tile]:
    """Returns the tiles of one photograph in one split, of every size in `tiles`.

    Sizes are shares of the photograph's short side, `stride` is a share of the tile. The held-out
    strip is as wide as the largest tile. It lies at the right of a photograph, or at the bottom of
    an upright one. `width` and `height` are in pixels.

    Raises:
        ValueError: a size is less than 1 px or leaves no room for training.
    """
    # Both orientations are treated alike, along the long side.
    short, long = sorted((width, height))
    # Tiles are squares, so that their sides are shares of the short side alone.
    sides = [round(tile * short) for tile in tiles]
    smallest = min(sides, default=0)
    strip = max(sides, default=0)
    # As wide as the largest tile, so that one row or column of tiles of that size fits into it.
    # The rest of the photograph has to hold a tile of every size, too.
    too_large = 2 * strip > long or strip > short
    if smallest < 1 or stride <= 0 or too_large:
        raise ValueError(
            f"data.source.tiles {list(tiles)}, stride {stride}: tiles are shares of a photograph's "
            "short side between 0 and 0.5, so that each has 1 px at least and half a photograph at "
            f"most (here {width}x{height} px); the stride is a share of the tile, above 0"
        )
    # The range of the split along the long side. No tile crosses the boundary.
    boundary = long - strip
    if split == "held_out":
        begin = boundary
        end = long
    else:
        begin = 0
        end = boundary
    is_upright = width < height
    # All sizes one after another, each in rows along the long side
    result = []
    for side in sides:
        stride_px = stride * side
        all_along = _starts(begin, end - side, stride_px)
        all_across = _starts(0, short - side, stride_px)
        for along, across in itertools.product(all_along, all_across):
            left = across if is_upright else along
            top = along if is_upright else across
            tile = Tile(photo=photo, left=left, top=top, side_px=side)
            result.append(tile)
    return result


class PhotoTiles:
    """The tiles of all photographs in one split: an `ImageSet` that is kept in memory."""

    name = "photos"
    classes = tuple(_FILES)

    def __init__(self, *, split: Role, tiles: Sequence[float], stride: float) -> None:
        self.split = split
        # Photographs are decoded once; tiles are cut out of them when they are read.
        self._photos = {photo: read_photo(photo) for photo in _FILES}
        self.tiles: list[Tile] = []
        for photo, image in self._photos.items():
            self.tiles += tiles_of(
                photo,
                image.width,
                image.height,
                split=split,
                tiles=tiles,
                stride=stride,
            )
        # The classes are the photographs, in the order of their names.
        labels = [self.classes.index(tile.photo) for tile in self.tiles]
        self.labels: Sequence[int] | None = labels

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, index: int) -> Image.Image:
        tile = self.tiles[index]
        box = (tile.left, tile.top, tile.left + tile.side_px, tile.top + tile.side_px)
        return self._photos[tile.photo].crop(box)

    def source(self, index: int) -> str:
        return self.tiles[index].photo

    def digest(self) -> str:
        hasher = hashlib.sha256(repr(self.tiles).encode())
        for image in self._photos.values():
            hasher.update(image.tobytes())
        return hasher.hexdigest()[:16]


def photos(*, tiles: Sequence[float], stride: float) -> Splits:
    """Returns both splits of the photographs, cut into tiles as `tiles_of` describes.

    Example:
        >>> splits = photos(tiles=[0.25, 0.5], stride=0.5)
    """
    checks.numbers("data.source.tiles", tiles, may_be_empty=True)
    checks.number("data.source.stride", stride)
    train = PhotoTiles(split="train", tiles=tiles, stride=stride)
    held_out = PhotoTiles(split="held_out", tiles=tiles, stride=stride)
    return Splits(train=train, held_out=held_out)
