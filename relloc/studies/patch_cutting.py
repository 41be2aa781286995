"""Cuts patches out of images of any size and resizes them, on the device.

Images are copied to the device as they are stored, one after the other, and their boxes are cut out
of them there: `flat_images`, then `cut_resized`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from relloc.studies.patch_sets import Boxes
from relloc.to_device import to_device

# Memory, in bytes, for the pixels of boxes that are resized at once.
_WORK_BYTES = 2**29
# For each pixel of a box: its index (8), its values as bytes (3) and as float32 (12), and as much
# again for what is between the two products.
_BYTES_PER_PIXEL = 48


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlatImages:
    """Images of any sizes on the device: their pixels one after the other, row by row.

    `starts` are the numbers of the first pixels of the images, `widths` their widths in pixels.
    """

    pixels: UInt8[Tensor, "pixels 3"]
    starts: Int64[np.ndarray, "images"]
    widths: Int64[np.ndarray, "images"]


def flat_images(arrays: Sequence[UInt8[np.ndarray, "_ _ 3"]], device: torch.device) -> FlatImages:
    """Copies images to the device, to a GPU by one copy for which the process does not wait."""
    sizes = [array.shape[0] * array.shape[1] for array in arrays]
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - np.array(sizes, dtype=np.int64)
    on_gpu = device.type == "cuda"
    staged = torch.empty(int(ends[-1]), 3, dtype=torch.uint8, pin_memory=on_gpu)
    # numpy copies: torch would share the work among threads, which are busy decoding images.
    rows = staged.numpy()
    for array, start, end in zip(arrays, starts, ends, strict=True):
        rows[start:end] = array.reshape(-1, 3)
    return FlatImages(
        pixels=staged.to(device, non_blocking=True),
        starts=starts,
        widths=np.array([array.shape[1] for array in arrays], dtype=np.int64),
    )


def cut_resized(
    images: FlatImages,
    numbers: Int[np.ndarray, "b"],
    boxes: Boxes,
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Returns what boxes hold, each resized to `patch_px` x `patch_px`, with values 0..255.

    Resizing is linear and antialiased: each new pixel is the mean of the pixels under a triangle
    twice as wide as itself, as in Pillow and in torch's `interpolate(antialias=True)`. It sees the
    pixels of the box alone, and does not round to whole gray levels. Boxes that have `patch_px`
    already stay as they are. Where the run's precision is tf32 or bf16, the weights are rounded to
    11 bits (0.1 gray levels).

    Args:
        images: the images.
        numbers: which image each box belongs to.
        boxes: within their images.
        patch_px: side of the patches.
    """
    if images.pixels.device.type == "cpu":
        return _cut_one_by_one(images, numbers, boxes, patch_px)
    return _cut_together(images, numbers, boxes, patch_px)


