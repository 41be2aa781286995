"""Composes the points of a sweep faster than Hydra does.

Files are read and merged once for each choice of members, not for each point.
"""

import copy
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


class Composing:
    """Returns what `loader.load_sweep_config` returns, except for Hydra's list of overrides.

    Hydra merges the chosen members and then sets values. The merged members are the same for all
    points with the same choices, and take nearly all of the time.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        hydra_config = config.hydra
        groups = loader.get_group_options(
            "",
            ObjectType.GROUP,
            config_name=hydra_config.job.config_name,
            overrides=list(hydra_config.overrides.hydra),
        )
        self._groups = set(groups)
        self._compose = loader.load_sweep_config
        self._parser = OverridesParser.create()
        # The merged members by the words that choose them
        self._merged: dict[tuple[str, ...], DictConfig] = {}

    def __call__(
        self,
        master_config: DictConfig,
        sweep_overrides: Sequence[str],
    ) -> DictConfig:
        overrides = list(sweep_overrides)
        words = self._parser.parse_overrides(overrides)
        choices = []
        values = []
        for word in words:
            if self._is_choice(word):
                choices.append(word.input_line or "")
            elif _is_value(word):
                values.append(word)
            else:
                # Additions, removals and the like are left to Hydra.
                return self._compose(master_config, overrides)
        key = tuple(choices)
        if key not in self._merged:
            self._merged[key] = self._compose(master_config, choices)
        # A copy, since the values of this point are set in it.
        config = copy.deepcopy(self._merged[key])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    def _is_choice(self, word: Override) -> bool:
        """Whether a word chooses a member of a group."""
        return word.key_or_group in self._groups


def _is_value(word: Override) -> bool:
    """Whether a word only sets a value that the config already has."""
    if word.is_add() or word.is_force_add() or word.is_delete():
        return False
    # A package moves the value elsewhere, and a slash names a group that does not exist.
    if word.package or "/" in word.key_or_group:
        return False
    # Hydra keeps its own settings in another node.
    return not word.is_hydra_override()
