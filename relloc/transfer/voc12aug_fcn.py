"""Semantic segmentation of PASCAL VOC 2012 by a fine-tuned FCN (docs/protocols.md 3.10).

The constants are those of mmselfsup 0.x's configs/benchmarks/mmsegmentation/voc12aug/
fcn_r50-d8_512x512_20k_voc12aug.py, with what it inherits from mmsegmentation 0.30.
"""

import dataclasses
from typing import ClassVar

from relloc.transfer.segmentation.fine_tuning import FcnFineTuning
from relloc.transfer.segmentation.inference import WholeImage
from relloc.transfer.segmentation.transforms import TrainingCrops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc12AugFcn(FcnFineTuning):
    """mIoU on VOC2012 val after 20,000 iterations of 16 crops of 512 px."""

    # 1: mIoU was not rounded to 2 decimals, as mmseg prints it; 2: dropout was drawn by forward
    version = 3
    name = "voc12aug_fcn"
    table = "Segmentation, FCN, VOC12aug protocol"
    protocol = "3.10"
    align_corners = False
    # 1,464 images of VOC's train, and 9,118 more with masks of SBD.
    published_images = 10_582
    published_augment = TrainingCrops(box=(2048, 512), crop_px=512)
    published_view = WholeImage(box=(2048, 512))
    published: ClassVar = {
        "iterations": 20_000,
        "batch": 16,
        "learning_rate": 0.01,
        "lowest_rate": 1e-4,
        "power": 0.9,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
