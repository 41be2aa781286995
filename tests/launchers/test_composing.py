"""A point composed from what the points have in common is the point that Hydra composes whole."""

from collections.abc import Iterator

import hydra
import pytest
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from hydra_plugins.relloc_launchers.composing import Composing
from omegaconf import DictConfig, OmegaConf, open_dict

from relloc.runs.settings import conf_dir


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoader]:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture(scope="module")
def master(loader: ConfigLoader) -> DictConfig:
    return loader.load_configuration("train", ["grid.gap_px=0,16"], run_mode=RunMode.MULTIRUN)


def of_the_run(config: DictConfig) -> dict[str, object]:
    with open_dict(config):
        del config["hydra"]
    return OmegaConf.to_container(config)


def test_all_kinds_of_words_compose_alike(loader: ConfigLoader, master: DictConfig) -> None:
    composing = Composing(loader, master)
    for words in (
        ["grid.gap_px=16", "grid.jitter_px=7"],
        ["grid.gap_px=48", "grid.jitter_px=7"],
        ["model=resnet18", "data=folder", "data.root='/a, b'", "color=drop"],
        ["data.root=/c", "data=folder", "model=resnet18", "color=drop"],
        ["eval=[knn]", "eval.knn.k=[5,10]", "optimizer.lr=1e-3", "sweep=null"],
        ["+launcher.more={a: 1}", "grid.gap_px=16"],
        ["experiment=card2022", "grid.gap_px=8"],
        ["~monitor.k"],
    ):
        whole = loader.load_sweep_config(master, words)
        assert of_the_run(composing(master, words)) == of_the_run(whole), words


def test_points_that_choose_alike_are_read_once(
    loader: ConfigLoader, master: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    composing, whole = Composing(loader, master), []
    monkeypatch.setattr(
        composing,
        "_compose",
        lambda *words: whole.append(words) or loader.load_sweep_config(*words),
    )
    for gap in range(4):
        for color in ("gray", "drop"):
            assert composing(master, [f"grid.gap_px={gap}", f"color={color}"]).grid.gap_px == gap
    assert [words for _, words in whole] == [["color=gray"], ["color=drop"]]


@pytest.mark.parametrize("words", [["grid.gap_pxx=3"], ["mdoel=small"], ["data.root=/x"]])
def test_mistakes_are_told_alike(
    loader: ConfigLoader, master: DictConfig, words: list[str]
) -> None:
    with pytest.raises(ConfigCompositionException) as ours:
        Composing(loader, master)(master, words)
    with pytest.raises(ConfigCompositionException) as hydras:
        loader.load_sweep_config(master, words)
    assert str(ours.value) == str(hydras.value)
