"""Detection and fine-tuned classification are the published ones (3.8, 3.9, 3.15 and 3.16)."""

from typing import Any

import pytest
from hydra.utils import instantiate

from relloc.data.views import RandomSquare
from relloc.reports.published import card_parts
from relloc.transfer.coco_mask_rcnn_fpn_1x import CocoMaskRcnnFpn1x
from relloc.transfer.detection.box_head import DetectionRule
from relloc.transfer.detection.fast_rcnn import TEST_RULE
from relloc.transfer.detection.given_proposals import FAST_RCNN_RULE
from relloc.transfer.detection.samples import RandomSizes
from relloc.transfer.resize import FittedImage
from relloc.transfer.voc07_fast_rcnn import Voc07FastRcnn
from relloc.transfer.voc07_finetune import Voc07Finetune
from relloc.transfer.voc0712_detection import Voc0712Detection

# What detectors of both data sets share
DETECTOR = {
    "batch": 16,
    "images_per_gpu": 2,
    "images_per_forward": None,
    "batch_norm": "as_trained",
    "learning_rate": 0.02,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "gamma": 0.1,
    "warmup_from": 0.001,
    "view": FittedImage(box=[1333, 800]),
}
VOC_SIZES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
COCO_SIZES = [640, 672, 704, 736, 768, 800]
CLASSIFIER = {
    "iterations": 80_000,
    "batch": 16,
    "images_per_gpu": 1,
    "images_per_forward": None,
    "batch_norm": "as_trained",
    "learning_rate": 0.001,
    "momentum": 0.9,
    "weight_decay": 1e-6,
    "clip_norm": 10,
    "milestones": [10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 70_000],
    "gamma": 0.5,
    "rescale": None,
    "crops": 10,
    "view": RandomSquare(crop_px=227, scale=(0.5, 2.0), flip=0.5),
}
PUBLISHED: dict[str, tuple[type, dict[str, Any]]] = {
    "voc0712_detection": (
        Voc0712Detection,
        {
            **DETECTOR,
            "reference": "mmdet",
            "iterations": 24_000,
            "milestones": [18_000, 22_000],
            "warmup": 100,
            "precise_batches": 200,
            "augment": RandomSizes(short_px=VOC_SIZES, long_px=1333, flip=0.5),
        },
    ),
    "coco_mask_rcnn_fpn_1x": (
        CocoMaskRcnnFpn1x,
        {
            **DETECTOR,
            "iterations": None,
            "epochs": 12,
            "milestone_epochs": [8, 11],
            "warmup": 1000,
            "augment": RandomSizes(short_px=COCO_SIZES, long_px=1333, flip=0.5),
        },
    ),
    "voc07_finetune": (Voc07Finetune, {**CLASSIFIER, "trained": "all layers"}),
    "voc07_finetune_fc": (Voc07Finetune, {**CLASSIFIER, "trained": "fc6-8"}),
    "voc07_fast_rcnn": (
        Voc07FastRcnn,
        {
            "iterations": 40_000,
            "batch": 2,
            "images_per_gpu": 2,
            "images_per_forward": None,
            "batch_norm": "as_trained",
            "learning_rate": 0.001,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "milestones": [30_000],
            "gamma": 0.1,
            "rescale": None,
            "rescaling_view": RandomSquare(crop_px=227, scale=(0.5, 2.0), flip=0.5),
            "augment": FittedImage(box=[1000, 600]),
            "view": FittedImage(box=[1000, 600]),
        },
    ),
}


def node_of(compose, name: str, *words: str):
    changes = [f"eval.{name}.{word}" for word in words]
    config = compose("evaluate", ["checkpoint=random", f"eval=[{name}]", *changes])
    return config.eval[name]


def evaluation(compose, name: str, *words: str) -> Any:
    node = node_of(compose, name, *words)
    without_data = {key: value for key, value in node.items() if key != "data"}
    return instantiate(without_data, _convert_="all")


