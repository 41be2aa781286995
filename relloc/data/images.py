"""Reading one image as RGB, whatever a photographer's disk holds; scaling and cropping it at once."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from relloc.errors import UnreadableImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")


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
                return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    if path.exists() and path.stat().st_size == 0:
        return "is an empty file"
    return f"{type(error).__name__}: {error}".replace(str(path), "it")


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
