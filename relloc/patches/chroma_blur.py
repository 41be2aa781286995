"""Blurs the colors of images but not their lightness, before patches are cut.

It hides chromatic aberration, and keeps color as a cue (Mundhenk et al., CVPR 2018).
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from relloc import checks
from relloc.errors import UsageError

Images = Float[Tensor, "b 3 h w"]
# From linear red, green and blue to X, Y and Z, and back (IEC 61966-2-1, white D65), to the digits
# of scikit-image
_XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_RGB_FROM_XYZ = (
    (3.24048134, -1.53715152, -0.49853633),
    (-0.96925495, 1.87599, 0.04155593),
    (0.05564664, -0.20404134, 1.05731107),
)
_WHITE = (0.95047, 1.0, 1.08883)  # X, Y and Z of D65, seen under 2 degrees
# Below these numbers the curves of CIELAB and of sRGB are straight lines.
_CUBE_ROOT_ABOVE = 0.008856
_CUBE_ABOVE = 0.2068966
_SRGB_ABOVE = 0.04045
_LINEAR_ABOVE = 0.0031308


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChromaBlur:
    """Replaces the channels a and b of CIELAB by their mean over a square around each pixel.

    Mundhenk et al. name 13 x 13 pixels and no kernel: the mean is our choice. At a border of the
    image the mean is over what is there. Patches whose gap is less than `side_px` - 1 share colors.

    Raises:
        UsageError: `side_px` is not a whole, odd number.
    """

    side_px: int

    def __post_init__(self) -> None:
        checks.whole("chroma_blur.side_px", self.side_px)
        if self.side_px % 2 == 0:
            raise UsageError(
                f"chroma_blur.side_px is {self.side_px}: give an odd number, "
                "so that the square has a middle"
            )

    def __call__(self, images: Images) -> Images:
        """Returns images on the scale 0..255, as they are given, not rounded to whole levels."""
        lightness, *chroma = _lab(images).split(1, dim=1)
        blurred = [self._blurred(channel) for channel in chroma]
        return _rgb(torch.cat([lightness, *blurred], dim=1))

    def _blurred(self, channel: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        # A mean over rows and then over columns is the mean over the square.
        reach = self.side_px // 2
        for size, padding in (((self.side_px, 1), (reach, 0)), ((1, self.side_px), (0, reach))):
            channel = avg_pool2d(channel, size, stride=1, padding=padding, count_include_pad=False)
        return channel


def _lab(images: Images) -> Images:
    """Returns L, a and b of sRGB images on the scale 0..255."""
    values = images / 255
    is_curved = values > _SRGB_ABOVE
    linear = torch.where(is_curved, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    roots = []
    for channel, white in zip(_weighted(linear, _XYZ_FROM_RGB), _WHITE, strict=True):
        relative = channel / white
        # No negative numbers below a root, whose branch is not taken then
        root = relative.clamp(min=_CUBE_ROOT_ABOVE) ** (1 / 3)
        line = 7.787 * relative + 16 / 116
        roots.append(torch.where(relative > _CUBE_ROOT_ABOVE, root, line))
    x, y, z = roots
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _rgb(lab: Images) -> Images:
    """Returns sRGB images on the scale 0..255; colors that a screen can't show are clipped."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    roots = (y + a / 500, y, y - b / 200)
    xyz = []
    for root, white in zip(roots, _WHITE, strict=True):
        relative = torch.where(root > _CUBE_ABOVE, root**3, (root - 16 / 116) / 7.787)
        xyz.append(relative * white)
    linear = torch.stack(_weighted(torch.stack(xyz, dim=1), _RGB_FROM_XYZ), dim=1)
    linear = linear.clamp(0, 1)
    curved = 1.055 * linear.clamp(min=_LINEAR_ABOVE) ** (1 / 2.4) - 0.055
    values = torch.where(linear > _LINEAR_ABOVE, curved, 12.92 * linear)
    return 255 * values


def _weighted(images: Images, rows: tuple[tuple[float, ...], ...]) -> list[Float[Tensor, "b h w"]]:
    """Returns a weighted sum of the channels for each row of weights."""
    # Sums and no matrix product, which autocast would round to bfloat16.
    first, second, third = images.unbind(1)
    return [of_1 * first + of_2 * second + of_3 * third for of_1, of_2, of_3 in rows]
