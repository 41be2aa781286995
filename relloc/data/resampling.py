"""Makes the squares of a batch of images on a device, as `relloc.data.cuts` makes one by Pillow.

A resize is separable: each axis is a product with a matrix of the filter's weights, which is made
on the device. Pillow computes in whole numbers, with weights of 22 bits, and so does this: pixels
are equal to the bit, on any device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc.data.cuts import Cut, Resampling
from relloc.geometry import Pair

ImageTensor = UInt8[Tensor, "3 _h _w"]

# float32 values that resampling takes at once: 2 GB, which holds 256 photographs of 500 x 400 px.
# `relloc.data.device_decoding` has two threads, each of which takes so many.
_MOST_VALUES = 500_000_000
# Bits behind the point of Pillow's weights (PRECISION_BITS in libImaging/Resample.c), and how many
# of them the first of the two parts has that a weight is divided into
_WEIGHT_BITS = 22
_COARSE_BITS = 11


class _Part(NamedTuple):
    """The part of an image that a step needs, whose first pixel lies at `origin` of the image.

    `size` is its height and width, and those of the result.
    """

    image: ImageTensor
    origin: Pair
    step: Resampling
    is_vertical_first: bool
    size: tuple[int, int, int, int]


class _Weights(NamedTuple):
    """How much each pixel of an axis counts in each pixel of the result, as a sum of two parts.

    GPUs round the factors of products to 11 bits where TF32 is on. Each part has no more, nor have
    pixels, and sums of their products are exact in float32. A weight as a whole has 22 bits.
    """

    coarse: Float[Tensor, "b n_new n"]
    fine: Float[Tensor, "b n_new n"]


@torch.no_grad()
def squares(images: Sequence[ImageTensor], cuts: Sequence[Cut]) -> UInt8[Tensor, "b 3 s s"]:
    """Returns the squares of images, which lie on one device and may have different sizes.

    All cuts are of one view: they have as many steps, and end in squares of one size. The result
    lies in memory with channels last.
    """
    n_steps = len(cuts[0].steps)
    resampled = list(images)
    # The caller may have products of a network rounded to 16 bits.
    with torch.autocast(images[0].device.type, enabled=False):
        for number in range(n_steps):
            resampled = _all_resampled(resampled, [cut.steps[number] for cut in cuts])
    # With channels last from the beginning, so that no later copy has to move them.
    batch = torch.stack([image.permute(1, 2, 0) for image in resampled]).permute(0, 3, 1, 2)
    if not any(cut.mirrored for cut in cuts):
        return batch
    mirrored = torch.tensor([cut.mirrored for cut in cuts]).to(batch.device)
    return torch.where(mirrored[:, None, None, None], batch.flip(3), batch)


def _all_resampled(images: Sequence[ImageTensor], steps: Sequence[Resampling]) -> list[ImageTensor]:
    """Returns each image resampled by a step of its own."""
    parts = []
    for image, step in zip(images, steps, strict=True):
        parts.append(_needed_part(image, step))
    resampled: dict[int, ImageTensor] = {}
    for group in _groups(parts):
        results = _group_resampled([parts[place] for place in group])
        for place, result in zip(group, results, strict=True):
            # Smaller results are padded like the images.
            new_height, new_width = steps[place].size
            resampled[place] = result[:, :new_height, :new_width]
    return [resampled[place] for place in range(len(images))]


def _needed_part(image: ImageTensor, step: Resampling) -> _Part:
    """Returns the part of an image that the result of a step depends on."""
    top, left, bottom, right = step.needed()
    first_row, first_column = step.origin
    rows = slice(top - first_row, bottom - first_row)
    columns = slice(left - first_column, right - first_column)
    return _Part(
        image=image[:, rows, columns],
        origin=(top, left),
        step=step,
        is_vertical_first=step.is_vertical_first,
        size=(bottom - top, right - left, *step.size),
    )


def _groups(parts: Sequence[_Part]) -> list[list[int]]:
    """Returns groups of images, by their places, that are padded to one size and fit in memory.

    The axes of all images of a group are resized in the same order. An image that is too large for
    any group is a group by itself.
    """
    # Images of similar size come together, so that they need little padding.
    keys = [(part.is_vertical_first, max(part.size)) for part in parts]
    groups: list[list[int]] = []
    # What images of the last group are padded to, and in which order their axes are resized
    group_size: tuple[int, ...] = ()
    group_order = None
    for place in sorted(range(len(parts)), key=keys.__getitem__):
        part = parts[place]
        if part.is_vertical_first == group_order:
            grown_size = tuple(map(max, group_size, part.size))
            if (len(groups[-1]) + 1) * _values_of(*grown_size) <= _MOST_VALUES:
                groups[-1].append(place)
                group_size = grown_size
                continue
        groups.append([place])
        group_size = part.size
        group_order = part.is_vertical_first
    return groups


def _values_of(height: int, width: int, new_height: int, new_width: int) -> int:
    """Returns how many float32 values it takes to resample an image of a group.

    They are its pixels, four times those between both products, and the weights.
    """
    pixels = 3 * (height * width + 4 * max(height * new_width, new_height * width))
    weights = 2 * (height * new_height + width * new_width)
    return pixels + weights


def _group_resampled(parts: Sequence[_Part]) -> UInt8[Tensor, "b 3 h w"]:
    """Returns the images of a group resampled, padded to the largest result."""
    n_images = len(parts)
    height = max(part.size[0] for part in parts)
    width = max(part.size[1] for part in parts)
    device = parts[0].image.device
    # Rows outermost and colors before columns, so that either axis can be multiplied without
    # moving values. What pads an image may be anything, since its weights are 0.
    padded = torch.empty(n_images, height, 3, width, dtype=torch.uint8, device=device)
    for row, part in zip(padded, parts, strict=True):
        row[: part.size[0], :, : part.size[1]] = part.image.permute(1, 0, 2)

    of_rows = _weights(parts, 0, height, device)
    of_columns = _weights(parts, 1, width, device)
    new_height = of_rows.coarse.shape[1]
    new_width = of_columns.coarse.shape[1]
    values = padded.float()
    if parts[0].is_vertical_first:
        values = values.view(n_images, height, 3 * width)
        values = _rounded(of_rows.coarse @ values, of_rows.fine @ values)
        values = values.view(n_images, new_height * 3, width)
        values = _rounded(values @ of_columns.coarse.mT, values @ of_columns.fine.mT)
    else:
        values = values.view(n_images, height * 3, width)
        values = _rounded(values @ of_columns.coarse.mT, values @ of_columns.fine.mT)
        values = values.view(n_images, height, 3 * new_width)
        values = _rounded(of_rows.coarse @ values, of_rows.fine @ values)
    pixels = values.to(torch.uint8).view(n_images, new_height, 3, new_width)
    return pixels.permute(0, 2, 1, 3)


def _weights(parts: Sequence[_Part], axis: int, n_pixels: int, device: torch.device) -> _Weights:
    """Returns the weights of an axis, as precompute_coeffs of Pillow's Resample.c makes them.

    Weights of what pads images to `n_pixels` are 0, those of what pads results too.
    """
    facts = []
    for part in parts:
        step = part.step
        scale, reach = step.filter_of_axis(axis)
        lowest, highest = step.within[axis], step.within[axis + 2]
        length = highest - lowest
        before = part.origin[axis] - lowest
        facts.append((step.box[axis], scale, reach, length, before, step.size[axis]))
    most_new = max(part.step.size[axis] for part in parts)
    longest_reach = max(reach for _, _, reach, *_ in facts)
    # Made in one tensor on the CPU, so that one copy takes them to the device. In float64 and in
    # the order of Pillow's operations: rounded to 22 bits, weights are then the same.
    on_device = torch.tensor(facts, dtype=torch.float64).to(device)
    start, scale, reach, length, before, n_new = on_device[:, :, None, None].unbind(1)

    # Where the center of each new pixel lies (b n_new 1), and the pixels around it that the filter
    # may reach (b n_new taps), counted from the first that may be read. The pixels at hand begin
    # `before` pixels later.
    new_pixels = torch.arange(most_new, device=device)[None, :, None]
    centers = start + (new_pixels + 0.5) * scale
    n_taps = min(n_pixels, int(2 * longest_reach) + 2)
    first = ((centers - reach).floor() - before).clamp(min=0, max=n_pixels - n_taps)
    places = first + torch.arange(n_taps, device=device)
    pixels = places + before

    # A triangle around the center. At a border, the pixels that are there count more.
    weights = (1 - ((pixels - centers + 0.5) * (1 / reach)).abs()).clamp(min=0)
    weights = weights * ((pixels < length) & (new_pixels < n_new))
    sums = weights.sum(dim=2, keepdim=True)
    weights = weights / sums.where(sums > 0, 1.0)

    # Rounded as Pillow does, and divided into its leading bits and the rest
    weights = (weights * 2**_WEIGHT_BITS + 0.5).floor() / 2**_WEIGHT_BITS
    coarse = (weights * 2**_COARSE_BITS).round() / 2**_COARSE_BITS
    places = places.long()
    shape = (len(parts), most_new, n_pixels)
    dense_coarse = torch.zeros(shape, device=device)
    dense_fine = torch.zeros(shape, device=device)
    return _Weights(
        coarse=dense_coarse.scatter_(2, places, coarse.float()),
        fine=dense_fine.scatter_(2, places, (weights - coarse).float()),
    )


def _rounded(coarse: Tensor, fine: Tensor) -> Tensor:
    """Returns the sums coarse + fine rounded to whole numbers, halves up; `coarse` is changed.

    The sums as such are not exact in float32. What `coarse` lacks to a whole number is, and so is
    that plus `fine`.
    """
    coarse = coarse.add_(0.5)
    whole = coarse.floor()
    return coarse.sub_(whole).add_(fine).floor_().add_(whole)