def test_regions_and_detections_of_fast_rcnn_are_the_published_ones():
    rule = FAST_RCNN_RULE
    assert (rule.regions_per_image, rule.positive_share) == (64, 0.25)
    assert (rule.background_overlap, rule.positive_overlap) == (0.1, 0.5)
    published = DetectionRule(above_score=0.05, nms_overlap=0.3, most_per_image=100)
    assert published == TEST_RULE


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_setting_is_the_published_one(compose, name):
    kind, published = PUBLISHED[name]
    one = evaluation(compose, name)
    assert type(one) is kind
    assert {field: getattr(one, field) for field in published} == published
    # What the file sets beyond these decides no number.
    neutral = {"_target_", "data", "evaluate_every", "test_batch"}
    assert set(node_of(compose, name)) <= {*published, *neutral}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_class_calls_published_is_what_the_file_sets(compose, name):
    _, published = PUBLISHED[name]
    one = evaluation(compose, name)
    for field, value in one.published.items():
        # COCO has its length in epochs.
        if published[field] is not None:
            assert value == published[field]


@pytest.mark.parametrize("name", [*PUBLISHED, "voc12aug_fcn", "cityscapes_fcn"])
def test_the_card_has_the_view_of_the_evaluation(compose, name):
    (part,) = (part for part in card_parts() if part.evaluation == name)
    assert str(evaluation(compose, name).view) == part.view


def test_another_batch_has_a_rate_in_proportion(compose):
    for name, doubled in (
        ("voc0712_detection", 0.04),
        ("coco_mask_rcnn_fpn_1x", 0.04),
        ("voc07_finetune", 0.002),
        ("voc07_fast_rcnn", 0.016),
    ):
        assert evaluation(compose, name, "batch=32").learning_rate == pytest.approx(doubled)


def test_another_length_has_milestones_and_warm_up_in_proportion(compose):
    voc = evaluation(compose, "voc0712_detection", "iterations=2400")
    assert (voc.milestones, voc.warmup) == ([1800, 2200], 10)
    coco = evaluation(compose, "coco_mask_rcnn_fpn_1x", "iterations=8796")
    schedule = coco.schedule(coco.iterations)
    assert schedule.milestones == pytest.approx([5864, 8063])
    assert schedule.warmup == pytest.approx(100)
    classifier = evaluation(compose, "voc07_finetune", "iterations=800")
    assert classifier.milestones == [100, 200, 300, 400, 500, 600, 700]
    assert evaluation(compose, "voc07_fast_rcnn", "iterations=400").milestones == [300]


def test_rates_of_coco_over_the_published_length(compose):
    # 117,266 images in batches of 16 are 7,330 iterations an epoch.
    coco = evaluation(compose, "coco_mask_rcnn_fpn_1x", "iterations=87960")
    schedule = coco.schedule(coco.iterations)
    rates = {step: 0.02 * schedule.factor(step) for step in (0, 1000, 58_639, 58_640, 80_630)}
    expected = {0: 2e-5, 1000: 0.02, 58_639: 0.02, 58_640: 0.002, 80_630: 0.0002}
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("reference", ["mmdet", "detectron2"])
def test_boxes_of_voc_are_read_as_the_reference_reads_them(compose, reference):
    node = node_of(compose, "voc0712_detection", f"reference={reference}")
    assert node.data.source.reference == reference


def test_the_images_are_the_published_ones(compose):
    voc = node_of(compose, "voc0712_detection").data.source
    assert (voc.years, voc.train) == ([2007, 2012], "trainval")
    assert (voc.held_out_year, voc.held_out) == (2007, "test")
    assert voc.published_images == {"trainval": 16_551, "test": 4952}
    coco = node_of(compose, "coco_mask_rcnn_fpn_1x").data.source
    assert (coco.train, coco.held_out) == ("train2017", "val2017")
    assert coco.published_images == {"train": 118_287, "val": 5000}
    for name in ("voc07_finetune", "voc07_finetune_fc", "voc07_fast_rcnn"):
        classified = node_of(compose, name).data.source
        assert (classified.year, classified.train, classified.held_out) == (
            2007,
            "trainval",
            "test",
        )
