"""Builds the backbone that a file of weights describes, safely, even if a stranger wrote the file.

A configuration that a user composes may name any function, and Hydra calls it. The description in a
file of weights has the same form but can't be trusted: from it only relloc's own backbones are
built, and only with plain values.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import relloc.models
from relloc.checkpoints.fitting import check_fits
from relloc.errors import CheckpointError
from relloc.models.backbone import Backbone

_LONGEST = 10_000  # characters of the settings as JSON
_DEEPEST = 10  # levels of nested containers
_ADVICE = (
    "If you trust this file, name what to build yourself: "
    "give model=NAME, the model it was trained with"
)


def backbones() -> dict[str, type[Backbone]]:
    """Return all backbones of relloc.models, by the names that conf/model has in `_target_`."""
    # A class is known to its base class only once its module was imported.
    for module in pkgutil.iter_modules(relloc.models.__path__, f"{relloc.models.__name__}."):
        importlib.import_module(module.name)
    by_name: dict[str, type[Backbone]] = {}
    classes: list[type[Backbone]] = Backbone.__subclasses__()
    # The list grows while it is read, by the classes derived from those in it.
    for backbone in classes:
        classes += backbone.__subclasses__()
        name = f"{backbone.__module__}.{backbone.__name__}"
        # Classes from elsewhere, such as tests, and abstract ones are not offered.
        is_ours = name.startswith(f"{relloc.models.__name__}.")
        if is_ours and not inspect.isabstract(backbone):
            by_name[name] = backbone
    return by_name


def described_backbone(model: object, weights: Mapping[str, Tensor], origin: str) -> Backbone:
    """Build the backbone that a file of weights describes. Its weights are random, not loaded.

    Args:
        model: the entry "model" of the file's description, which may be anything.
        weights: the tensors of the file.
        origin: the file, for messages.

    Raises:
        CheckpointError: the description names something other than a backbone of relloc and plain
            values, or a backbone that can't be built, or one with other tensors than `weights`.
    """
    node = model.get("backbone") if isinstance(model, Mapping) else None
    if not isinstance(node, Mapping):
        raise CheckpointError(
            f"{origin} does not tell which backbone its weights belong to: give model=NAME"
        )
    target = node.get("_target_")
    known = backbones()
    if not isinstance(target, str) or target not in known:
        requested = f"a {type(target).__name__}"
        if isinstance(target, str):
            requested = ascii(target[:120])[1:-1]  # printable, whatever the file has there
        raise CheckpointError(
            f"{origin} wants {requested} to be called to build its backbone; from a file "
            f"only relloc's own backbones are built ({', '.join(sorted(known))}). {_ADVICE}"
        )
    settings = {name: value for name, value in node.items() if name != "_target_"}
    _check_plain(settings, origin)
    # The backbone is first built on the meta device, which takes no memory, and compared with the
    # weights. So a file can't make relloc allocate more memory than its weights take.
    with torch.device("meta"):
        without_memory = _build(known[target], settings, origin)
    check_fits(without_memory.state_dict(), weights, origin)
    return _build(known[target], settings, origin)


def _build(backbone: type[Backbone], settings: dict[str, Any], origin: str) -> Backbone:
    """Build a backbone, and turn the errors of wrong settings into `CheckpointError`."""
    try:
        return backbone(**settings)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
        MemoryError,
        KeyError,
        IndexError,
    ) as error:
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(
            f"{origin} describes a {backbone.__name__} that can't be built: {reason}. {_ADVICE}"
        ) from error


def _check_plain(settings: Mapping[Any, Any], origin: str) -> None:
    """Raise `CheckpointError` unless all settings are plain, few, and no instructions to Hydra."""
    try:
        text = json.dumps(settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{origin} describes its backbone with more than plain values: {error}. {_ADVICE}"
        ) from error
    # OmegaConf would replace ${…} by a value of the environment or of the configuration.
    has_instruction = "${" in text
    # All values with their depth. The list grows while it is read, by the values inside of values.
    values: list[tuple[Any, int]] = [(settings, 0)]
    for value, depth in values:
        if len(text) > _LONGEST or depth > _DEEPEST:
            raise CheckpointError(
                f"{origin} describes its backbone with more values than one has: at most "
                f"{_LONGEST} characters and {_DEEPEST} levels are read. {_ADVICE}"
            )
        if isinstance(value, dict):
            # Hydra's own keys begin with an underscore, such as _target_, which calls a function.
            has_instruction |= any(str(name).startswith("_") for name in value)
            values += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            values += [(inner, depth + 1) for inner in value]
    if has_instruction:
        raise CheckpointError(
            f"{origin} describes its backbone with more than plain values: {text[:120]}. {_ADVICE}"
        )
