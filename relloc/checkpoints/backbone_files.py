"""Files of backbones: weights as safetensors, with what built them; filling a backbone; telling weights apart."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from relloc.checkpoints import states, weight_files
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.terminal import escaped

BACKBONE_FILE = "backbone.safetensors"
_LONGEST_NAME = 200
_OF_TRAINING = {"step", "model", "about"}


def save_backbone(path: Path, backbone: nn.Module, about: Mapping[str, Any]) -> None:
    """Save a backbone's weights as safetensors, with `about` (JSON) telling what built and made it, and their hash."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    states.write_hashed(path, save(tensors, metadata={"relloc": json.dumps(about, sort_keys=True)}))


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
        raise CheckpointError(f"{shown} is no path ({reason}): give a file of weights or a run folder") from error


def is_ours(file: Path) -> bool:
    """Whether relloc wrote this file and `load_backbone` can read it; False as well where nothing can."""
    try:
        if file.suffix == ".pt":
            return weight_files.names_at_top(file) >= _OF_TRAINING
        with weight_files.opened_safetensors(file) as opened:
            return "relloc" in (opened.metadata() or {})
    except (CheckpointError, *weight_files.BROKEN):
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
    states.check_hash(file)
    if file.suffix == ".pt":
        return _backbone_of_training(file)
    try:
        with weight_files.opened_safetensors(file) as opened:
            about = (opened.metadata() or {}).get("relloc")
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except weight_files.BROKEN as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    if about is None:
        raise CheckpointError(f"{file} holds weights, but relloc did not write it: its backbone is unknown")
    return weights, _described(about, file)


def _described(about: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(about)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: what it tells of its backbone is no JSON") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{file} is damaged: what it tells of its backbone is no mapping")
    return content


def _backbone_of_training(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    expected = "checkpoint of relloc"
    if not weight_files.names_at_top(file, expected=expected) >= _OF_TRAINING:
        raise DamagedCheckpoint(f"{states.damaged(file)}: it holds no model")
    state = weight_files.read(file, expected=expected)
    model, about = state["model"], state["about"]
    if not isinstance(model, Mapping) or not isinstance(about, Mapping):
        raise DamagedCheckpoint(f"{states.damaged(file)}: it holds no model")
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise DamagedCheckpoint(f"{states.damaged(file)}: its model is not made of tensors")
    return weights, dict(about)


def model_name(about: Mapping[str, Any], file: Path) -> str:
    """The name of the model that `about`, read from `file`, tells of. Raises `DamagedCheckpoint`: it tells of none."""
    model = about.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise DamagedCheckpoint(f"{file} does not tell which model its weights are of: give model=NAME")
    return name


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights into a backbone, all or nothing; counters of batches may be missing, as in old files.

    Raises:
        CheckpointError: names or shapes do not fit, with what does not; or values that are not finite.
    """
    wanted = backbone.state_dict()
    check_fits(wanted, weights, origin)
    # As float64, since isfinite does not know every type that a file may have; and as the backbone will have them
    both = [(name, tensor.double(), wanted[name].dtype) for name, tensor in weights.items()]
    broken = [name for name, tensor, kind in both if not torch.isfinite(tensor).all() or _overflows(tensor, kind)]
    if broken:
        raise CheckpointError(
            f"{origin} holds NaN or infinite weights, in {len(broken)} of {len(weights)} tensors, such as "
            f"{broken[0]}: its training diverged or the file is damaged; take an earlier or another one"
        )
    negative = [name for name, tensor, _ in both if name.endswith("running_var") and (tensor < 0).any()]
    if negative:
        raise CheckpointError(
            f"{origin} has negative variances in {negative[0]}, of which batch norm makes NaN: the file is damaged; "
            "take another one"
        )
    backbone.load_state_dict(wanted | dict(weights))


def _overflows(tensor: Tensor, kind: torch.dtype) -> bool:
    return kind.is_floating_point and bool((tensor.abs() > torch.finfo(kind).max).any())


def check_fits(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str) -> None:
    """Compare names, shapes and kinds of numbers with those of a backbone, which may be on the meta device.

    Raises:
        CheckpointError: what does not fit.
    """
    missing = sorted(name for name in set(wanted) - set(weights) if not name.endswith("num_batches_tracked"))
    unknown = sorted(set(weights) - set(wanted))
    both = [name for name in wanted if name in weights]
    misfits = [name for name in both if wanted[name].shape != weights[name].shape]
    others = [name for name in both if _kind(wanted[name]) != _kind(weights[name])]
    if missing or unknown or misfits or others:
        kinds = {"missing": missing, "unknown": unknown, "of another shape": misfits, "of another type": others}
        told = "; ".join(f"{len(names)} {kind}, such as {escaped(names[0])}" for kind, names in kinds.items() if names)
        raise CheckpointError(f"{origin} does not fit this backbone: {told}. Give the model it was trained with")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() or tensor.dim() == 0 else "whole"  # a counter may be either


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
