"""Reads image files of many formats as upright 8-bit RGB, and resizes and crops images.

Files come from photographers' disks and from strangers: they may be truncated, 16-bit, rotated by
EXIF, or crafted to exhaust memory. All that Pillow raises on them becomes `UnreadableImage`.
"""

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
from jaxtyping import UInt8

# The plugins of the formats below are imported by name, as Image.open would import all forty.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from relloc.data.cuts import resample, square_of_resized
from relloc.errors import UnreadableImage
from relloc.geometry import Pair

# Only these formats are opened, whatever a file is called. Pillow knows more, but it renders EPS by
# starting Ghostscript, which a crafted file can exploit.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF"]
# A file in a folder counts as an image if its name ends like this (in lower case).
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".avif"),
)
MOST_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded: Pillow's own limit, 0.5 GB of RGB.

A file of 100 bytes may claim to be larger.
"""
# Size limit of a file: above what MOST_PIXELS take in four channels of 16 bits.
MOST_BYTES = 2 << 30
# Exceptions that Pillow raises on broken files, depending on where they are broken.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error),
    *(Image.DecompressionBombError, EOFError, ArithmeticError, RuntimeError, zlib.error),
    # A crafted JPEG 2000 asks for huge memory. A machine that runs out of memory raises nothing:
    # it kills the process.
    MemoryError,
)
# The first bytes of JPEG, PNG, GIF, TIFF (two byte orders, and BigTIFF), and JPEG 2000.
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n",
)
# The first bytes of a JPEG and of a PNG, and the last ones of a whole file: the marker of the end,
# and the last chunk, whose bytes are always the same.
_ENDS = (
    (b"\xff\xd8\xff", b"\xff\xd9"),
    (b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"),
)
_END_BYTES = 12
_LARGEST_16_BIT = 65_535
_LARGEST_12_BIT = 4_095
# What turns an image upright, by the orientation tag of its EXIF data (1 is upright already).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_AXES = frozenset(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
# Sampling of brightness in the subsamplings 4:4:4, 4:2:2, 4:2:0 and 4:4:0, where colors have 1 x 1
_LUMA_SAMPLINGS = frozenset([(1, 1), (2, 1), (2, 2), (1, 2)])


def read_rgb(path: Path) -> Image.Image:
    """Returns the image of a file in 8-bit RGB, turned upright by its EXIF orientation.

    Gray, palette, CMYK, alpha, 16-bit and floating-point images are converted. Floating-point
    values are taken to range from 0 to 1 or, if one is above 1, from 0 to 255.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, zero-sized, no image, or larger
            than `MOST_PIXELS`; or the range of its values is unknown (32-bit and signed integers,
            floating-point numbers outside both ranges).
    """
    with _opened(path) as file:
        return _decoded(file)[0]


def read_unconverted(path: Path) -> Image.Image:
    """Returns the image of a PNG file as it is stored: masks have numbers of classes for colors.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, no PNG, or larger than
            `MOST_PIXELS`.
    """
    with _opened(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=FORMATS) as image:
            if image.format != "PNG":
                raise ValueError(f"is {image.format}, not PNG: others may change the numbers")
            check_size(*image.size)
            image.load()
            return image.copy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFile:
    """The bytes of a file and its image as `read_rgb` returns it.

    `is_plain_jpeg` is true for an upright RGB or gray JPEG: a JPEG decoder alone returns the same
    pixels, with nothing to turn or convert.
    """

    content: bytes
    rgb: Image.Image
    is_plain_jpeg: bool


def read_file(path: Path) -> ImageFile:
    """Returns the bytes of a file and its image, reading the file once.

    Raises:
        UnreadableImage: as `read_rgb`.
    """
    with _opened(path) as file:
        content = file.read()
        rgb, is_plain_jpeg = _decoded(io.BytesIO(content))
    return ImageFile(content=content, rgb=rgb, is_plain_jpeg=is_plain_jpeg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jpeg:
    """The bytes of a JPEG that can be left to another decoder, and what to know of it before.

    Its image has `stored_size` (height, width), and is upright after `transposition`, if any.
    """

    content: bytes | bytearray
    stored_size: Pair
    transposition: Image.Transpose | None

    @property
    def size(self) -> Pair:
        """Height and width of the upright image."""
        height, width = self.stored_size
        return (width, height) if self.transposition in _SWAPS_AXES else (height, width)


# What a decoder makes an image of, or its pixels where there is nothing left to decode
Undecoded = Jpeg | UInt8[np.ndarray, "h w 3"]


def size_of(image: Undecoded) -> Pair:
    """Returns the height and width of the upright image."""
    if isinstance(image, Jpeg):
        return image.size
    height, width, _ = image.shape
    return height, width


def as_jpeg(content: bytes | bytearray) -> Jpeg | None:
    """Returns the JPEG in the bytes of a file if another decoder is sure to take it as Pillow does.

    None for all others: other formats, gray and CMYK images, rare color subsampling, files of
    several pictures, and files that may be truncated. Of a JPEG only the header is read.
    """
    begin, end = _ENDS[0]
    if not (content.startswith(begin) and content.endswith(end)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What is wrong with a file is said by whoever decodes it.
        with contextlib.suppress(*_BROKEN), Image.open(io.BytesIO(content), formats=FORMATS) as of:
            check_size(*of.size)
            if min(of.size) == 0 or of.mode != "RGB" or not _has_usual_colors(of):
                return None
            return Jpeg(
                content=content,
                stored_size=(of.height, of.width),
                transposition=_transposition(of),
            )
    return None


def _has_usual_colors(image: Image.Image) -> bool:
    """Whether an image is a JPEG whose three components are YCbCr in a usual subsampling."""
    # Files of several pictures are of a class of their own, MpoImageFile.
    if type(image) is not JpegImagePlugin.JpegImageFile or image.bits != 8:
        return False
    # (name, horizontal and vertical sampling, table) of each component
    names = bytes(component[0] for component in image.layer)
    luma, *chroma = [component[1:3] for component in image.layer]
    # 0 in Adobe's marker stands for RGB, and so do these names without any marker.
    is_ycbcr = names != b"RGB" and image.info.get("adobe_transform", 1) == 1
    return is_ycbcr and luma in _LUMA_SAMPLINGS and chroma == [(1, 1), (1, 1)]


def read_undecoded(path: Path) -> Undecoded:
    """Returns the JPEG of a file undecoded (see `as_jpeg`), or else the pixels of `read_rgb`.

    Raises:
        UnreadableImage: as `read_rgb`, but a JPEG may still turn out to be damaged.
    """
    with _opened(path) as file:
        content = file.read()
        jpeg = as_jpeg(content)
        return jpeg or np.asarray(_decoded(io.BytesIO(content))[0])


def read_size(path: Path) -> Pair:
    """Returns the height and width of a file's image as it is stored, before it is turned upright.

    Only the beginning of the file is read: it may still turn out to be truncated.

    Raises:
        UnreadableImage: the file is missing, empty, zero-sized, no image, or larger than
            `MOST_PIXELS`.
    """
    with _opened(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=FORMATS) as image:
            check_size(*image.size)
            if min(image.size) == 0:
                raise ValueError("zero-sized")
            return image.height, image.width


def begins_as_image(path: str) -> bool:
    """True if the first bytes of a file are those of an image format.

    Recognizes image files whose names have no suffix.
    """
    try:
        with _opened(Path(path)) as file:
            start = file.read(16)
    except UnreadableImage:
        return False
    # WebP is a RIFF file, AVIF an ISO file: a length stands before or between their markers.
    kind = start[8:12] if start.startswith(b"RIFF") else start[4:12]
    return start.startswith(_SIGNATURES) or kind in (b"WEBP", b"ftypavif", b"ftypavis")


def ends_whole(path: str) -> bool:
    """Returns whether a file begins as a JPEG or PNG does, and ends as a whole one does.

    A few bytes are read. A file of which it is not true may be truncated, of another format, or
    have further bytes behind its image, as cameras append them: only decoding it tells.
    """
    try:
        with _opened(Path(path)) as file:
            descriptor = file.fileno()
            start = os.pread(descriptor, _END_BYTES, 0)
            size = os.fstat(descriptor).st_size
            end = os.pread(descriptor, _END_BYTES, max(0, size - _END_BYTES))
    except UnreadableImage:
        return False
    return any(start.startswith(first) and end.endswith(last) for first, last in _ENDS)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a regular file for reading while the block runs.

    Raises:
        UnreadableImage: the file can't be opened, or the block fails as Pillow does on bad files.
    """
    try:
        # O_NONBLOCK: to open a pipe would otherwise wait until another program writes to it.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            status = os.fstat(file.fileno())
            # Python itself refuses to open folders.
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("is no file but a pipe, socket or device")
            if status.st_size > MOST_BYTES:
                raise ValueError(
                    f"has {status.st_size / 1e9:.1f} GB; "
                    f"images of up to {MOST_BYTES / 1e9:.1f} GB are read"
                )
            yield file
    except _BROKEN as error:
        raise UnreadableImage(_reason(path, error)) from error


