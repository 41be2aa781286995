"""Images as packing stores them decoded: a PPM file each, a short header before the pixels.

PPM is what other programs read as well (WebDataset, Pillow), and its pixels can be read in place.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from relloc.data.image_set import Splits
from relloc.data.images import MOST_PIXELS
from relloc.data.parts import Part, original_size
from relloc.errors import UnreadableImage
from relloc.geometry import Pair, ShortSide

SUFFIX = "ppm"
# Images whose sizes are read to estimate the size of all.
_SAMPLED = 1000
# What tar and PPM add to the pixels of an image: a header of 512 bytes, and up to 512 bytes until
# the next one. A label is a file of its own of 1024 bytes.
_BYTES_OF_MEMBER = 1024
_BYTES_OF_LABEL = 1024


def ppm_header(height: int, width: int) -> bytes:
    """Returns what stands before the pixels in a PPM file of 8-bit RGB."""
    return b"P6\n%d %d\n255\n" % (width, height)


def as_image(pixels: UInt8[np.ndarray, "size"], height: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of a PPM file as an image of this height; nothing is copied."""
    return pixels.reshape(height, -1, 3)


def packed_size(height: int, width: int, short_px: int, *, enlarge: bool) -> Pair:
    """Returns the (height, width) in which packing stores an image.

    The short side of a larger image becomes `short_px`, and with `enlarge` that of a smaller one.

    Raises:
        UnreadableImage: it would be larger than the images that are read.
    """
    packed_height, packed_width = height, width
    short_side = min(height, width)
    if short_side > short_px or (enlarge and short_side < short_px):
        packed_height, packed_width = ShortSide(px=short_px).size(height, width, 0)
    # Enlarging makes a long image very long.
    if packed_height * packed_width > MOST_PIXELS:
        raise UnreadableImage(
            f"would be {packed_width} x {packed_height} px when enlarged to {short_px} px, more "
            f"than the {MOST_PIXELS:,} px that are read"
        )
    return packed_height, packed_width


def resized(rgb: Image.Image, size: Pair) -> Image.Image:
    """Returns an image resized to (height, width), or itself if it has that size."""
    height, width = size
    if (rgb.height, rgb.width) == size:
        return rgb
    return rgb.resize((width, height), Image.Resampling.BILINEAR)


def estimated_bytes(data: Splits, parts: Sequence[Part], *, short_px: int, enlarge: bool) -> int:
    """Returns about how many bytes the images of these parts take as pixels.

    It is computed from the sizes of up to 1,000 images, evenly spaced, of which only the beginning
    of their files is read.
    """
    n_images = sum(map(len, parts))
    if not n_images:
        return 0
    # Rounded up, so that at most _SAMPLED images are taken.
    step = math.ceil(n_images / _SAMPLED)
    sampled_bytes = 0
    n_sampled = 0
    for part, index in itertools.islice(_images_of(parts), 0, None, step):
        images = data.of(part.role)
        n_sampled += 1
        try:
            height, width = original_size(images, index)
            packed_height, packed_width = packed_size(height, width, short_px, enlarge=enlarge)
        except UnreadableImage:
            # Such an image is not stored.
            continue
        sampled_bytes += 3 * packed_height * packed_width + _BYTES_OF_MEMBER
        if images.labels is not None:
            sampled_bytes += _BYTES_OF_LABEL
    return round(sampled_bytes / n_sampled * n_images)


def _images_of(parts: Sequence[Part]) -> Iterator[tuple[Part, int]]:
    """Yields each image of the parts, as its part and its number."""
    for part in parts:
        for index in range(part.start, part.stop):
            yield part, index
