"""Masks of regions: what they are trained on, their loss, and how they are pasted into images."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample, pad

from relloc.transfer.detection.align import align
from relloc.transfer.detection.batch import Targets, round_up_side
from relloc.transfer.detection.fpn_heads import MASK_SIDE
from relloc.transfer.detection.groups import mean_over_groups
from relloc.transfer.detection.regions import Regions
from relloc.transfer.detections import Detections
from relloc.transfer.resize import Size

# From this share or probability on, a cell or pixel belongs to the mask.
_THRESHOLD = 0.5
# Pixels of masks that are pasted at once: each takes 12 bytes, so this is 400 MB.
_PIXELS_AT_ONCE = 1 << 25
# A side in pixels by which a box without area is divided.
_LEAST_SIDE = 1e-6


@torch.no_grad()
def positive_regions(regions: Regions, n_images: int) -> tuple[Regions, list[int]]:
    """Returns the regions that are assigned to objects, and how many of them each image has.

    It waits for the device once, to learn the counts.
    """
    image = torch.arange(n_images, device=regions.images.device).unsqueeze(1)
    is_of_image = image == regions.images
    counts = (is_of_image & regions.positive).sum(dim=1).tolist()
    # Positive ones first, in the order that they have.
    is_other = (~regions.positive).to(torch.uint8)
    places = is_other.argsort(stable=True)[: sum(counts)]
    fields = {}
    for field in dataclasses.fields(regions):
        fields[field.name] = getattr(regions, field.name)[places]
    return Regions(**fields), counts


@torch.no_grad()
def mask_targets(
    regions: Regions,
    counts: Sequence[int],
    targets: Sequence[Targets],
) -> Bool[Tensor, "n 28 28"]:
    """Returns the part of each region's object that lies in the region, in 28 x 28 cells.

    A cell is of the object if half of its sample points are, or more. Between the last pixels of
    an image and its padding, if it has any, a sample point is partly of the padding, which is of no
    object.

    Args:
        regions: those that are assigned to objects, image after image.
        counts: number of regions of each image.
        targets: the objects of each image.

    Raises:
        ValueError: an image has no masks.
    """
    all_boxes = regions.boxes.split(list(counts))
    all_objects = regions.objects.split(list(counts))
    cells = [torch.zeros(0, MASK_SIDE, MASK_SIDE, device=regions.boxes.device)]
    # Image by image, since masks as numbers of 32 bits are large.
    for boxes, objects, each in zip(all_boxes, all_objects, targets, strict=True):
        if each.masks is None:
            raise ValueError("an image has no masks to train on: give `Targets.masks`")
        if not len(boxes):
            continue
        bitmaps = _padded(each.masks.float()).unsqueeze(1)
        shares = align(bitmaps, boxes, objects, side=MASK_SIDE, stride=1)
        cells.append(shares.squeeze(1))
    return torch.cat(cells) >= _THRESHOLD


def _padded(masks: Float[Tensor, "n h w"]) -> Float[Tensor, "n h2 w2"]:
    """Returns masks that are padded by zeros as their image is.

    Without, RoIAlign would take the last row and column for what lies beyond them. mmdetection pads
    masks beside each image (mmdet/datasets/pipelines/transforms.py, `Pad._pad_masks`).
    """
    height, width = masks.shape[1:]
    bottom = round_up_side(height) - height
    right = round_up_side(width) - width
    return pad(masks, (0, right, 0, bottom))


def mask_loss(
    logits: Float[Tensor, "n 28 28"],
    targets: Bool[Tensor, "n 28 28"],
    images: Int[Tensor, "n"],
    groups: Sequence[int],
) -> Float[Tensor, ""]:
    """Returns the binary cross-entropy of the cells, averaged over the regions of a group.

    Args:
        logits: of the mask of each region's true class.
        targets: the mask of its object.
        images: the image of each region.
        groups: number of the group of each image (see `mean_over_groups`).
    """
    cell_losses = binary_cross_entropy_with_logits(
        logits,
        targets.to(logits.dtype),
        reduction="none",
    )
    region_losses = cell_losses.mean(dim=(1, 2))
    image = torch.arange(len(groups), device=images.device).unsqueeze(1)
    is_of_image = image == images
    sums = torch.where(is_of_image, region_losses, 0).sum(dim=1)
    return mean_over_groups(sums, is_of_image.sum(dim=1), groups)


def pasted(found: Detections, size: Size) -> Detections:
    """Returns detections with masks of the size of their image, of the cells over their boxes.

    Boxes are in pixels of that image. Detections without such cells are returned as they are.
    """
    if found.mask_cells is None:
        return found
    masks = paste(found.mask_cells, found.boxes, size)
    return dataclasses.replace(found, masks=masks, mask_cells=None)


@torch.no_grad()
def paste(
    cells: Float[Tensor, "n s s"],
    boxes: Float[Tensor, "n 4"],
    size: Size,
) -> Bool[Tensor, "n h w"]:
    """Returns masks of an image of height and width `size`, of probabilities over boxes.

    The cells fill the box, which is neither rounded nor enlarged. A pixel takes the probability at
    its center, interpolated between the centers of cells, and beyond them with 0; it is in the mask
    from 0.5 on. A box without area has an empty mask.
    """
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    boxes = boxes.float()
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(boxes), at_once):
        end = start + at_once
        left, top, right, bottom = boxes[start:end].unsqueeze(2).unbind(dim=1)
        # From -1 at one edge of the box to 1 at the other.
        columns = (x - left) / (right - left).clamp(min=_LEAST_SIDE) * 2 - 1
        rows = (y - top) / (bottom - top).clamp(min=_LEAST_SIDE) * 2 - 1
        grid = torch.stack(
            [
                columns.unsqueeze(1).expand(-1, height, -1),
                rows.unsqueeze(2).expand(-1, -1, width),
            ],
            dim=3,
        )
        probabilities = grid_sample(
            cells[start:end].float().unsqueeze(1),
            grid,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        has_area = (right > left) & (bottom > top)
        masks[start:end] = (probabilities.squeeze(1) >= _THRESHOLD) & has_area.unsqueeze(2)
    return masks
