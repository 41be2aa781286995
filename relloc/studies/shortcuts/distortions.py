"""Images of noise, and changes of images that open or close a shortcut; all work on batches.

They are pure functions of tensors, on the device of these. Images are bytes (b 3 s s).
"""

import functools
import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

Images = UInt8[Tensor, "b 3 s s"]
Cut = UInt8[Tensor, "b 3 c c"]  # central squares of images
Field = Float[Tensor, "b 1 t t"]

# Noise that passes a lens is drawn at this multiple of the image's resolution and smoothed, so that
# interpolation between its pixels is exact to a few parts in a thousand. White noise would become
# blurred where a channel is sampled between pixels, which would tell positions without any lens.
FIELD_SCALE = 2
_FIELD_SIGMA_PX = 1.5
# Mean and standard deviation of smooth noise, in gray levels: ImageNet's are 116 and 58 on average.
_MEAN_LEVEL = 120.0
_STD_LEVELS = 50.0

# The example tables of the JPEG standard (ITU-T T.81, annex K.1), which libjpeg uses, for the
# coefficients of luminance and of both chrominances. The last four rows of the second are all 99.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
JPEG_BLOCK_PX = 8


def central(images: Images, side_px: int) -> Cut:
    """Returns the central squares of the images."""
    margin = (images.shape[-1] - side_px) // 2
    return images[..., margin : margin + side_px, margin : margin + side_px]


def white_noise(n: int, side_px: int, generator: torch.Generator) -> Images:
    """Returns images whose values are all independent, uniform over 0 to 255."""
    return torch.randint(
        256,
        (n, 3, side_px, side_px),
        generator=generator,
        device=generator.device,
        dtype=torch.uint8,
    )


def smooth_noise(n: int, side_px: int, sigma_px: float, generator: torch.Generator) -> Images:
    """Returns normal noise under a Gaussian window of `sigma_px`, each channel by itself.

    Such noise shows nothing, but it goes on smoothly from one patch to an adjoining one.
    """
    margin = _window_radius(sigma_px)
    shape = (n, 3, side_px + 2 * margin, side_px + 2 * margin)
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return _as_levels(_smoothed(drawn, sigma_px))


def gray_field(n: int, side_px: int, generator: torch.Generator) -> Field:
    """Returns smooth gray noise of `FIELD_SCALE` times the resolution, for `field_through_lens`.

    All channels of a photograph show the same scene. So it is one field, which the channels see
    through the lens. `side_px` is that of the images, with the margin that `through_lens` needs.
    """
    margin = _window_radius(_FIELD_SIGMA_PX)
    side = FIELD_SCALE * side_px + 2 * margin
    shape = (n, 1, side, side)
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return _smoothed(drawn, _FIELD_SIGMA_PX)


def field_through_lens(field: Field, fraction: float) -> Images:
    """Returns images of a field through a lens with lateral chromatic aberration.

    `fraction`: how much closer to the center of the image green lies than red and blue, as a part
    of the distance from the center. In lenses of two glasses green is closer to the center by some
    parts in a thousand (docs/protocols.md 1.2).
    """
    side = field.shape[-1] // FIELD_SCALE
    magenta = _as_levels(_resampled(field, side, 1.0))
    green = _as_levels(_resampled(field, side, 1 + fraction))
    return torch.cat([magenta, green, magenta], dim=1)


def through_lens(images: Images, fraction: float) -> Images:
    """Returns photographs through a further lens, as `field_through_lens` describes it.

    A margin of the images is to be cut off afterwards: at the border, the last pixels are repeated.
    """
    red, green, blue = images.split(1, dim=1)
    seen = _resampled(green.float(), images.shape[-1], 1 + fraction)
    green = seen.round().clamp(0, 255).to(torch.uint8)
    return torch.cat([red, green, blue], dim=1)


def shifted_to_the_right(images: Images, shift_px: int) -> Images:
    """Returns images whose green channel lies `shift_px` further right than red and blue.

    Columns that leave the image come back at the other side, so that a margin of `shift_px` columns
    is to be cut off afterwards.
    """
    red, green, blue = images.split(1, dim=1)
    return torch.cat([red, green.roll(shift_px, dims=-1), blue], dim=1)


def with_black_border(images: Images, border_px: int, side_px: int) -> Cut:
    """Returns the central squares of `side_px`, with black borders of `border_px` inside."""
    cut = central(images, side_px)
    bordered = torch.zeros_like(cut)
    inside = slice(border_px, side_px - border_px)
    bordered[..., inside, inside] = cut[..., inside, inside]
    return bordered


def with_mirrored_border(images: Images, border_px: int, side_px: int) -> Cut:
    """Returns the central squares of `side_px`, whose borders mirror what lies inside of them."""
    cut = central(images, side_px)
    first = border_px
    last = side_px - border_px - 1
    positions = torch.arange(side_px, device=cut.device)
    # Position `first - 1` shows what `first` does, and the positions before it what follows.
    positions = torch.where(positions < first, 2 * first - 1 - positions, positions)
    positions = torch.where(positions > last, 2 * last + 1 - positions, positions)
    return cut[:, :, positions][..., positions]


