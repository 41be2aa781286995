"""Makes the object that a node of the settings describes by its `_target_`."""

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from relloc.errors import UsageError


def call(setting: str, node: Mapping[str, Any], **more: Any) -> Any:
    """Calls the `_target_` of a plain node with its keys and `more`, and returns the result.

    A mistake in a setting is raised as the target raised it, without Hydra's words around it.
    Hydra's own errors name `setting`, the full name of the node.
    """
    # Hydra names a node by its place in a config, so that it is put where users have it.
    config = OmegaConf.create()
    OmegaConf.update(config, setting, node)
    try:
        return hydra.utils.instantiate(OmegaConf.select(config, setting), _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise UsageError(str(cause)) from error
        raise
