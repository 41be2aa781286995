"""Building the backbone that a file describes, whoever wrote the file.

A configuration that a user composes may name any function, and Hydra calls it. What a file of weights says of its
backbone is a stranger's word: of it only relloc's own backbones are called, with plain values.
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

_LONGEST = 10_000  # characters of settings as JSON
_DEEPEST = 10  # nested containers
_ADVICE = "If you trust this file, say yourself what to build: give model=NAME, the model it was trained with"


def backbones() -> dict[str, type[Backbone]]:
    """All backbones that the modules of relloc.models define, by the names that conf/model has in `_target_`."""
    for module in pkgutil.iter_modules(relloc.models.__path__, f"{relloc.models.__name__}."):
        importlib.import_module(module.name)
    found: dict[str, type[Backbone]] = {}
    classes: list[type[Backbone]] = Backbone.__subclasses__()
    for one in classes:  # the list grows while it is read
        classes += one.__subclasses__()
        name = f"{one.__module__}.{one.__name__}"
        if name.startswith(f"{relloc.models.__name__}.") and not inspect.isabstract(one):
            found[name] = one
    return found


def described_backbone(model: object, weights: Mapping[str, Tensor], origin: str) -> Backbone:
    """The backbone of `model`, the entry of this name in what the file `origin` tells of itself.

    It is built without memory first, and for good only if `weights` are all that it has, so that a
    file can't ask for more memory than its weights take.

    Raises:
        CheckpointError: it asks for something else than a backbone of relloc and plain values, or
            for one that can't be, or has other tensors than `weights`.
    """
    node = model.get("backbone") if isinstance(model, Mapping) else None
    if not isinstance(node, Mapping):
        raise CheckpointError(
            f"{origin} does not tell which backbone its weights are of: give model=NAME"
        )
    target = node.get("_target_")
    known = backbones()
    if not isinstance(target, str) or target not in known:
        wish = (
            ascii(target[:120])[1:-1] if isinstance(target, str) else f"a {type(target).__name__}"
        )
        raise CheckpointError(
            f"{origin} wants {wish} to be called for its backbone; of what a file names only "
            f"relloc's own backbones are ({', '.join(sorted(known))}). {_ADVICE}"
        )
    settings = {name: value for name, value in node.items() if name != "_target_"}
    _check_plain(settings, origin)
    with torch.device("meta"):
        check_fits(_built(known[target], settings, origin).state_dict(), weights, origin)
    return _built(known[target], settings, origin)


def _built(backbone: type[Backbone], settings: dict[str, Any], origin: str) -> Backbone:
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
            f"{origin} describes a {backbone.__name__} that can't be: {reason}. {_ADVICE}"
        ) from error


def _check_plain(settings: Mapping[Any, Any], origin: str) -> None:
    """Raise `CheckpointError` unless all values are as JSON has them, and none is an order to Hydra or OmegaConf."""
    try:
        text = json.dumps(settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{origin} describes its backbone with more than plain values: {error}. {_ADVICE}"
        ) from error
    is_order = "${" in text  # OmegaConf would look it up
    left: list[tuple[Any, int]] = [(settings, 0)]
    for value, depth in left:  # the list grows while it is read
        if len(text) > _LONGEST or depth > _DEEPEST:
            raise CheckpointError(
                f"{origin} describes its backbone with more values than one has. {_ADVICE}"
            )
        if isinstance(value, dict):
            is_order |= any(
                str(name).startswith("_") for name in value
            )  # for Hydra, such as "_target_"
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            left += [(inner, depth + 1) for inner in value]
    if is_order:
        raise CheckpointError(
            f"{origin} describes its backbone with more than plain values: {text[:120]}. {_ADVICE}"
        )
