"""Evaluating backbones: ours from a checkpoint, random ones, torchvision's supervised ones."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from omegaconf import DictConfig
from torch import Tensor

from relloc import checkpoints
from relloc.data.image_set import Splits
from relloc.errors import CheckpointError, UsageError
from relloc.evals.run import Evaluation, Subject, Terms, evaluate
from relloc.results import append_results, read_results
from relloc.runs import assemble, console
from relloc.runs.engine import settle
from relloc.runs.folder import RunFolder, open_folder

_SUPERVISED = {"resnet18": "ResNet18_Weights", "resnet50": "ResNet50_Weights"}


def evaluate_checkpoint(config: DictConfig) -> None:
    """Run the evaluations that `eval` names on the backbone that `checkpoint` names."""
    engine = settle(config)
    assemble.check_numbers(config)
    subject = _subject(config, engine.device)
    evaluations = assemble.evaluations(config)
    if not evaluations:
        raise UsageError("eval=[] leaves nothing to do: name evaluations, such as eval=[linear,knn]")
    terms = assemble.terms(config, engine)
    data = assemble.splits(config)
    name = f"{subject.model} {Path(subject.checkpoint).parent.name or subject.checkpoint} on {config.data.name}"
    run_dir = assemble.run_dir()
    with open_folder(config, assemble.record(config, name, data, engine, run_dir), run_dir) as folder:
        evaluate_subjects([subject], data, evaluations, terms, folder)
        folder.summarize()


def evaluate_subjects(
    subjects: Sequence[Subject], data: Splits, evaluations: Mapping[str, Evaluation], terms: Terms, folder: RunFolder
) -> None:
    """Write the rows of every evaluation of every subject as they come; those already there are kept."""
    for subject in subjects:
        subject.backbone.eval()
        console.say(f"eval    {', '.join(evaluations)} of {subject.checkpoint}")
        of_subject = [row for row in read_results(folder.path) if row.checkpoint == subject.checkpoint]
        there = {(row.eval, row.batch_norm, row.fingerprint) for row in of_subject}
        rows_of_each = evaluate(
            subject,
            data,
            evaluations,
            terms,
            is_done=lambda *which, there=there: which in there,
            unreadable=folder.note_unreadable,
        )
        for rows in rows_of_each:
            append_results(folder.path, rows)


def _subject(config: DictConfig, device: torch.device) -> Subject:
    if config.checkpoint in ("random", "torchvision"):
        if config.get("model") is None:
            raise UsageError(f"checkpoint={config.checkpoint} needs model=NAME, such as model=resnet50")
        torch.manual_seed(config.seed)
        backbone = assemble.backbone(config.model)
        if config.checkpoint == "torchvision":
            checkpoints.fill(backbone, supervised_weights(config.model.name), "torchvision's checkpoint")
        return Subject(backbone=backbone.to(device), checkpoint=config.checkpoint, model=config.model.name)
    file = checkpoints.backbone_file(Path(config.checkpoint))
    weights, about = checkpoints.load_backbone(file)
    model = about["model"] if config.get("model") is None else assemble.plain(config.model)
    backbone = assemble.backbone(model)
    checkpoints.fill(backbone, weights, f"{config.checkpoint} (a {about['model']['name']})")
    return Subject(backbone=backbone.to(device), checkpoint=str(file), model=model["name"])


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
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"torchvision's weights could not be fetched from {weights.url}: {error}") from error
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
