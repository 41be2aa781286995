from collections.abc import Callable, Sequence

import hydra
import pytest
from omegaconf import DictConfig

from relloc.runs.settings import conf_dir


@pytest.fixture(scope="session")
def compose() -> Callable[[str, Sequence[str]], DictConfig]:
    """Compose a root config with overrides, as the command line does."""

    def composed(root: str, overrides: Sequence[str]) -> DictConfig:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose(root, list(overrides))

    return composed