def _decoded(source: io.BufferedReader | io.BytesIO) -> tuple[Image.Image, bool]:
    """Returns the upright RGB image, and whether the file is a plain JPEG (see `ImageFile`)."""
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and unused transparency; only the pixels matter here.
        warnings.simplefilter("ignore")
        with Image.open(source, formats=FORMATS) as image:
            # Pillow has this limit too, but a program may have lifted it.
            check_size(*image.size)
            if min(image.size) == 0:
                raise ValueError("zero-sized")
            image.load()
            transposition = _transposition(image)
            gray = _gray_in_8_bits(image)
            is_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
            is_plain_jpeg = is_jpeg and transposition is None
            rgb = (gray or image).convert("RGB")
            if transposition is not None:
                rgb = rgb.transpose(transposition)
            return rgb, is_plain_jpeg


def check_size(width: int, height: int) -> None:
    """Refuses an image that is too large, before memory for its pixels is allocated.

    Raises:
        ValueError: the image claims to have more than `MOST_PIXELS`.
    """
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"claims to have {width} x {height} px: images of up to {MOST_PIXELS:,} px are read"
        )


def _reason(path: Path, error: Exception) -> str:
    """Returns why a file can't be read, without its name, which whoever reports it adds."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "is an empty file"
    # The error's own text repeats the path.
    if isinstance(error, FileNotFoundError):
        return "is missing"
    # Pillow's own message holds the address of an object, which differs in every run.
    if isinstance(error, UnidentifiedImageError):
        return (
            "UnidentifiedImageError: cannot identify image file "
            f"(formats that are read: {', '.join(FORMATS)})"
        )
    return f"{type(error).__name__}: {error}".replace(str(path), "it")


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """Returns what turns the image upright, by its EXIF data; None if it is upright."""
    # ImageOps.exif_transpose also rewrites the other metadata, and fails where these are odd.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return _UPRIGHT.get(orientation)
    except _BROKEN:
        return None


def _gray_in_8_bits(image: Image.Image) -> Image.Image | None:
    """Returns a gray image of more than 8 bits scaled to 8 bits; None for all other images.

    Pillow itself clips such images at 255, and does not invert those whose 0 is white.

    Raises:
        ValueError: nothing says which values are black and white.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    # Pillow opens 16-bit gray as I;16, but as I (32-bit) from some PNG and PPM files.
    is_16_bit = image.mode.startswith("I;16")
    is_16_bit_in_32 = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode == "F":
        gray = _float_in_8_bits(np.asarray(image))
    elif is_16_bit or is_16_bit_in_32:
        # TIFF files of scanners and microscopes may keep 12 bits in 16.
        is_12_bit = tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,)
        largest = _LARGEST_12_BIT if is_12_bit else _LARGEST_16_BIT
        integers = image.convert("I")
        scaled = integers.point(lambda value: value * (255 / largest))
        gray = scaled.convert("L")
    elif image.mode == "I":
        raise ValueError(
            "has signed or 32-bit integers, and the file does not say which values are black and "
            "white: save it in 8 or 16 bits"
        )
    else:
        return None
    # 0 is white in these TIFF files (WhiteIsZero), so that they have to be inverted.
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        gray = gray.point([255 - level for level in range(256)])
    return gray


def _float_in_8_bits(values: np.ndarray) -> Image.Image:
    """Returns floating-point values from 0 to 1, or from 0 to 255, as an 8-bit gray image."""
    low = float(values.min())
    high = float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("has values that are infinite or not a number")
    # Resampling an image may exceed its range a little.
    tolerance = 1e-3
    white = 1 if high <= 1 + tolerance else 255
    if low < -tolerance * white or high > white * (1 + tolerance):
        raise ValueError(
            f"has floating-point values from {low:g} to {high:g}: values must range from 0 to 1 "
            "or from 0 to 255"
        )
    levels = np.rint(values * (255 / white))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def crop_resized(image: Image.Image, size: Pair, corner: Pair, side_px: int) -> Image.Image:
    """Returns a square of the image resized to `size` (height, width), in pixels.

    It is the square that `square_of_resized` describes.
    """
    return resample(image, square_of_resized(image.height, image.width, size, corner, side_px))
