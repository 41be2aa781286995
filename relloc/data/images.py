"""Reading one image as RGB, whatever a photographer's disk holds; scaling and cropping it at once."""

import dataclasses
import io
import os
import struct
import warnings
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from relloc.errors import UnreadableImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
_BROKEN = (  # what Pillow raises on files that are broken in one place or another
    *(OSError, UnidentifiedImageError, SyntaxError, ValueError, TypeError, IndexError, struct.error),
    Image.DecompressionBombError,
)
_UPRIGHT = {  # by the orientation that EXIF gives
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_rgb(path: Path) -> Image.Image:
    """The image upright in 8-bit RGB: gray, palette, CMYK, alpha and 16-bit ones are converted.

    Raises:
        UnreadableImage: missing, empty, truncated, zero-sized, or no image at all.
    """
    try:
        return _decoded(path)[0]
    except _BROKEN as error:
        raise UnreadableImage(_reason(path, error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A file and its image as `read_rgb` gives it.

    `is_plain_jpeg` says that it is an upright RGB or gray JPEG: its pixels are what a JPEG decoder
    gives, with nothing to turn or convert.
    """

    content: bytes
    rgb: Image.Image
    is_plain_jpeg: bool


def read_file(path: Path) -> ImageFile:
    """A file's bytes together with its image, read once.

    Raises:
        UnreadableImage: as `read_rgb`.
    """
    try:
        content = path.read_bytes()
        rgb, is_plain_jpeg = _decoded(io.BytesIO(content))
    except _BROKEN as error:
        raise UnreadableImage(_reason(path, error)) from error
    return ImageFile(content=content, rgb=rgb, is_plain_jpeg=is_plain_jpeg)


def _decoded(source: Path | io.BytesIO) -> tuple[Image.Image, bool]:
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and unused transparency; the pixels are what counts.
        warnings.simplefilter("ignore")
        with Image.open(source) as image:
            image.load()
            upright = _upright(image)
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and upright is image
            return _to_rgb(upright), plain


def _reason(path: Path, error: Exception) -> str:
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "is an empty file"
    if isinstance(error, UnidentifiedImageError):  # Pillow's message holds the address of an object
        return "UnidentifiedImageError: cannot identify image file"
    return f"{type(error).__name__}: {error}".replace(str(path), "it")


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also writes the rest of the metadata anew, and fails where that is odd.
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, struct.error):
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if min(image.size) == 0:
        raise ValueError("zero-sized")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow clips these at 255 instead of scaling them: 16 bits are brought to 8 first.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGB")


def crop_resized(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], side_px: int) -> Image.Image:
    """The `side_px` square at `corner` (row, column) of the image resized to `size` (height, width).

    Bilinear with antialiasing, as torchvision does on Pillow images. Only the square is computed,
    so an image as long as a scroll costs no more than another. Where the image has that size
    already, the square is cut out of it, which gives the same pixels.
    """
    top, left = corner
    if size == (image.height, image.width):
        return image.crop((left, top, left + side_px, top + side_px))
    scale_row, scale_column = image.height / size[0], image.width / size[1]
    box = (
        left * scale_column,
        top * scale_row,
        min((left + side_px) * scale_column, image.width),
        min((top + side_px) * scale_row, image.height),
    )
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=box)
