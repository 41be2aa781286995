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
        name = config.hydra.job.config_name
        words = list(config.hydra.overrides.hydra)
        self._groups = set(
            loader.get_group_options("", ObjectType.GROUP, config_name=name, overrides=words)
        )
        self._compose = loader.load_sweep_config
        self._parser = OverridesParser.create()
        self._chosen: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        words = self._parser.parse_overrides(list(sweep_overrides))
        # Additions, removals and the like are left to Hydra.
        if not all(self._is_choice(word) or _is_value(word) for word in words):
            return self._compose(master_config, list(sweep_overrides))
        choice = tuple(word.input_line or "" for word in words if self._is_choice(word))
        if choice not in self._chosen:
            self._chosen[choice] = self._compose(master_config, list(choice))
        config = copy.deepcopy(self._chosen[choice])
        values = [word for word in words if not self._is_choice(word)]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    def _is_choice(self, word: Override) -> bool:
        """Whether a word chooses a member of a group."""
        return word.key_or_group in self._groups


def _is_value(word: Override) -> bool:
    """Whether a word only sets a value that the config already has."""
    plain = not (word.is_add() or word.is_force_add() or word.is_delete() or word.package)
    return plain and "/" not in word.key_or_group and not word.is_hydra_override()
