"""`data=photos`: color photographs inside scikit-image and scikit-learn, cut into overlapping tiles.

Nothing is downloaded. Each photograph gives a strip at its far end to the held-out split; training
tiles lie wholly in the rest, so that the two splits share no pixel. The label of a tile is the
photograph it comes from.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.images import read_rgb
from relloc.errors import DataError

Split = Literal["train", "held_out"]
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
    """One of the photographs, in RGB, lying on its longer side."""
    package, file = _FILES[name]
    spec = importlib.util.find_spec(
        package
    )  # importlib.resources would import it, which takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data=photos needs {package}, which is not installed: install relloc again"
        )
    return read_rgb(Path(spec.submodule_search_locations[0], file))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A square of a photograph: left, top and side in pixels."""

    photo: str
    left: int
    top: int
    side_px: int


def _starts(low: int, high: int, stride: float) -> list[int]:
    """Evenly spaced whole numbers from low to high, both included, about `stride` (1 or more) apart."""
    steps = max(1, round((high - low) / max(stride, 1)))
    return sorted({low + round(step * (high - low) / steps) for step in range(steps + 1)})


def tiles_of(
    photo: str, width: int, height: int, *, split: Split, tiles: Sequence[float], stride: float
) -> list[Tile]:
    """The tiles of one photograph in one split, at every size in `tiles`.

    Sizes are shares of the photograph's short side, `stride` a share of the tile. The held-out
    strip is as wide as the largest tile and lies at the right of a photograph, or at the bottom of
    an upright one.

    Raises:
        ValueError: the held-out strip leaves no room for training.
    """
    short, long = sorted((width, height))
    sides = [round(tile * short) for tile in tiles]
    strip = max(sides, default=0)
    if min(sides, default=0) < 1 or stride <= 0 or 2 * strip > long or strip > short:
        raise ValueError(
            f"data.source.tiles {list(tiles)}, stride {stride}: tiles are shares of a photograph's short side between "
            f"0 and 0.5, so that each has 1 px at least and half a photograph at most (here {width}x{height} px); the "
            "stride is a share of the tile, above 0"
        )
    first, last = (long - strip, long) if split == "held_out" else (0, long - strip)
    found = []
    for side in sides:
        for along in _starts(first, last - side, stride * side):
            for across in _starts(0, short - side, stride * side):
                left, top = (along, across) if width >= height else (across, along)
                found.append(Tile(photo=photo, left=left, top=top, side_px=side))
    return found


class PhotoTiles:
    """An `ImageSet` of tiles; the photographs are decoded once and kept in memory."""

    name = "photos"
    classes = tuple(_FILES)

    def __init__(self, *, split: Split, tiles: Sequence[float], stride: float) -> None:
        self.split = split
        self._photos = {photo: read_photo(photo) for photo in _FILES}
        self.tiles: list[Tile] = []
        for photo, image in self._photos.items():
            self.tiles += tiles_of(photo, *image.size, split=split, tiles=tiles, stride=stride)
        self.labels: Sequence[int] | None = [self.classes.index(tile.photo) for tile in self.tiles]

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
    """Both splits of the embedded photographs, in tiles as `tiles_of` makes them."""
    checks.numbers("data.source.tiles", tiles, may_be_empty=True)
    checks.number("data.source.stride", stride)
    train, held_out = (
        PhotoTiles(split=split, tiles=tiles, stride=stride) for split in ("train", "held_out")
    )
    return Splits(train=train, held_out=held_out)
