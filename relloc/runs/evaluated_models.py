"""The backbones that `checkpoint` names: ours, of other projects, random ones, torchvision's supervised ones."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torchvision
from torch import Tensor

from relloc.checkpoints import backbone_files, layouts, weight_files
from relloc.checkpoints.fitting import fill
from relloc.checkpoints.hashed_files import check_hash
from relloc.errors import CheckpointError, UsageError
from relloc.evaluation.contract import EvaluatedModel
from relloc.files import path_as_text
from relloc.models.backbone import Backbone
from relloc.models.described import described_backbone
from relloc.results import NOT_OURS
from relloc.runs import console
from relloc.runs.build import Evaluating, model_of_conf
from relloc.tracking.unfinished import unfinished_training

_SUPERVISED = {"resnet18": "ResNet18_Weights", "resnet50": "ResNet50_Weights"}


def evaluated_models(settings: Evaluating) -> list[EvaluatedModel]:
    """The backbones that `checkpoint` names, one or several, on the CPU.

    Random and supervised weights are, unless `model` says which, of the model of the first other one
    (RELLOC_BESIDE names those of a sweep's other points), or of a ResNet-50.

    Raises:
        UsageError: `checkpoint` names none, or needs another model=.
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    asked = settings.checkpoints
    found = {name: _from_file(settings, name) for name in asked if name not in NOT_OURS}
    if settings.checkpoint_prefix is not None and not found:
        raise UsageError(
            f"checkpoint={','.join(asked)} has no prefixes: leave checkpoint_prefix out"
        )
    beside = [
        name for name in json.loads(os.environ.get("RELLOC_BESIDE", "[]")) if name not in NOT_OURS
    ]
    if found:
        of_file = next(iter(found.values())).model
    else:
        of_file = (
            _from_file(settings, beside[0]).model if beside and not settings.model else "resnet50"
        )
    return [found.get(name) or _by_name(settings, name, of_file) for name in asked]


def _from_file(settings: Evaluating, checkpoint: str) -> EvaluatedModel:
    """The backbone of a run folder or file, of the model in `settings` or else of the one that the file tells."""
    if unfinished := unfinished_training(Path(checkpoint)):
        raise UsageError(f"checkpoint={unfinished}")
    file = backbone_files.backbone_file(Path(checkpoint))
    model = settings.model
    if backbone_files.is_ours(file):
        if settings.checkpoint_prefix is not None:
            raise UsageError(
                f"checkpoint={checkpoint} has no prefixes: leave checkpoint_prefix out"
            )
        weights, about = backbone_files.load_backbone(file)
        # The model of the command line is the user's word and may be anything; that of a file is a stranger's.
        if model is not None:
            name, backbone = model.name, model.backbone(settings.seed)
        else:
            name = backbone_files.model_name(about, file)
            backbone = described_backbone(about["model"], weights, str(file))
        fill(backbone, weights, f"{checkpoint} (a {_trained(about)})")
    else:
        check_hash(file)
        found = layouts.find(
            weight_files.read(file), origin=str(file), prefix=settings.checkpoint_prefix
        )
        model = model or model_of_conf(found.model_or_advice())
        name, backbone = model.name, model.backbone(settings.seed)
        fill(backbone, found.fitted(backbone.state_dict()), str(file))
        console.say(f"weights {file}: {found}")
    return evaluated(backbone, str(file), name)


def _trained(about: Mapping[str, Any]) -> str:
    model = about.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    return name if isinstance(name, str) and name.isprintable() else "model without a name"


def _by_name(settings: Evaluating, name: str, model_of_others: str) -> EvaluatedModel:
    """`random` or `torchvision`."""
    model = settings.model or model_of_conf(model_of_others)
    backbone = model.backbone(settings.seed)
    if name == "torchvision":
        fill(backbone, supervised_weights(model.name), "torchvision's checkpoint")
    return evaluated(backbone, name, model.name)


def evaluated(backbone: Backbone, checkpoint: str, model: str) -> EvaluatedModel:
    """A backbone with the digest of its weights."""
    weights = backbone_files.digest(backbone.state_dict())
    return EvaluatedModel(
        backbone=backbone, checkpoint=path_as_text(checkpoint), model=model, weights=weights
    )


def supervised_weights(model: str) -> dict[str, Tensor]:
    """torchvision's supervised ImageNet weights without the classifier, from its cache or downloaded.

    These are the first published ones (V1), which the benchmark's supervised rows use.

    Raises:
        UsageError: torchvision has none for this model.
        CheckpointError: the download failed.
    """
    if model not in _SUPERVISED:
        raise UsageError(
            f"torchvision has no supervised weights for model={model}: use one of {', '.join(_SUPERVISED)}"
        )
    weights: Any = getattr(torchvision.models, _SUPERVISED[model]).IMAGENET1K_V1
    try:
        state = weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"torchvision's weights could not be fetched from {weights.url}: {error}"
        ) from error
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
