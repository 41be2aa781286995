"""Draws contact sheets: rows of patches with captions, such as a patch and its nearest neighbors.

Sheets are PNG files. One that is there already is replaced as a whole, since a tracker may be
reading it.

Example:
    >>> pixels = read_patches(images, patches.images[:3], patches.boxes[:3], px=96, config=config)
    >>> first = Tile(pixels=pixels[0], caption=("query", "cat.jpg"), framed=True)
    >>> others = [Tile(pixels=each, caption=("0.93",)) for each in pixels[1:]]
    >>> save_contact_sheets([[first, *others]], folder, "neighbors", title="fc6 of run 3")
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.features.source import EncodeConfig
from relloc.files import path_as_text, writing
from relloc.studies.image_reading import read_each
from relloc.terminal import escaped

Rgb = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels of the stored image
Pixels = UInt8[np.ndarray, "h w 3"]

_TEXT_SIZE = 12
_LINE = 15  # height of a line of a caption
_TITLE_SIZE = 15
_GAP = 6  # between tiles
_SECTION_GAP = 18  # behind framed tiles, and between rows
_MARGIN = 12  # around the sheet
_FRAME = 3  # width of a frame; it lies around the tile
_WHITE: Rgb = (255, 255, 255)
_BLACK: Rgb = (20, 20, 20)
_GRAY: Rgb = (205, 205, 205)
_FRAME_COLOR: Rgb = (214, 39, 40)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """A patch of a contact sheet.

    Attributes:
        pixels: RGB values of a square; None where the image can't be read, which is a gray square.
        caption: lines below it; each is shortened in its middle to the width of the tile.
        framed: whether it has a red frame and a gap behind it, as queries have.
    """

    pixels: Pixels | None
    caption: Sequence[str] = ()
    framed: bool = False


def save_contact_sheets(
    rows: Sequence[Sequence[Tile]],
    folder: Path,
    name: str,
    *,
    title: str,
    tile_px: int = 112,
    rows_per_sheet: int = 12,
) -> list[Path]:
    """Saves rows of tiles below a title, and returns the files.

    They are NAME.png or, where there are more rows than `rows_per_sheet`, NAME_1.png, NAME_2.png …
    Tiles are enlarged or reduced to `tile_px`. Rows may have different numbers of tiles.
    """
    n_sheets = math.ceil(len(rows) / rows_per_sheet)
    paths = []
    for number in range(n_sheets):
        first = number * rows_per_sheet
        sheet_rows = rows[first : first + rows_per_sheet]
        path = folder / f"{name}.png"
        sheet_title = title
        if n_sheets > 1:
            path = folder / f"{name}_{number + 1}.png"
            sheet_title = f"{title} (sheet {number + 1} of {n_sheets})"
        sheet = contact_sheet(sheet_rows, title=sheet_title, tile_px=tile_px)
        with writing(path) as file:
            sheet.save(file, format="png")
        paths.append(path)
    return paths


def contact_sheet(rows: Sequence[Sequence[Tile]], *, title: str, tile_px: int) -> Image.Image:
    """Returns one sheet with all rows."""
    row_heights = [tile_px + _LINE * _most_lines(row) for row in rows]
    title_font = ImageFont.load_default(_TITLE_SIZE)
    title_text = _printable(title)
    title_width = math.ceil(title_font.getlength(title_text))
    row_widths = [_row_width(row, tile_px) for row in rows]
    top = _MARGIN + _TITLE_SIZE + _SECTION_GAP
    width = 2 * _MARGIN + max([title_width, *row_widths])
    height = top + sum(row_heights) + _SECTION_GAP * len(rows)
    sheet = Image.new("RGB", (width, height), _WHITE)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title_text, fill=_BLACK, font=title_font)
    for row, row_height in zip(rows, row_heights, strict=True):
        left = _MARGIN
        for tile in row:
            _draw_tile(sheet, pen, tile, left, top, tile_px)
            left += _step(tile, tile_px)
        top += row_height + _SECTION_GAP
    return sheet


def _most_lines(row: Sequence[Tile]) -> int:
    return max([0, *(len(tile.caption) for tile in row)])


def _step(tile: Tile, tile_px: int) -> int:
    """Returns how far right of a tile's left side the next tile begins."""
    return tile_px + (_SECTION_GAP if tile.framed else _GAP)


def _row_width(row: Sequence[Tile], tile_px: int) -> int:
    return sum(_step(tile, tile_px) for tile in row)


def _draw_tile(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    tile: Tile,
    left: int,
    top: int,
    tile_px: int,
) -> None:
    """Draws a tile, whose frame reaches into the gaps around it, and its caption."""
    if tile.framed:
        frame = (
            left - _FRAME,
            top - _FRAME,
            left + tile_px + _FRAME - 1,
            top + tile_px + _FRAME - 1,
        )
        pen.rectangle(frame, fill=_FRAME_COLOR)
    square = Image.new("RGB", (tile_px, tile_px), _GRAY)
    if tile.pixels is not None:
        square = Image.fromarray(tile.pixels)
        square = square.resize((tile_px, tile_px), Image.Resampling.BICUBIC)
    sheet.paste(square, (left, top))
    font = ImageFont.load_default(_TEXT_SIZE)
    # The frame must not cover the text.
    text_top = top + tile_px + _FRAME
    for line in tile.caption:
        text = _shortened(_printable(line), font, tile_px)
        pen.text((left, text_top), text, fill=_BLACK, font=font)
        text_top += _LINE


def _printable(text: str) -> str:
    """Returns a text, such as a file's name, without what a font can't draw as a line."""
    return escaped(path_as_text(text))


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Returns the text, or as much of its beginning and end as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    # The ends of file names tell images apart, so that the middle is left out.
    for n_kept in range(len(text) - 1, 0, -1):
        n_first = n_kept // 2
        n_last = n_kept - n_first
        shortened = f"{text[:n_first]}…{text[-n_last:]}"
        if font.getlength(shortened) <= width:
            return shortened
    return ""


def read_patches(
    images: ImageSet,
    indices: Int64[Tensor, "n"],
    boxes: Int64[Tensor, "n 4"],
    *,
    px: int,
    config: EncodeConfig,
) -> list[Pixels | None]:
    """Reads patches for a contact sheet: squares of `px`, in the order in which they are given.

    Worker processes read each image once. A patch of an image that can't be read is None.
    """
    # Which patches each image has, by their numbers
    numbers_of: dict[int, list[int]] = {}
    for number, index in enumerate(indices.tolist()):
        numbers_of.setdefault(index, []).append(number)
    boxes_of = {}
    for index, numbers in numbers_of.items():
        boxes_of[index] = [tuple(boxes[number].tolist()) for number in numbers]
    # Nothing is random here: the seed of a key has no effect.
    keys = [(index, 0) for index in numbers_of]
    make = _CutPatches(images=images, boxes_of=boxes_of, px=px)
    found: list[Pixels | None] = [None] * len(indices)
    for batch in read_each(images, make, keys, config=config):
        for index, patches in batch.samples:
            for number, pixels in zip(numbers_of[index], patches, strict=True):
                found[number] = pixels
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CutPatches:
    """Reads an image in a worker process, and returns its index and its patches as squares."""

    images: ImageSet
    boxes_of: Mapping[int, Sequence[Box]]
    px: int

    def __call__(self, index: int, seed: int) -> tuple[int, list[Pixels]]:
        image = self.images.read(index)
        patches = []
        for box in self.boxes_of[index]:
            square = image.crop(box).resize((self.px, self.px), Image.Resampling.BILINEAR)
            patches.append(np.array(square))
        return index, patches
