"""Reading one image as RGB, whatever a photographer's disk holds; scaling and cropping it at once."""

import contextlib
import dataclasses
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# The plugins of the formats below, each imported by name: Image.open would else import all forty.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from relloc.errors import UnreadableImage
from relloc.geometry import Pair

# Only these are opened, whatever a file is called. Pillow knows more: of EPS it makes a picture by starting
# Ghostscript, a program that a crafted file may turn against its user.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF"]
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".avif"),
)
MOST_PIXELS = 178_956_970
"""The largest image that is decoded: Pillow's own limit, 0.5 GB of RGB. A file of 100 bytes may claim to be larger."""
MOST_BYTES = 2 << 30  # of a file: above what MOST_PIXELS take in four channels of 16 bits
_BROKEN = (  # what Pillow raises on files that are broken in one place or another
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error),
    *(Image.DecompressionBombError, EOFError, ArithmeticError, RuntimeError, zlib.error),
    MemoryError,  # what a crafted JPEG 2000 asks for; a machine that is out of memory kills instead
)
# The first bytes of the formats; what lies between in RIFF and ISO files is a length
_SIGNATURES = (
    *(
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF87a",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"MM\0+",
    ),
    b"\0\0\0\x0cjP  \r\n\x87\n",
)
_WIDEST_16_BIT = 65_535
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
    """The image upright in 8-bit RGB: gray, palette, CMYK, alpha, 16-bit and floating-point ones are converted.

    Floating-point values are taken to reach from 0 to 1 or, where one is above 1, from 0 to 255.

    Raises:
        UnreadableImage: missing, empty, truncated, zero-sized, no image at all, larger than
            `MOST_PIXELS`, or of numbers whose black and white the file does not tell (32-bit and
            signed integers; floating-point numbers outside both ranges).
    """
    with _opened(path) as file:
        return _decoded(file)[0]


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
    with _opened(path) as file:
        content = file.read()
        rgb, is_plain_jpeg = _decoded(io.BytesIO(content))
    return ImageFile(content=content, rgb=rgb, is_plain_jpeg=is_plain_jpeg)


def begins_as_image(path: str) -> bool:
    """Whether a file begins as an image of one of the formats does: to tell images that have no suffix."""
    try:
        with _opened(Path(path)) as file:
            start = file.read(16)
    except UnreadableImage:
        return False
    kind = start[8:12] if start.startswith(b"RIFF") else start[4:12]
    return start.startswith(_SIGNATURES) or kind in (b"WEBP", b"ftypavif", b"ftypavis")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file, open. A pipe of that name is not waited for, nor a device read.

    Raises:
        UnreadableImage: it can't be opened, or the block fails as Pillow does on broken files.
    """
    try:
        # Python itself refuses folders.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("is no file but a pipe, socket or device")
            if about.st_size > MOST_BYTES:
                raise ValueError(
                    f"has {about.st_size / 1e9:.1f} GB, images of up to {MOST_BYTES / 1e9:.1f} GB are read"
                )
            yield file
    except _BROKEN as error:
        raise UnreadableImage(_reason(path, error)) from error


def _decoded(source: io.BufferedReader | io.BytesIO) -> tuple[Image.Image, bool]:
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and unused transparency; the pixels are what counts.
        warnings.simplefilter("ignore")
        with Image.open(source, formats=FORMATS) as image:
            check_size(*image.size)  # Pillow has this limit too, but a program may have lifted it
            if min(image.size) == 0:
                raise ValueError("zero-sized")
            image.load()
            turn, shades = _turn(image), _shades(image)
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and turn is None
            rgb = (shades or image).convert("RGB")
            return rgb if turn is None else rgb.transpose(turn), plain


def check_size(width: int, height: int) -> None:
    """Refuse an image before memory is asked for its pixels.

    Raises:
        ValueError: it claims to be larger than `MOST_PIXELS`.
    """
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"claims to have {width} x {height} px: images of up to {MOST_PIXELS:,} px are read"
        )


def _reason(path: Path, error: Exception) -> str:
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "is an empty file"
    if isinstance(error, UnidentifiedImageError):  # Pillow's message holds the address of an object
        return f"UnidentifiedImageError: cannot identify image file (read are {', '.join(FORMATS)})"
    return f"{type(error).__name__}: {error}".replace(str(path), "it")


def _turn(image: Image.Image) -> Image.Transpose | None:
    # ImageOps.exif_transpose also writes the rest of the metadata anew, and fails where that is odd.
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN:
        return None


def _shades(image: Image.Image) -> Image.Image | None:
    """A gray image of more than 8 bits in 8 bits; None for all others.

    Pillow clips these at 255 instead of scaling them, and does not turn those whose 0 is white.

    Raises:
        ValueError: nothing says which of its numbers are black and white.
    """
    about = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "F":
        shades = _float_shades(np.asarray(image))
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        widest = 4095 if about.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else _WIDEST_16_BIT
        shades = image.convert("I").point(lambda value: value * (255 / widest)).convert("L")
    elif image.mode == "I":
        raise ValueError(
            "has signed or 32-bit integers, whose black and white are not told: save it in 8 or 16 bits"
        )
    else:
        return None
    if about.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # WhiteIsZero
        shades = shades.point([255 - level for level in range(256)])
    return shades


def _float_shades(values: np.ndarray) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    rounding = 1e-3  # a resampled image may reach a little beyond its range
    if not np.isfinite([low, high]).all():
        raise ValueError("has values that are infinite or not a number")
    widest = 1 if high <= 1 + rounding else 255
    if low < -rounding * widest or high > widest * (1 + rounding):
        raise ValueError(
            f"has floating-point values from {low:g} to {high:g}: read are those from 0 to 1 and from 0 to 255"
        )
    return Image.fromarray(np.clip(np.rint(values * (255 / widest)), 0, 255).astype(np.uint8))


def crop_resized(image: Image.Image, size: Pair, corner: Pair, side_px: int) -> Image.Image:
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
