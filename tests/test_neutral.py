"""The settings that tell two runs apart, and those that must not."""

import pytest

from relloc import neutral
from relloc.runs import settings


def test_every_name_is_a_setting() -> None:
    """A setting that was renamed would count again, and older runs could not be continued."""
    known = {
        name for command in ("train", "evaluate") for name in settings.compose(command).names()
    }
    known |= {"hydra", *settings.compose("train", ["data=folder"]).names()}
    assert {*neutral._EXECUTION, *neutral._OBSERVATION} - known == set()


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
