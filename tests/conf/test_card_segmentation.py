"""The evaluations of segmentation are the published ones (protocols.md 3.10, 3.11)."""

import pytest
from hydra.utils import instantiate

from relloc.transfer.cityscapes_fcn import CityscapesFcn
from relloc.transfer.same_settings import same_settings
from relloc.transfer.segmentation.fine_tuning import FcnFineTuning
from relloc.transfer.segmentation.inference import SlidingWindows, WholeImage
from relloc.transfer.voc12aug_fcn import Voc12AugFcn

KINDS = {"voc12aug_fcn": Voc12AugFcn, "cityscapes_fcn": CityscapesFcn}


def evaluation(compose, name: str, *words: str) -> FcnFineTuning:
    changes = [f"eval.{name}.{word}" for word in words]
    config = compose("evaluate", ["checkpoint=random", f"eval=[{name}]", *changes])
    node = {key: value for key, value in config.eval[name].items() if key != "data"}
    made = instantiate(node, _convert_="all")
    assert type(made) is KINDS[name]
    return made


@pytest.mark.parametrize("name", KINDS)
def test_all_values_are_those_that_the_class_calls_published(compose, name):
    one = evaluation(compose, name)
    for field, value in one.published.items():
        assert getattr(one, field) == value
    assert same_settings(one.augment, one.published_augment)
    assert same_settings(one.view, one.published_view)
    assert one.augment.most_of_one_class == 0.75
    photometric = one.augment.photometric
    assert (photometric.brightness, photometric.hue) == (32, 18)
    assert photometric.contrast == photometric.saturation == [0.5, 1.5]
    assert one.name == name
    assert one.images_per_forward is None


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("photometric.brightness=0", "brightness 0"),
        ("photometric.contrast=[1,1.5]", "contrast 1..1.5"),
        ("photometric.saturation=[0.5,1]", "saturation 0.5..1,"),
        ("photometric.hue=1", "hue 1)"),
        ("most_of_one_class=1", "less than 1 of one class"),
        ("flip=0", "flip 0,"),
    ],
)
def test_each_setting_of_the_crops_is_a_deviation_where_it_differs(compose, name, word, text):
    one = evaluation(compose, name, f"augment.{word}")
    assert not same_settings(one.augment, one.published_augment)
    assert text in str(one.augment)
    assert text not in str(one.published_augment)


def test_voc_is_tested_on_whole_images_and_cityscapes_on_windows(compose):
    voc = evaluation(compose, "voc12aug_fcn")
    assert voc.view == WholeImage(box=[2048, 512])
    assert (voc.evaluate_every, voc.align_corners) == (2000, False)
    cityscapes = evaluation(compose, "cityscapes_fcn")
    assert cityscapes.view == SlidingWindows(box=[2049, 1025], window_px=769, stride_px=513)
    assert (cityscapes.evaluate_every, cityscapes.align_corners) == (4000, True)


@pytest.mark.parametrize("name", KINDS)
def test_rates_follow_the_schedule_and_are_scaled_to_another_batch(compose, name):
    one = evaluation(compose, name)
    half = one.iterations / 2
    by_hand = (0.01 - 1e-4) * (1 - half / one.iterations) ** 0.9 + 1e-4
    assert 0.01 * one.schedule(one.iterations).factor(half) == pytest.approx(by_hand)
    doubled = evaluation(compose, name, f"batch={2 * one.batch}")
    assert (doubled.learning_rate, doubled.lowest_rate) == (0.02, 2e-4)
