"""Files of backbones: weights as safetensors, with what built them; telling weights apart."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from relloc.checkpoints import weight_files
from relloc.checkpoints.hashed_files import BROKEN, check_hash, damaged, writing_hashed
from relloc.checkpoints.places import BACKBONE_FILE
from relloc.errors import CheckpointError, DamagedCheckpoint

_LONGEST_NAME = 200
_OF_TRAINING = {"step", "model", "about"}


def save_backbone(path: Path, backbone: nn.Module, about: Mapping[str, Any]) -> None:
    """Save a backbone's weights as safetensors, with `about` (JSON) telling what built and made it, and their hash."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    with writing_hashed(path) as file:
        file.write(save(tensors, metadata={"relloc": json.dumps(about, sort_keys=True)}))


def backbone_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or the one in the run folder `path`.

    Raises:
        CheckpointError: no file can have this name, or a link leads to itself.
    """
    try:
        return path.resolve() / BACKBONE_FILE if path.is_dir() else path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        shown = ascii(str(path)[:_LONGEST_NAME])
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:_LONGEST_NAME]
        raise CheckpointError(
            f"{shown} is no path ({reason}): give a file of weights or a run folder"
        ) from error


def is_ours(file: Path) -> bool:
    """Whether relloc wrote this file and `load_backbone` can read it; False as well where nothing can."""
    try:
        if file.suffix == ".pt":
            return weight_files.names_at_top(file) >= _OF_TRAINING
        with weight_files.opened_safetensors(file) as opened:
            return "relloc" in (opened.metadata() or {})
    except (CheckpointError, *BROKEN):
        return False


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and `about` of a backbone: from its file, or from the run folder that holds it.

    `about` was written by whoever made the file: it is JSON, and nothing else is sure about it.

    Raises:
        CheckpointError: nothing there, no backbone of relloc, or not as it was saved.
    """
    file = backbone_file(path)
    if not file.exists():
        raise CheckpointError(
            f"{file} does not exist: give a {BACKBONE_FILE} or the run folder of a finished pretraining"
        )
    check_hash(file)
    if file.suffix == ".pt":
        return _backbone_of_training(file)
    try:
        with weight_files.opened_safetensors(file) as opened:
            about = (opened.metadata() or {}).get("relloc")
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except BROKEN as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    if about is None:
        raise CheckpointError(
            f"{file} holds weights, but relloc did not write it: its backbone is unknown"
        )
    try:
        described = json.loads(about)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise DamagedCheckpoint(
            f"{file} is damaged: what it tells of its backbone is no JSON mapping"
        )
    return weights, described


def _backbone_of_training(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    expected = "checkpoint of relloc"
    is_training = weight_files.names_at_top(file, expected=expected) >= _OF_TRAINING
    match weight_files.read(file, expected=expected) if is_training else None:
        case {"model": dict(model), "about": dict(about)}:
            prefix = "backbone."
            weights = {
                name.removeprefix(prefix): value
                for name, value in model.items()
                if name.startswith(prefix)
            }
            if all(isinstance(value, Tensor) for value in weights.values()):
                return weights, about
    raise DamagedCheckpoint(f"{damaged(file)}: it holds no model of tensors")


def model_name(about: Mapping[str, Any], file: Path) -> str:
    """The name of the model that `about`, read from `file`, tells of. Raises `DamagedCheckpoint`: it tells of none."""
    model = about.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise DamagedCheckpoint(
            f"{file} does not tell which model its weights are of: give model=NAME"
        )
    return name


def digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits that tell weights apart: by names, shapes, types and bytes, in the order of names.

    Counters of batches are left out, which some layouts lack and evaluations never read.
    """
    hashed = hashlib.sha256()
    for name in sorted(name for name in state if not name.endswith("num_batches_tracked")):
        tensor = state[name].detach().cpu().contiguous()
        hashed.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
