"""Each task learns eight real images by heart, through its evaluation's own training and test.

A small network on small images does so on a CPU, where detectors and segmenters learn four of them,
portraits among them, as a step takes half the time and fewer steps are enough. At full size it is
the card's network, at the sizes of the card's test, on a GPU:
`pytest -m gpu tests/transfer/test_transfer_eight_images.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import context
from eight_images import coco_objects, voc_masks, voc_objects, voc_presence
from torch import nn

from relloc.data.image_set import Splits
from relloc.data.views import RandomSquare
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.models.backbone import Backbone
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.transfer.cityscapes_fcn import CityscapesFcn
from relloc.transfer.coco_mask_rcnn_fpn_1x import CocoMaskRcnnFpn1x
from relloc.transfer.detection.faster_rcnn_c4 import C4Settings, FasterRCNNC4
from relloc.transfer.detection.mask_rcnn import MaskRCNNFPN, MaskRcnnSettings
from relloc.transfer.detection.proposals import ProposalCounts
from relloc.transfer.detection.regions import RegionTraining
from relloc.transfer.detection.rpn import RpnTraining
from relloc.transfer.detection.samples import RandomSizes
from relloc.transfer.iterations import IterativeFineTuning
from relloc.transfer.resize import FittedImage
from relloc.transfer.segmentation.inference import SlidingWindows, WholeImage
from relloc.transfer.segmentation.photometric import PhotometricDistortion
from relloc.transfer.segmentation.transforms import TrainingCrops
from relloc.transfer.voc07_finetune import Voc07Finetune
from relloc.transfer.voc0712_detection import Voc0712Detection
from relloc.transfer.voc12aug_fcn import Voc12AugFcn

pytestmark = [pytest.mark.data, pytest.mark.slow]

SIZES = ["small", pytest.param("full", marks=pytest.mark.gpu)]

# Of a small detector or segmenter
FEW_IMAGES = 4
# Fewer regions than the card's, of which more show objects.
LITTLE_RPN = RpnTraining(anchors_per_image=64)
LITTLE_REGIONS = RegionTraining(regions_per_image=16, positive_share=0.5)
LITTLE_TRAINING = ProposalCounts(before_nms=400, after_nms=100)
LITTLE_TEST = ProposalCounts(before_nms=400, after_nms=100)

# As good as no change of colors: what is tested is what was trained.
PLAIN_COLORS = PhotometricDistortion(
    brightness=0,
    contrast=(1, 1),
    saturation=(1, 1),
    hue=1,
)
SHARED: dict[str, Any] = {
    "batch": 8,
    "images_per_forward": None,
    "momentum": 0.9,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallVoc0712Detection(Voc0712Detection):
    """The evaluation with few regions."""

    def make_network(self, context: Context) -> nn.Module:
        settings = C4Settings(
            rpn=LITTLE_RPN,
            training_proposals=LITTLE_TRAINING,
            test_proposals=LITTLE_TEST,
            regions=LITTLE_REGIONS,
        )
        n_classes = len(context.splits.train.classes)
        return FasterRCNNC4(context.backbone, n_classes, settings, seed=context.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallCocoMaskRcnn(CocoMaskRcnnFpn1x):
    """The evaluation with a narrow pyramid and few regions."""

    def make_network(self, context: Context) -> nn.Module:
        defaults = MaskRcnnSettings()
        settings = MaskRcnnSettings(
            channels=32,
            hidden=64,
            rpn=dataclasses.replace(LITTLE_RPN, use_crossing_anchors=True),
            training_proposals=LITTLE_TRAINING,
            test_proposals=LITTLE_TEST,
            regions=dataclasses.replace(LITTLE_REGIONS, rule=defaults.regions.rule),
        )
        n_classes = len(context.splits.train.classes)
        return MaskRCNNFPN(context.backbone, n_classes, settings, seed=context.seed)


def small_backbone(*widths: int) -> Backbone:
    """A small backbone with the strides of a ResNet, which fit objects of small images."""
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=widths)
    first_convolution = backbone.stem[0]
    first_convolution.stride = (2, 2)
    return backbone.eval()


def resnet50() -> Backbone:
    torch.manual_seed(0)
    return ResNetBackbone(depth=50).eval()


def scores_of(
    one: IterativeFineTuning, splits: Splits, backbone: Backbone, folder: Path, size: str
) -> dict[str, float]:
    """Runs the evaluation and returns the value of each metric, in percent."""
    is_full = size == "full"
    device = torch.device("cuda" if is_full else "cpu")
    config = EncodeConfig(
        batch=8,
        workers=4 if is_full else 0,
        device=device,
        precision="bf16" if is_full else "fp32",
        unreadable_share=0.0,
    )
    one.check(splits)
    given = context(
        splits=splits,
        backbone=backbone.to(device),
        encode_config=config,
        folder=folder / "pictures",
    )
    scores = {score.metric: score.value for score in one.run(given)}
    print(scores)  # shown where the test fails
    return scores


def detection_settings(
    box: tuple[int, int], iterations: int, learning_rate: float, n_images: int
) -> dict[str, Any]:
    """What both detectors are trained with: one size of images, which is that of the test."""
    long, short = box
    return {
        **SHARED,
        "batch": n_images,
        "iterations": iterations,
        "evaluate_every": iterations,
        "images_per_gpu": 2,
        "learning_rate": learning_rate,
        "weight_decay": 1e-4,
        "gamma": 0.1,
        "warmup_from": 0.001,
        "augment": RandomSizes(short_px=[short], long_px=long, flip=0.0),
        "view": FittedImage(box=[long, short]),
        "test_batch": 8,
    }


@pytest.mark.parametrize("size", SIZES)
def test_voc_boxes_are_learned_by_heart(size: str, tmp_path: Path) -> None:
    is_full = size == "full"
    iterations = 400 if is_full else 150
    n_images = 8 if is_full else FEW_IMAGES
    # Anchors that leave the image are not trained, so it has to be larger than for COCO.
    box = (1333, 800) if is_full else (240, 160)
    kind = Voc0712Detection if is_full else SmallVoc0712Detection
    one = kind(
        **detection_settings(box, iterations, 0.02 if is_full else 0.05, n_images),
        reference="mmdet",
        milestones=[iterations * 3 // 4],
        warmup=iterations // 10,
        precise_batches=1,
    )
    backbone = resnet50() if is_full else small_backbone(16, 32, 48, 48, 96)
    scores = scores_of(one, voc_objects(tmp_path, n_images), backbone, tmp_path, size)
    # Rounding, which differs between processors, moves both: of eight images ap50 was 89.8 on one
    # and above 90 on another. Boxes are not only near, but exact.
    assert scores["ap50"] > 75
    assert scores["ap75"] > 60


@pytest.mark.parametrize("size", SIZES)
def test_coco_boxes_and_masks_are_learned_by_heart(size: str, tmp_path: Path) -> None:
    is_full = size == "full"
    iterations = 400 if is_full else 150
    n_images = 8 if is_full else FEW_IMAGES
    box = (1333, 800) if is_full else (192, 128)
    kind = CocoMaskRcnnFpn1x if is_full else SmallCocoMaskRcnn
    # The warm-up is given in iterations of the published training.
    warmup = 87_960 // 10
    one = kind(
        **detection_settings(box, iterations, 0.02 if is_full else 0.06, n_images),
        epochs=12,
        milestone_epochs=[9],
        warmup=warmup,
    )
    backbone = resnet50() if is_full else small_backbone(16, 32, 48, 64, 96)
    scores = scores_of(one, coco_objects(tmp_path, n_images), backbone, tmp_path, size)
    # Rounding moves these as well: of eight images mask_ap75 was 49 on one processor and above 60
    # on another.
    assert scores["box_ap50"] > 75
    assert scores["mask_ap50"] > 75
    assert scores["box_ap75"] > 50
    assert scores["mask_ap75"] > 30


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [Voc12AugFcn, CityscapesFcn])
def test_class_maps_are_learned_by_heart(
    kind: type[Voc12AugFcn] | type[CityscapesFcn], size: str, tmp_path: Path
) -> None:
    """Also by the network and the windows of Cityscapes, of which there are no images here."""
    is_full = size == "full"
    view: WholeImage | SlidingWindows
    if kind is Voc12AugFcn:
        box, crop_px = ((2048, 512), 512) if is_full else ((256, 128), 128)
        view = WholeImage(box=box)
    else:
        # The shorter side of images of VOC is the box's, which is larger than a window.
        box, crop_px, stride_px = ((2049, 1025), 769, 513) if is_full else ((256, 128), 96, 64)
        view = SlidingWindows(box=box, window_px=crop_px, stride_px=stride_px)
    iterations = 400 if is_full else 180
    n_images = 8 if is_full else FEW_IMAGES
    one = kind(
        **{**SHARED, "batch": n_images},
        iterations=iterations,
        evaluate_every=iterations,
        learning_rate=0.02 if is_full else 0.15,
        lowest_rate=1e-4,
        power=0.9,
        weight_decay=5e-4,
        augment=TrainingCrops(
            box=box,
            ratio=(1, 1),
            crop_px=crop_px,
            most_of_one_class=1,
            flip=0.0,
            photometric=PLAIN_COLORS,
        ),
        view=view,
    )
    backbone = resnet50() if is_full else small_backbone(16, 32, 64, 96, 128)
    scores = scores_of(one, voc_masks(tmp_path, n_images), backbone, tmp_path, size)
    # Over the classes that are there.
    assert scores["miou"] > 80
    n_classes = 10 if is_full else 5
    assert len([name for name in scores if name.startswith("iou_")]) == n_classes


@pytest.mark.parametrize("size", SIZES)
def test_classes_are_learned_by_heart(size: str, tmp_path: Path) -> None:
    is_full = size == "full"
    iterations = 400 if is_full else 200
    one = Voc07Finetune(
        **SHARED,
        iterations=iterations,
        evaluate_every=iterations,
        learning_rate=0.02 if is_full else 0.05,
        weight_decay=1e-6,
        trained="all layers",
        rescale=None,
        view=RandomSquare(crop_px=227 if is_full else 96),
        crops=10,
        clip_norm=10.0,
        milestones=[iterations * 3 // 4],
        gamma=0.1,
    )
    backbone = resnet50() if is_full else small_backbone(16, 32, 48, 64, 96)
    scores = scores_of(one, voc_presence(tmp_path), backbone, tmp_path, size)
    assert scores["map"] > 95
