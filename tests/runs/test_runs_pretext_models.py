"""Tests that the network of a run folder is asked with the patches that it was trained on."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from relloc.checkpoints import states
from relloc.errors import CheckpointError
from relloc.evaluation.contract import PretextModel
from relloc.runs import build
from relloc.runs.command_settings import Pretraining
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.pretext_models import pretext_model
from relloc.runs.settings import conf_dir

ALL = (
    *("grid.yoked_jitter=true", "grid.scale=[0.9,1.1]", "grid.resize.px=320"),
    *("chroma_blur=mundhenk2018", "aperture=mundhenk2018", "curriculum=linear"),
)


def composed(*words: str) -> tuple[Pretraining, str]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["model.backbone.widths=[8,8,8,8,8]", *words])
        return build.pretraining(config), OmegaConf.to_yaml(config, resolve=True)


def asked(folder: Path, *words: str, config_of: tuple[str, ...] = ()) -> PretextModel | None:
    """The network of a run with these settings, whose config.yaml may be another one's."""
    settings, config = composed(*words)
    if config_of:
        _, config = composed(*config_of)
    network = settings.network()
    state = {"model": network.state_dict(), "about": settings.about | {"step": 1}}
    checkpoint = states.save_training(folder, state, 1)
    (folder / CONFIG_FILE).write_text(config)
    return pretext_model(checkpoint, network.backbone)


@pytest.mark.parametrize("words", [(), ALL], ids=["plain", "all"])
def test_patches_are_made_as_at_the_end_of_the_training(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    found = asked(tmp_path, *words)
    assert found is not None
    settings, _ = composed(*words)
    assert found.patches == settings.patches
    assert repr(found.patches) in found.digest
    has_curriculum = "curriculum=linear" in words
    assert found.as_asked == ("as at the end of training" if has_curriculum else "as in training")


@pytest.mark.parametrize("words", ["rotation=quarter_turns", "pretext_answers=regression"])
def test_a_network_whose_answers_name_no_position_is_not_asked(words: str, tmp_path: Path) -> None:
    assert asked(tmp_path, words) is None


@pytest.mark.parametrize("words", ["grid.yoked_jitter=true", "aperture=mundhenk2018"])
def test_a_config_of_another_training_is_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words.partition("=")[0]):
        asked(tmp_path, config_of=(words,))
