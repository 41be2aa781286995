"""Saves and loads a backbone's weights as a safetensors file with a description of the backbone.

The description, called `about`, is JSON in the file's metadata: what builds the backbone and how it
was trained. Weights can also be loaded from the training checkpoints of relloc.
"""

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
from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.errors import CheckpointError, DamagedCheckpoint

_LONGEST_NAME = (
    200  # characters of a name that are shown in messages, or accepted as a model's name
)
_TRAINING_KEYS = {
    "step",
    "model",
    "about",
}  # what the training checkpoints of relloc have at the top


def save_backbone(path: Path, backbone: nn.Module, about: Mapping[str, Any]) -> None:
    """Saves a backbone's weights as safetensors, with a description, and a SHA-256 file beside it.

    Args:
        path: the file to write, atomically.
        backbone: the module; the tensors of its state dict are saved.
        about: what builds the backbone and how it was trained, as values that JSON can hold.

    Raises:
        CheckpointError: there is no space or no permission; what was at `path` stays.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    with writing_hashed(path) as file:
        file.write(save(tensors, metadata={"relloc": json.dumps(about, sort_keys=True)}))


def backbone_file(path: Path) -> Path:
    """Returns the file with the weights: `path` itself, or the one in the run folder `path`.

    Raises:
        CheckpointError: no file can have this name, or a link leads to itself.
    """
    # pathlib raises these for names that are too long, have a zero byte, or are links in a circle.
    try:
        return path.resolve() / BACKBONE_FILE if path.is_dir() else path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        shown = ascii(str(path)[:_LONGEST_NAME])
        first_line = str(error).partition("\n")[0][:_LONGEST_NAME]
        reason = getattr(error, "strerror", None) or first_line
        raise CheckpointError(
            f"{shown} is no path ({reason}): give a file of weights or a run folder"
        ) from error


def is_ours(file: Path) -> bool:
    """Returns whether relloc wrote a file, so that `load_backbone` can read it.

    For files that can't be read at all it is False.
    """
    try:
        if file.suffix == ".pt":
            return weight_files.names_at_top(file) >= _TRAINING_KEYS
        with weight_files.opened_safetensors(file) as opened:
            return "relloc" in (opened.metadata() or {})
    except (CheckpointError, *BROKEN):
        return False


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Loads the weights and the description of a backbone.

    Example: `weights, about = load_backbone(Path("runs/one"))`

    Args:
        path: a file of relloc (backbone.safetensors or a training checkpoint), or a run folder.

    Returns:
        The tensors by name, and `about`. Whoever made the file wrote `about`: it is a JSON mapping,
        and nothing in it can be trusted.

    Raises:
        CheckpointError: nothing is there, relloc did not write it, or it is not as it was saved.
    """
    file = backbone_file(path)
    if not file.exists():
        raise CheckpointError(
            f"{file} does not exist: "
            f"give a {BACKBONE_FILE} or the run folder of a finished pretraining"
        )
    check_hash(file)
    # Training checkpoints are files of torch.save, all other files of relloc are safetensors.
    if file.suffix == ".pt":
        return _backbone_of_training(file)
    try:
        with weight_files.opened_safetensors(file) as opened:
            about = (opened.metadata() or {}).get("relloc")
            names = opened.keys()
            weights = {name: opened.get_tensor(name) for name in names}
    except BROKEN as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    # Only relloc writes its description into the metadata.
    if about is None:
        raise CheckpointError(
            f"{file} holds weights, but relloc did not write it: its backbone is unknown"
        )
    try:
        description = json.loads(about)
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict):
        raise DamagedCheckpoint(
            f"{file} is damaged: the description of its backbone is not a JSON mapping"
        )
    return weights, description


def _backbone_of_training(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Loads the backbone from a training checkpoint, which also has the head and the optimizer."""
    expected = "checkpoint of relloc"
    # The names are read first: a large file that is no checkpoint is refused without loading it.
    names = weight_files.names_at_top(file, expected=expected)
    content = weight_files.read(file, expected=expected) if names >= _TRAINING_KEYS else {}
    model, about = content.get("model"), content.get("about")
    if isinstance(model, dict) and isinstance(about, dict):
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
    """Returns the name of the model that a file's description names, such as "resnet50".

    Args:
        about: the description, as `load_backbone` returns it.
        file: where it is from, for the message.

    Raises:
        DamagedCheckpoint: it names no model, or not with a short printable name.
    """
    model = about.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise DamagedCheckpoint(
            f"{file} does not tell which model its weights belong to: give model=NAME"
        )
    return name


def digest(state: Mapping[str, Tensor]) -> str:
    """Returns a fingerprint of weights: 16 hex digits from names, shapes, types and bytes.

    Batch norm's counters (num_batches_tracked) are left out, since some layouts lack them and
    evaluations never read them.
    """
    hashed = hashlib.sha256()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    # Sorted, so that files that store the same tensors in another order have the same fingerprint.
    for name in sorted(names):
        tensor = state[name].detach().cpu().contiguous()
        hashed.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        # As bytes, since numpy lacks some of torch's types, such as bfloat16.
        content = tensor.reshape(-1).view(torch.uint8)
        hashed.update(content.numpy().data)
    return hashed.hexdigest()[:16]
