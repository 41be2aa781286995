"""Semantic segmentation of Cityscapes by a fine-tuned FCN (docs/protocols.md 3.11).

The constants are those of mmselfsup 0.x's configs/benchmarks/mmsegmentation/cityscapes/
fcn_r50-d8_769x769_40k_cityscapes.py, with what it inherits from mmsegmentation 0.30.
"""

import dataclasses
from typing import ClassVar

from relloc.transfer.segmentation.fine_tuning import FcnFineTuning
from relloc.transfer.segmentation.inference import SlidingWindows
from relloc.transfer.segmentation.transforms import TrainingCrops


@dataclasses.dataclass(frozen=True, kw_only=True)
class CityscapesFcn(FcnFineTuning):
    """mIoU on Cityscapes val after 40,000 iterations of 8 crops of 769 px."""

    # 1: mIoU was not rounded to 2 decimals, as mmseg prints it; 2: dropout was drawn by forward
    version = 3
    name = "cityscapes_fcn"
    table = "Segmentation, FCN, Cityscapes protocol"
    protocol = "3.11"
    align_corners = True
    published_images = 2_975
    published_augment = TrainingCrops(box=(2049, 1025), crop_px=769)
    published_view = SlidingWindows(box=(2049, 1025), window_px=769, stride_px=513)
    published: ClassVar = {
        "iterations": 40_000,
        "batch": 8,
        "learning_rate": 0.01,
        "lowest_rate": 1e-4,
        "power": 0.9,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
