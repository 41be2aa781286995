"""What a detector finds in an image, which metrics and pictures take."""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relloc.to_device import on_device
from relloc.transfer.resize import Size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """The objects that a network finds in one image, those of the highest score first.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels.
        scores: 0 to 1.
        classes: 0 to number of classes - 1.
        masks: one for each detection, of the size of the image, where the network finds masks.
        mask_cells: the masks before they are pasted into the image (`relloc.transfer.detection.
            masks.pasted`): the probability that a cell of a grid over the box is of the object.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, "n"]
    classes: Int[Tensor, "n"]
    masks: Bool[Tensor, "n h w"] | None = None
    mask_cells: Float[Tensor, "n s s"] | None = None

    def rescaled(self, size: Size, original_size: Size) -> "Detections":
        """Returns them with boxes in pixels of the original image, which was resized to `size`.

        Cells of masks are left as they are: they lie over the box, whatever its size.
        """
        # Each side has its own scale, since resized sides are rounded to whole pixels.
        height, width = size
        original_height, original_width = original_size
        scale_x = original_width / width
        scale_y = original_height / height
        scale_of_box = [scale_x, scale_y, scale_x, scale_y]
        scales = on_device([scale_of_box], self.boxes)
        rescaled_boxes = self.boxes * scales
        return dataclasses.replace(self, boxes=rescaled_boxes)


def nothing_found() -> Detections:
    """Returns no detections, on the CPU."""
    return Detections(
        boxes=torch.zeros(0, 4),
        scores=torch.zeros(0),
        classes=torch.zeros(0, dtype=torch.int64),
    )
