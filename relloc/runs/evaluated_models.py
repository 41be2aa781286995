"""Loads the backbones that `checkpoint=` names.

These are run folders and files of relloc, files of other projects, "random" for random weights, and
"torchvision" for its supervised ImageNet weights. "person" stands for a person, who has none.
"""

import dataclasses
import functools
import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from relloc.checkpoints import backbone_files, layouts, weight_files
from relloc.checkpoints.fitting import fill
from relloc.checkpoints.hashed_files import check_hash
from relloc.errors import CheckpointError, UsageError, reason
from relloc.evaluation.contract import EvaluatedModel
from relloc.evaluation.strides import strides_of
from relloc.files import path_as_text
from relloc.models.backbone import Backbone
from relloc.models.described import described_backbone
from relloc.results import NO_FILES, PERSON
from relloc.runs import console
from relloc.runs.build import model_of_conf
from relloc.runs.command_settings import Evaluating, Model
from relloc.runs.pretext_models import pretext_model
from relloc.runs.recalibrating import ENTRY
from relloc.tracking.unfinished import unfinished_training

_LONGEST_NAME = 200  # characters of the name of a data set that a file has
# The enumeration of weights in torchvision.models, by model.
_SUPERVISED = {"resnet18": "ResNet18_Weights", "resnet50": "ResNet50_Weights"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Architecture:
    """A model without weights, which those for comparison are put into.

    `make_backbone` takes the seed of initial weights; `name` is that of the model in conf/.
    """

    name: str
    make_backbone: Callable[[int], Backbone]


def evaluated_models(settings: Evaluating) -> list[EvaluatedModel]:
    """Loads the backbones that `checkpoint=` names, one or several, onto the CPU.

    Random and supervised weights are for comparison, so unless `model=` is given they take the
    model of the first other checkpoint, or a ResNet-50 if there is none. In a sweep over
    checkpoints each point names one of them; the environment variable RELLOC_SWEEP_CHECKPOINTS
    lists all (in JSON).

    Raises:
        UsageError: `checkpoint` names no backbone, or needs another model=.
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    # Files first: they say which model the others are to have.
    names = settings.checkpoints
    files = [name for name in names if name not in NO_FILES]
    loaded: dict[str, EvaluatedModel] = {}
    architectures: list[_Architecture] = []
    for name in files:
        loaded[name], architecture = _from_file(settings, name)
        architectures.append(architecture)
    if settings.checkpoint_prefix is not None and not loaded:
        raise UsageError(
            f"checkpoint={','.join(names)} has no prefixes: leave checkpoint_prefix out"
        )

    models = [loaded.get(name) or _control(settings, name, architectures) for name in names]
    if any(one.evaluation.wants_pretext for one in settings.evaluations):
        return [_with_pretext(each) for each in models]
    return models


def saved_model(settings: Evaluating, file: Path) -> EvaluatedModel:
    """Loads the backbone of a file that a training saved, with its head where evaluations ask it.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit.
        UsageError: it needs another model=.
    """
    model, _ = _from_file(settings, str(file))
    if any(one.evaluation.wants_pretext for one in settings.evaluations):
        return _with_pretext(model)
    return model


def files_of_sweep() -> list[str]:
    """Returns the checkpoints of all points of the sweep that are files; none outside of sweeps."""
    names = json.loads(os.environ.get("RELLOC_SWEEP_CHECKPOINTS", "[]"))
    return [name for name in names if name not in NO_FILES]


def _with_pretext(model: EvaluatedModel) -> EvaluatedModel:
    """Adds the network of the pretext task, where the checkpoint has one."""
    if model.checkpoint in NO_FILES:
        return model
    pretext = pretext_model(Path(model.checkpoint), model.backbone)
    return dataclasses.replace(model, pretext=pretext)


def _from_file(settings: Evaluating, checkpoint: str) -> tuple[EvaluatedModel, _Architecture]:
    """Loads the backbone of a run folder or file: of `model=`, or else of what the file says.

    Its architecture is returned with it.
    """
    # A training that is not finished has no backbone yet: say how far it is and how to go on.
    unfinished = unfinished_training(Path(checkpoint))
    if unfinished:
        raise UsageError(f"checkpoint={unfinished}")
    file = backbone_files.backbone_file(Path(checkpoint))
    if not backbone_files.is_ours(file):
        return _from_other_project(settings, file)
    if settings.checkpoint_prefix is not None:
        raise UsageError(f"checkpoint={checkpoint} has no prefixes: leave checkpoint_prefix out")
    weights, about = backbone_files.load_backbone(file)
    # model= of the command line may be any code of the user's. A file may come from a stranger: its
    # description may only choose among the models of relloc.
    if settings.model is not None:
        architecture = _architecture_of(settings.model)
    else:
        name = backbone_files.model_name(about, file)
        make_backbone = functools.partial(_described, about["model"], weights, str(file))
        architecture = _Architecture(name=name, make_backbone=make_backbone)
    backbone = architecture.make_backbone(settings.seed)
    advice = "Leave model= out: the file says which model it is of"
    fill(backbone, weights, f"{checkpoint} (a {_printable_name(about)})", advice)
    details = _recalibrated_on(about)
    if details and backbone.own_strides:
        details = tuple(f"{detail}, with the standard strides" for detail in details)
        _warn_of_strides(settings, file, backbone)
    return make_evaluated_model(backbone, str(file), architecture.name, details), architecture


def _warn_of_strides(settings: Evaluating, file: Path, backbone: Backbone) -> None:
    """Warns where recalibrated statistics are used with strides that they were not estimated with.

    `Recalibration` estimates them with the standard strides.
    """
    # What is recalibrated again does not use those of the file.
    if "as_trained" not in settings.batch_norms:
        return
    for chosen in settings.evaluations:
        if "as_trained" in strides_of(chosen.group, settings.strides):
            console.print_message(
                f"{file}: its batch norm was recalibrated with the standard strides, which does "
                f"not fit {chosen.group}.{chosen.name} with strides=as_trained "
                f"({backbone.own_strides}): give batch_norm=recalibrated, or strides=standard"
            )
            return


def _recalibrated_on(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns in words on what the batch norm of a file was recalibrated, or nothing if it wasn't.

    A stranger may have written the description.
    """
    entry = about.get(ENTRY)
    if not isinstance(entry, Mapping):
        return ()
    n_images, dataset = entry.get("images"), entry.get("dataset")
    if not isinstance(n_images, int) or not isinstance(dataset, str) or not dataset.isprintable():
        return ()
    return (
        f"the file's batch norm has statistics of {n_images} images of {dataset[:_LONGEST_NAME]}",
    )


def _described(model: object, weights: Mapping[str, Tensor], origin: str, seed: int) -> Backbone:
    """Returns the backbone that a file describes, initialized with the seed `seed`."""
    # Layers draw their initial weights from the global generator of PyTorch.
    torch.manual_seed(seed)
    return described_backbone(model, weights, origin)


def _architecture_of(model: Model) -> _Architecture:
    return _Architecture(name=model.name, make_backbone=model.backbone)


def _from_other_project(settings: Evaluating, file: Path) -> tuple[EvaluatedModel, _Architecture]:
    """Loads the weights of another project's file, whose layout is told by the names in it."""
    # `load_backbone` checks the hash of our own files; others may have one beside them too.
    check_hash(file)
    weights = weight_files.read(file)
    layout = layouts.find(weights, origin=str(file), prefix=settings.checkpoint_prefix)
    model = settings.model or model_of_conf(layout.model_or_advice())
    backbone = model.backbone(settings.seed)
    fill(backbone, layout.fitted(backbone.state_dict()), str(file))
    console.print_message(f"weights {file}: {layout}")
    return make_evaluated_model(backbone, str(file), model.name), _architecture_of(model)


def _printable_name(about: Mapping[str, Any]) -> str:
    """Returns the name of the model in a file's description, which may hold anything."""
    model = about.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    if isinstance(name, str) and name.isprintable():
        return name
    return "model without a name"


def _control(settings: Evaluating, name: str, of_files: Sequence[_Architecture]) -> EvaluatedModel:
    """Makes a backbone for comparison: "random", or "torchvision" with supervised weights.

    `of_files` are the architectures of the files that `checkpoint=` names.
    """
    if name == PERSON:
        return EvaluatedModel(backbone=_NoBackbone(), checkpoint=PERSON, model="", weights=PERSON)
    sweep_files = files_of_sweep()
    if settings.model:
        architecture = _architecture_of(settings.model)
    elif of_files:
        architecture = of_files[0]
    elif sweep_files:
        _, architecture = _from_file(settings, sweep_files[0])
    else:
        architecture = _architecture_of(model_of_conf("resnet50"))
    if name == "torchvision":
        weights = supervised_weights(architecture.name)
        # Supervised weights are of the standard network, whatever width and strides a file has.
        model = settings.model or model_of_conf(architecture.name)
        backbone = model.backbone(settings.seed)
        fill(backbone, weights, "torchvision's checkpoint")
    else:
        backbone = architecture.make_backbone(settings.seed)
    return make_evaluated_model(backbone, name, architecture.name)


class _NoBackbone(Backbone):
    """Stands where evaluations have a backbone, where a person answers and there is none."""

    stage_channels = ()
    pooled_sides = ()
    embedding_dim = 0

    def layers_of_stages(self) -> Sequence[Sequence[nn.Module]]:
        raise TypeError("a person has no stages")

    def embed(self, patches: Tensor) -> Tensor:
        raise TypeError("a person has no embedding")


def make_evaluated_model(
    backbone: Backbone, checkpoint: str, model: str, details: tuple[str, ...] = ()
) -> EvaluatedModel:
    """Returns a backbone as evaluations take it, with the digest of its weights.

    `model` is the name of the model in conf/, and `details` are of the file of its weights.
    """
    return EvaluatedModel(
        backbone=backbone,
        checkpoint=path_as_text(checkpoint),
        model=name_of_model(model, backbone),
        weights=backbone_files.digest(backbone.state_dict()),
        details=details,
    )


def name_of_model(model: str, backbone: Backbone) -> str:
    """Returns how results name a model of conf/ whose backbone may have another width."""
    return f"{model} {backbone.size}".strip()


def supervised_weights(model: str) -> dict[str, Tensor]:
    """Returns torchvision's supervised ImageNet weights without the classifier.

    They come from torchvision's cache, or are downloaded. These are the first published ones (V1),
    as in the supervised rows of the benchmark that the evaluations follow.

    Raises:
        UsageError: torchvision has none for this model.
        CheckpointError: the download failed, or the file in the cache is damaged.
    """
    if model not in _SUPERVISED:
        raise UsageError(
            f"torchvision has no supervised weights for model={model}: use one of "
            f"{', '.join(_SUPERVISED)}"
        )
    weights: Any = getattr(torchvision.models, _SUPERVISED[model]).IMAGENET1K_V1
    # Where torchvision looks first: TORCH_HOME/hub/checkpoints, by default below ~/.cache/torch.
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    # A download fails in many ways; an error of unpickling means that the cached file is damaged.
    try:
        state = weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except (URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if cached.is_file():
            raise CheckpointError(
                f"{cached} is not the file of torchvision's weights ({reason(error)}): delete it, "
                f"or replace it by {weights.url}"
            ) from error
        raise CheckpointError(
            f"torchvision's weights could not be fetched from {weights.url} ({reason(error)}). "
            f"Without internet, fetch that file elsewhere and put it at {cached} (the environment "
            f"variable TORCH_HOME moves this folder), or give checkpoint=FILE model={model}"
        ) from error
    # The classifier is no part of a backbone.
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
