"""What a segmentation network is trained on."""

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationBatch:
    """Normalized crops, and the class of each pixel, `VOID` where it has none.

    `seeds` are those of dropout (`relloc.transfer.dropout`), one for each crop.
    """

    images: Float[Tensor, "b 3 s s"]
    class_maps: Int[Tensor, "b s s"]
    seeds: Int[Tensor, "b"]
