"""Anchors: the boxes of fixed sizes and shapes at every cell of a feature map."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relloc.to_device import on_device
from relloc.transfer.detection.batch import round_up_side
from relloc.transfer.resize import Size

# Height divided by width, as published.
RATIOS = (0.5, 1.0, 2.0)
# Bits of an anchor's id that number its row, and as many its column.
_BITS_OF_SIDE = 12
# For each image and each anchor: whether something holds.
_OfImages = Bool[Tensor, "b a"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Anchors:
    """The anchors of all levels of a padded batch: those of one level after those of another.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels; they may leave the image.
        centers: x and y of each anchor's cell, in pixels.
        ids: a number for each anchor that depends on level, cell and shape alone, and not on how
            far the batch is padded.
        of_levels: number of anchors of each level.
    """

    boxes: Float[Tensor, "a 4"]
    centers: Float[Tensor, "a 2"]
    ids: Int[Tensor, "a"]
    of_levels: Sequence[int]

    def of_images(self, sizes: Sequence[Size]) -> _OfImages:
        """Returns which anchors belong to the map of each image, padded to a multiple of 32 alone.

        The others exist only because another image of the batch is larger. mmdetection does not
        train on them either (its valid flags). It does propose them, but then the proposals of an
        image depend on which images stand beside it.
        """
        limits = []
        for height, width in sizes:
            padded_width = round_up_side(width)
            padded_height = round_up_side(height)
            limits.append([padded_width, padded_height])
        # Images by anchors by x and y.
        limit = on_device(limits, self.centers).view(len(sizes), 1, 2)
        is_below_limit = self.centers < limit
        return is_below_limit.all(dim=-1)

    def inside(self, sizes: Sequence[Size]) -> _OfImages:
        """Returns which anchors lie inside of each image without its padding.

        An anchor whose right or lower edge is that of the image does not, as in mmdetection.
        """
        limits = [[width, height] for height, width in sizes]
        # Images by anchors by x and y.
        limit = on_device(limits, self.boxes).view(len(sizes), 1, 2)
        top_left = self.boxes[:, :2]
        bottom_right = self.boxes[:, 2:]
        starts_inside = (top_left >= 0).all(dim=-1)
        ends_inside = (bottom_right < limit).all(dim=-1)
        return starts_inside & ends_inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorGrid:
    """Makes anchors of exact, not rounded, sides at the cells of one or several feature maps.

    Cell (row, column) of a level has its center at (column x stride, row x stride): the first one
    lies on the corner of the image.

    Attributes:
        strides: pixels from one cell to the next, for each level.
        sizes: square roots of the anchors' areas in pixels, for each level.
        ratios: heights divided by widths; each ratio is combined with each size.

    Raises:
        ValueError: levels with different numbers of sizes, or not as many as strides.
    """

    strides: Sequence[int]
    sizes: Sequence[Sequence[float]]
    ratios: Sequence[float] = RATIOS

    def __post_init__(self) -> None:
        # The head that scores anchors is shared by all levels, so that each level needs as many
        # anchors at a cell.
        numbers = {len(sizes) for sizes in self.sizes}
        fits_strides = len(self.sizes) == len(self.strides)
        if not fits_strides or len(numbers) != 1:
            raise ValueError(
                f"anchors of sizes {self.sizes} for maps of strides {self.strides}: "
                "give as many sizes for each stride"
            )

    @property
    def per_cell(self) -> int:
        """Number of anchors at each cell."""
        # All levels have as many sizes.
        n_sizes = len(self.sizes[0])
        return len(self.ratios) * n_sizes

    def at(self, map_sizes: Sequence[Size], device: torch.device) -> Anchors:
        """Returns the anchors of maps of these rows and columns, row by row.

        At each cell those of the first ratio come first, from the first size to the last.

        Raises:
            ValueError: a map has more than 4096 rows or columns.
        """
        boxes = []
        centers = []
        ids = []
        most_cells = 1 << _BITS_OF_SIDE
        for level, (rows, columns) in enumerate(map_sizes):
            if max(rows, columns) > most_cells:
                raise ValueError(
                    f"a feature map has {rows} x {columns} cells, more than "
                    f"{most_cells} in a row or column: give smaller images"
                )
            # Cells are in the order in which a map is flattened.
            row_numbers = torch.arange(rows, device=device)
            column_numbers = torch.arange(columns, device=device)
            row = row_numbers.repeat_interleave(columns)
            column = column_numbers.repeat(rows)
            cells = torch.stack([column, row], dim=1)
            level_centers = cells * self.strides[level]
            level_centers = level_centers.float()

            # Each cell's anchors lie around its center.
            at_origin = on_device(self._at_origin(level), level_centers)
            shifts = level_centers.repeat(1, 2)
            level_boxes = shifts.unsqueeze(1) + at_origin
            boxes.append(level_boxes.reshape(-1, 4))
            anchor_centers = level_centers.repeat_interleave(self.per_cell, dim=0)
            centers.append(anchor_centers)

            # Level, row and column have bits of their own, and not a running number, which would
            # depend on how many cells a map has.
            level_bits = level << 2 * _BITS_OF_SIDE
            row_bits = row << _BITS_OF_SIDE
            cell_ids = level_bits + row_bits + column
            first_ids = cell_ids * self.per_cell
            shape_ids = torch.arange(self.per_cell, device=device)
            level_ids = first_ids.unsqueeze(1) + shape_ids
            ids.append(level_ids.reshape(-1))
        return Anchors(
            boxes=torch.cat(boxes),
            centers=torch.cat(centers),
            ids=torch.cat(ids),
            of_levels=[len(level_boxes) for level_boxes in boxes],
        )

    def _at_origin(self, level: int) -> list[list[float]]:
        """Returns the anchors of a level around the point (0, 0)."""
        boxes = []
        for ratio in self.ratios:
            # A height of size x root and a width of size / root have the area size², and their
            # ratio is root².
            root = math.sqrt(ratio)
            for size in self.sizes[level]:
                half_width = size / root / 2
                half_height = size * root / 2
                box = [-half_width, -half_height, half_width, half_height]
                boxes.append(box)
        return boxes
