"""The FCN learns eight real images of PASCAL VOC by heart, as far as a small network can."""

import dataclasses
import os
import tarfile
from pathlib import Path

import pytest
import torch
from contexts import context

from relloc.data.annotated_folders import ClassMapFolder
from relloc.data.image_set import Splits
from relloc.data.voc_masks import voc_segmentation
from relloc.models.small import SmallBackbone
from relloc.transfer.segmentation.inference import WholeImage
from relloc.transfer.segmentation.transforms import TrainingCrops
from relloc.transfer.voc12aug_fcn import Voc12AugFcn

pytestmark = [pytest.mark.data, pytest.mark.slow]

SIDE = 128
STEPS = 200


def eight_images(folder: Path) -> ClassMapFolder:
    tars = os.environ.get("RELLOC_TEST_DATA")
    if not tars:
        pytest.skip("RELLOC_TEST_DATA does not name the folder of real images")
    with tarfile.open(Path(tars) / "voc_tiny.tar") as tar:
        tar.extractall(folder, filter="data")
    root = str(folder / "voc_tiny")
    splits = voc_segmentation(name="voc2012", root=root, train="train", held_out="val", aug=None)
    images = splits.train
    assert isinstance(images, ClassMapFolder)
    return dataclasses.replace(images, paths=images.paths[:8], mask_paths=images.mask_paths[:8])


def test_large_objects_of_eight_images_are_found_where_they_are(tmp_path: Path) -> None:
    images = eight_images(tmp_path)
    evaluation = Voc12AugFcn(
        iterations=STEPS,
        batch=8,
        images_per_gpu=4,
        images_per_forward=None,
        learning_rate=0.05,
        lowest_rate=1e-4,
        power=0.9,
        momentum=0.9,
        weight_decay=5e-4,
        evaluate_every=STEPS,
        augment=TrainingCrops(box=(4 * SIDE, SIDE), ratio=(1, 1.2), crop_px=SIDE),
        view=WholeImage(box=(4 * SIDE, SIDE)),
    )
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(32, 64, 96, 128, 192)).eval()
    splits = Splits(train=images, held_out=images)
    scores = evaluation.run(context(splits=splits, backbone=backbone, folder=tmp_path / "pictures"))
    found = {score.metric: score.value for score in scores}
    # The map has 8 x 8 positions at most, too few for the cow, the dog and the person.
    assert found["pixel_accuracy"] > 92
    for name in ("background", "aeroplane", "bus", "cat"):
        assert found[f"iou_{name}"] > 70, name