def _cut_one_by_one(
    images: FlatImages,
    numbers: Int[np.ndarray, "b"],
    boxes: Boxes,
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Does what `cut_resized` does, box by box: a CPU is faster with slices than with indices."""
    patches = torch.empty(len(boxes), 3, patch_px, patch_px)
    size = (patch_px, patch_px)
    for patch, number, (x1, y1, x2, y2) in zip(patches, numbers, boxes.tolist(), strict=True):
        start = int(images.starts[number])
        width = int(images.widths[number])
        # The rows of the box, as a view of the pixels (rows width 3)
        rows = images.pixels[start + y1 * width : start + y2 * width].view(-1, width, 3)
        box = rows[:, x1:x2].permute(2, 0, 1)
        if box.shape[1:] == size:
            patch.copy_(box)
        else:
            patch.copy_(interpolate(box[None].float(), size, mode="bilinear", antialias=True)[0])
    return patches


def _cut_together(
    images: FlatImages,
    numbers: Int[np.ndarray, "b"],
    boxes: Boxes,
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Does what `cut_resized` does, for many boxes at once: a GPU waits for one at a time."""
    device = images.pixels.device
    widths = boxes[:, 2] - boxes[:, 0]
    heights = boxes[:, 3] - boxes[:, 1]
    patches = torch.empty(len(boxes), 3, patch_px, patch_px, device=device)
    # Boxes of one part are padded to one size, so that parts should have boxes of similar sizes.
    order = np.argsort(heights * widths, kind="stable")
    for part in _parts_in_memory(order, heights, widths, _WORK_BYTES):
        columns = (
            images.starts[numbers[part]],
            images.widths[numbers[part]],
            boxes[part, 0],
            boxes[part, 1],
            widths[part],
            heights[part],
            part,
        )
        # One copy to the device for all numbers
        table = to_device(torch.from_numpy(np.stack(columns)), device)
        starts, strides, lefts, tops, box_widths, box_heights, targets = table.unsqueeze(2)
        # Pixels beyond a smaller box repeat its last one; they get no weight below.
        x = torch.arange(int(widths[part].max()), device=device)
        y = torch.arange(int(heights[part].max()), device=device)
        columns_of_box = lefts + torch.minimum(x, box_widths - 1)
        rows_of_box = tops + torch.minimum(y, box_heights - 1)
        row_starts = starts + rows_of_box * strides
        indices = row_starts.unsqueeze(2) + columns_of_box.unsqueeze(1)
        pixels = images.pixels[indices].float()
        if (widths[part] == patch_px).all() and (heights[part] == patch_px).all():
            resized = pixels.permute(0, 3, 1, 2)
        else:
            resized = _resized(pixels, box_heights, box_widths, patch_px)
        patches[targets.squeeze(1)] = resized
    return patches


def _parts_in_memory(
    order: Int64[np.ndarray, "b"],
    heights: Int64[np.ndarray, "b"],
    widths: Int64[np.ndarray, "b"],
    most_bytes: int,
) -> Iterator[Int64[np.ndarray, "part"]]:
    """Yields parts of `order` whose padded boxes fit into `most_bytes`, one box at least."""
    first = 0
    tallest = widest = 0
    for position, box in enumerate(order):
        tallest = max(tallest, int(heights[box]))
        widest = max(widest, int(widths[box]))
        n_boxes = position + 1 - first
        if n_boxes > 1 and n_boxes * tallest * widest * _BYTES_PER_PIXEL > most_bytes:
            yield order[first:position]
            first = position
            tallest = int(heights[box])
            widest = int(widths[box])
    if first < len(order):
        yield order[first:]


def _resized(
    pixels: Float[Tensor, "b h w 3"],
    heights: Int64[Tensor, "b 1"],
    widths: Int64[Tensor, "b 1"],
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Resizes boxes in the upper left of `pixels`, by one product for rows and one for columns."""
    row_weights = _weights(heights, patch_px, pixels.shape[1])
    column_weights = _weights(widths, patch_px, pixels.shape[2])
    rows = row_weights @ pixels.flatten(2)
    # (b p w 3) to (b 3 p w)
    rows = rows.unflatten(2, pixels.shape[2:]).permute(0, 3, 1, 2)
    return rows @ column_weights.transpose(1, 2).unsqueeze(1)


def _weights(sides: Int64[Tensor, "b 1"], patch_px: int, n: int) -> Float[Tensor, "b p n"]:
    """Returns the weights of `n` old pixels in each new one, when a side becomes `patch_px`.

    Old pixels from the side on have no weight.
    """
    scale = (sides / patch_px).unsqueeze(2)
    new_centers = torch.arange(patch_px, device=sides.device).view(1, -1, 1) + 0.5
    old_centers = torch.arange(n, device=sides.device).view(1, 1, -1) + 0.5
    distances = (old_centers - new_centers * scale).abs()
    # Enlarging is plain linear interpolation, between two old pixels.
    weights = (1 - distances / scale.clamp(min=1)).clamp(min=0)
    weights = weights * (old_centers < sides.unsqueeze(2))
    return weights / weights.sum(dim=2, keepdim=True)