def jpeg(images: Images, quality: int, offset_px: int, side_px: int) -> Cut:
    """Returns the central squares of `side_px` as JPEG with blocks of 8 x 8 px leaves them.

    As libjpeg does it without subsampling of colors, up to a gray level or two of rounding. The
    blocks' grid begins `offset_px` (0 to 7) before the first row and column.
    """
    # Mirrored pixels fill up the blocks at the border.
    cut = central(images, side_px)
    after = -(offset_px + side_px) % JPEG_BLOCK_PX
    padding = (offset_px, after, offset_px, after)
    padded = functional.pad(cut.float(), padding, mode="reflect")
    planes = _to_ycbcr(padded).round() - 128

    # (b, channel, block row, block column, row in block, column in block)
    blocks = planes.unfold(2, JPEG_BLOCK_PX, JPEG_BLOCK_PX).unfold(3, JPEG_BLOCK_PX, JPEG_BLOCK_PX)
    transform = _cosines(planes.device)
    steps = _quantization_steps(quality, planes.device)
    coefficients = transform @ blocks @ transform.T
    kept = (coefficients / steps).round() * steps
    decoded = transform.T @ kept @ transform

    # Blocks become rows and columns again.
    decoded = decoded.transpose(3, 4).reshape(planes.shape) + 128
    rgb = _to_rgb(decoded.round().clamp(0, 255)).round().clamp(0, 255).to(torch.uint8)
    inside = slice(offset_px, offset_px + side_px)
    return rgb[..., inside, inside]


def _window_radius(sigma_px: float) -> int:
    return math.ceil(3 * sigma_px)


def _smoothed(drawn: Float[Tensor, "b c h h"], sigma_px: float) -> Float[Tensor, "b c t t"]:
    """Convolves normal noise with a Gaussian window and scales it to deviation 1; no padding."""
    radius = _window_radius(sigma_px)
    distances = torch.arange(-radius, radius + 1, device=drawn.device, dtype=drawn.dtype)
    window = torch.exp(-(distances**2) / (2 * sigma_px**2))
    # A weighted sum of independent numbers has the root of the summed squares as its deviation.
    window = window / window.square().sum().sqrt()
    channels = drawn.shape[1]
    along_rows = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    along_columns = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    smoothed = functional.conv2d(drawn, along_rows, groups=channels)
    return functional.conv2d(smoothed, along_columns, groups=channels)


def _as_levels(field: Float[Tensor, "b c t t"]) -> UInt8[Tensor, "b c t t"]:
    """Turns a field of mean 0 and deviation 1 into gray levels."""
    levels = _MEAN_LEVEL + _STD_LEVELS * field
    return levels.round().clamp(0, 255).to(torch.uint8)


def _resampled(
    channel: Float[Tensor, "b 1 t t"], side_px: int, scale: float
) -> Float[Tensor, "b 1 s s"]:
    """Samples a channel at `side_px` points a side; point x shows what lies at `scale` times x.

    Points are counted from the center, where 1 is the border. The interpolation is bicubic.
    """
    centers = (2 * torch.arange(side_px, device=channel.device) + 1) / side_px - 1
    columns = centers.expand(side_px, side_px) * scale
    grid = torch.stack([columns, columns.T], dim=-1)
    grid = grid.expand(len(channel), -1, -1, -1)
    return functional.grid_sample(
        channel, grid, mode="bicubic", padding_mode="border", align_corners=False
    )


def _to_ycbcr(rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Returns luminance and both chrominances as JFIF defines them, all on 0 to 255."""
    red, green, blue = rgb.split(1, dim=1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    to_blue = 128 + (blue - luminance) * (0.5 / (1 - 0.114))
    to_red = 128 + (red - luminance) * (0.5 / (1 - 0.299))
    return torch.cat([luminance, to_blue, to_red], dim=1)


def _to_rgb(ycbcr: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    luminance, to_blue, to_red = ycbcr.split(1, dim=1)
    red = luminance + (to_red - 128) * (2 * (1 - 0.299))
    blue = luminance + (to_blue - 128) * (2 * (1 - 0.114))
    green = (luminance - 0.299 * red - 0.114 * blue) / 0.587
    return torch.cat([red, green, blue], dim=1)


@functools.cache
def _cosines(device: torch.device) -> Float[Tensor, "8 8"]:
    """Returns the matrix of the discrete cosine transform of 8 values, which is orthogonal."""
    frequencies = torch.arange(JPEG_BLOCK_PX, dtype=torch.float64).unsqueeze(1)
    places = torch.arange(JPEG_BLOCK_PX, dtype=torch.float64)
    matrix = torch.cos((2 * places + 1) * frequencies * math.pi / (2 * JPEG_BLOCK_PX)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.float().to(device)


@functools.cache
def _quantization_steps(quality: int, device: torch.device) -> Float[Tensor, "3 1 1 8 8"]:
    """Returns the quantization steps of the three planes, scaled by quality as libjpeg does."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])
    scaled = (tables * percent + 50) // 100
    steps = scaled.clamp(1, 255).float().to(device)
    return steps.view(3, 1, 1, JPEG_BLOCK_PX, JPEG_BLOCK_PX)
