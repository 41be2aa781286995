"""The settings that tell two runs apart, and those that must not."""

import dataclasses

import pytest

from relloc import neutral
from relloc.geometry import PatchGrid, ShortSide
from relloc.runs import settings


def test_every_name_is_a_setting() -> None:
    """A setting that was renamed would count again, and older runs could not be continued."""
    known = {
        name for command in ("train", "evaluate") for name in settings.compose(command).names()
    }
    known |= {"hydra", *settings.compose("train", ["data=folder"]).names()}
    known |= set(settings.compose("train", ["model=resnet50"]).names())
    listed = {*neutral._EXECUTION, *neutral._OBSERVATION, *neutral._LATER}
    assert listed - known == set()


def test_later_settings_are_left_out_at_the_values_that_conf_has() -> None:
    composed = settings.compose("train", ["model=resnet50"])
    assert {name: composed.value(name) for name in neutral._LATER} == neutral._LATER
    nested = {"backbone": {"depth": 50, "last_stride": 2, "width": 2}}
    assert neutral.without_later(nested, "model.") == {"backbone": {"depth": 50, "width": 2}}
    assert neutral.settings_of_run({"model": nested}) == {
        "model": {"backbone": {"depth": 50, "width": 2}}
    }
    flat = {"model.backbone.last_stride": 2, "model.backbone.width": 2}
    assert neutral.settings_of_weights(flat) == {"model.backbone.width": 2}


@pytest.mark.parametrize(
    "name",
    ["device", "recipe.lr", "monitor.images", "data.source.root", "eval.knn.k", "view.batch"],
)
def test_neutral_settings_do_not_tell_weights_apart(name: str) -> None:
    assert neutral.settings_of_weights({name: 1}) == {}


@pytest.mark.parametrize(
    "name", ["recipe.images_per_step", "data.name", "precision", "seed", "grid.gap_px", "monitors"]
)
def test_all_others_do(name: str) -> None:
    assert neutral.settings_of_weights({name: 1}) == {name: 1}


def test_a_later_setting_counts_only_where_it_is_not_what_was_done_before() -> None:
    for decides in (neutral.settings_of_weights, neutral.settings_of_run):
        assert decides({"decode": "cpu"}) == {}
        assert decides({"decode": "device"}) == {"decode": "device"}


def test_what_is_left_of_a_group_that_was_taken_out_tells_nothing_apart() -> None:
    left = {"gap_px": 99, "otherwise": {"_target_": "relloc.patches.color.Keep"}}
    chosen = {"_target_": "relloc.patches.curriculum.Curriculum", **left}
    assert neutral.settings_of_run({"seed": 1, "curriculum": left}) == {"seed": 1}
    assert neutral.settings_of_run({"curriculum": chosen}) == {"curriculum": chosen}
    flat_left = {"curriculum.gap_px": 99}
    flat_chosen = {"curriculum._target_": chosen["_target_"], **flat_left}
    assert neutral.settings_of_weights({"seed": 1, **flat_left}) == {"seed": 1}
    assert neutral.settings_of_weights(flat_chosen) == flat_chosen


def test_a_run_is_the_same_however_it_is_run_and_another_with_other_evaluations() -> None:
    config = {
        "device": "cpu",
        "seed": 1,
        "recipe": {"lr": 1, "images_per_step": 2},
        "eval": {"knn": {"device": 3}},
    }
    assert neutral.settings_of_run(config) == {
        "seed": 1,
        "recipe": {"images_per_step": 2},
        "eval": {"knn": {"device": 3}},
    }


@pytest.mark.parametrize("group", ["grid", "study.human.grid"])
def test_later_settings_count_only_where_they_change_something(group: str) -> None:
    assert neutral.settings_of_run({"yoked_jitter": False, "gap_px": 1}, f"{group}.") == {
        "gap_px": 1
    }
    assert neutral.settings_of_weights({"grid.yoked_jitter": False}) == {}
    assert neutral.settings_of_run({"yoked_jitter": True}, f"{group}.") == {"yoked_jitter": True}
    assert neutral.settings_of_weights({"grid.yoked_jitter": True}) == {"grid.yoked_jitter": True}
    assert neutral.settings_of_run({"watch": None}) == {}
    assert neutral.settings_of_run({"watch": "a"}) == {"watch": "a"}


def test_a_run_that_asks_about_the_center_is_as_before_other_pairs_existed() -> None:
    center = {"_target_": "relloc.pretext.questions.CenterPairs"}
    adjacent = {"_target_": "relloc.pretext.questions.AdjacentPairs"}
    assert settings.compose("train").config.pairs == center
    assert neutral.settings_of_run({"seed": 1, "pairs": center}) == {"seed": 1}
    assert neutral.settings_of_weights({"pairs._target_": center["_target_"]}) == {}
    assert neutral.settings_of_run({"pairs": adjacent}) == {"pairs": adjacent}
    assert neutral.settings_of_weights({"pairs._target_": adjacent["_target_"]}) != {}


def test_texts_of_fingerprints_are_as_before_until_a_later_field_is_set() -> None:
    before = "PatchGrid(patch_px=8, gap_px=3, jitter_px=1, resize=ShortSide(px=40))"
    grid = PatchGrid(patch_px=8, gap_px=3, jitter_px=1, resize=ShortSide(px=40))
    yoked = dataclasses.replace(grid, yoked_jitter=True)
    assert repr(grid) == before
    assert repr(yoked) == before.removesuffix(")") + ", yoked_jitter=True)"
