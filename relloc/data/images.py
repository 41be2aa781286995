"""Reading one image as RGB, whatever a photographer's disk holds; scaling and cropping it at once."""

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
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and unused transparency; the pixels are what counts.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                return _to_rgb(_upright(image))
    except _BROKEN as error:
        raise UnreadableImage(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "is an empty file"
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
    so an image as long as a scroll costs no more than another.
    """
    scale_row, scale_column = image.height / size[0], image.width / size[1]
    top, left = corner
    box = (
        left * scale_column,
        top * scale_row,
        min((left + side_px) * scale_column, image.width),
        min((top + side_px) * scale_row, image.height),
    )
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=box)
