"""Files of backbones: weights as safetensors, with what built them; filling a backbone; telling weights apart."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from relloc import checkpoints
from relloc.errors import CheckpointError

BACKBONE_FILE = "backbone.safetensors"


def save_backbone(path: Path, backbone: nn.Module, about: Mapping[str, Any]) -> None:
    """Save a backbone's weights as safetensors, with `about` (JSON) telling what built and made it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    checkpoints.write_checkpoint(path, save(tensors, metadata={"relloc": json.dumps(about, sort_keys=True)}))


def backbone_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or the one in the run folder `path`."""
    return path.resolve() / BACKBONE_FILE if path.is_dir() else path.resolve()


def is_ours(file: Path) -> bool:
    """Whether relloc wrote this file and `load_backbone` can read it; False as well where nothing can."""
    try:
        if file.suffix == ".pt":
            # Mapped, the weights themselves stay on disk.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            return isinstance(state, Mapping) and {"step", "model", "about"} <= state.keys()
        with safe_open(file, framework="pt") as opened:
            return "relloc" in (opened.metadata() or {})
    except (*checkpoints.UNREADABLE, pickle.UnpicklingError, SafetensorError):
        return False


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and `about` of a backbone: from its file, or from the run folder that holds it.

    Raises:
        CheckpointError: nothing there, or no backbone of relloc.
    """
    file = backbone_file(path)
    if not file.exists():
        raise CheckpointError(
            f"{file} does not exist: give a {BACKBONE_FILE} or the run folder of a finished pretraining"
        )
    if file.suffix == ".pt":
        return _backbone_of_training(file)
    try:
        with safe_open(file, framework="pt") as opened:
            about = (opened.metadata() or {}).get("relloc")
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    if about is None:
        raise CheckpointError(f"{file} holds weights, but relloc did not write it: its backbone is unknown")
    return weights, json.loads(about)


def _backbone_of_training(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = checkpoints.load_training(file)
    if not {"model", "about"} <= state.keys():
        raise CheckpointError(f"{checkpoints.damaged(file)}: it holds no model")
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
    return weights, state["about"]


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights into a backbone, all or nothing; counters of batches may be missing, as in old files.

    Raises:
        CheckpointError: names or shapes do not fit, with what does not; or values that are not finite.
    """
    wanted = backbone.state_dict()
    missing = sorted(name for name in set(wanted) - set(weights) if not name.endswith("num_batches_tracked"))
    unknown = sorted(set(weights) - set(wanted))
    misfits = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if missing or unknown or misfits:
        kinds = {"missing": missing, "unknown": unknown, "of another shape": misfits}
        told = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names)
        raise CheckpointError(f"{origin} does not fit this backbone: {told}. Give the model it was trained with")
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{origin} holds NaN or infinite weights, in {len(broken)} of {len(weights)} tensors, such as "
            f"{broken[0]}: its training diverged or the file is damaged; take an earlier or another one"
        )
    backbone.load_state_dict(wanted | dict(weights))


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
