"""Each file of conf/ablation changes what is asked of a network, and nothing else of the preset."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from omegaconf import DictConfig

from relloc.runs import build
from relloc.runs.settings import conf_dir, resolved

VARIANTS = sorted(path.stem for path in (conf_dir() / "ablation").glob("*.yaml"))
# The name of a sweep has the time in it
WORDS = (
    "experiment=ablation",
    "data.root=/photographs",
    "eval.linear_fast.data.root=/labeled",
    "sweep=ablation",
)
# What points of the sweep must share, so that they differ by the question alone
SHARED = ("data", "recipe", "schedule", "optimizer", "eval", "probe", "view", "monitor", "seed")
Compose = Callable[[str, Sequence[str]], DictConfig]
ConfigOf = Callable[[str], DictConfig]


@pytest.fixture(scope="module")
def config_of(compose: Compose) -> ConfigOf:
    """The config of a variant. Each is composed once, as nothing here changes them."""

    @functools.cache
    def made(variant: str) -> DictConfig:
        return compose("train", [f"ablation={variant}", *WORDS])

    return made


def differing(settings: Mapping[str, Any], base: Mapping[str, Any]) -> set[str]:
    return {name for name in {*settings, *base} if settings.get(name, None) != base.get(name, None)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_only_what_is_asked_of_a_network(
    config_of: ConfigOf, variant: str
) -> None:
    config = config_of(variant)
    settings = build.pretraining(config)
    assert settings.patches.grid.span_px <= settings.patches.grid.resize.shortest()
    changed = differing(resolved(config), resolved(config_of("base")))
    assert bool(changed) == (variant != "base")
    if variant == "double_rate":
        assert changed == {"recipe", "optimizer"}
        assert config.optimizer.lr == 2 * config_of("base").optimizer.lr
    else:
        assert changed.isdisjoint(SHARED)


def test_no_two_variants_are_the_same(config_of: ConfigOf) -> None:
    everything = [resolved(config_of(variant)) for variant in VARIANTS]
    assert all(one not in everything[:place] for place, one in enumerate(everything))


def test_the_preset_is_that_of_the_pilot(config_of: ConfigOf) -> None:
    """1.33 million images in steps of 512, at a gap of half a patch."""
    config = config_of("base")
    assert (config.schedule.epochs, config.recipe.images_per_step) == (100, 512)
    assert (config.grid.patch_px, config.grid.gap_px, config.grid.jitter_px) == (64, 32, 11)
    assert config.grid.resize.px == 292
    base = build.pretraining(config)
    assert {one.name for one in base.evaluations} == {"linear_fast", "knn"}
    assert config.batch_norm == "recalibrated"
