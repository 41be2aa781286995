"""Saving and loading, atomically: a file is there whole, or the one before it still is."""

import contextlib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from relloc.errors import CheckpointError, DamagedCheckpoint

BACKBONE_FILE = "backbone.safetensors"
_KEPT = 2


def _write(path: Path, content: bytes | memoryview) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            unfinished.unlink()
        raise CheckpointError(
            f"{path} could not be written ({error.strerror}). What was saved before is untouched; "
            "free some space and start the same command with the same hydra.run.dir to go on"
        ) from error


def training_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_training(run_dir: Path, state: Mapping[str, Any], step: int, milestone: str | None = None) -> Path:
    """Save the state of a training after `step` steps; the newest two and all named milestones are kept.

    A milestone `epoch_30` is saved as that, besides. Beside each file stands its hash, as
    `sha256sum --check` reads it.

    Raises:
        CheckpointError: no space or no permission; earlier checkpoints stay.
    """
    buffer = io.BytesIO()
    torch.save({**state, "step": step}, buffer)
    content = buffer.getbuffer()
    if milestone:
        _write_hashed(training_folder(run_dir) / f"{milestone}.pt", content)
    path = training_folder(run_dir) / f"step_{step:09d}.pt"
    _write_hashed(path, content)
    for old in saved_trainings(run_dir)[:-_KEPT]:
        old.unlink(missing_ok=True)
        _hash_file(old).unlink(missing_ok=True)
    return path


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_hashed(path: Path, content: memoryview) -> None:
    # The hash first: a checkpoint without one is never left behind, an old one's is not yet wanted.
    _write(_hash_file(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode())
    try:
        _write(path, content)
    except CheckpointError:
        _hash_file(path).unlink(missing_ok=True)
        raise


def saved_trainings(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, oldest first; milestones are not among them."""
    return sorted(training_folder(run_dir).glob("step_*.pt"))


def newest_sound(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is set aside as `….damaged`, with a warning.

    Raises:
        CheckpointError: there were checkpoints, and all are damaged; or one can't be read at present.
    """
    for unfinished in training_folder(run_dir).glob(".*.unfinished"):
        unfinished.unlink(missing_ok=True)  # of a process that was killed while it saved
    for path in reversed(saved_trainings(run_dir)):
        try:
            load_training(path)
        except DamagedCheckpoint as error:
            _set_aside(path)
            warn(f"{error}. It is set aside as {path.name}.damaged")
        else:
            return path
    if list(training_folder(run_dir).glob("step_*.damaged")):  # also those of an earlier start
        raise CheckpointError(
            f"no checkpoint in {training_folder(run_dir)} can be read. Copy a milestone to "
            "step_000000000.pt to go on from there, or give another hydra.run.dir to start anew"
        )
    return None


def _set_aside(path: Path) -> None:
    os.replace(path, path.with_name(path.name + ".damaged"))
    if _hash_file(path).exists():
        os.replace(_hash_file(path), _hash_file(path).with_name(_hash_file(path).name + ".damaged"))


def load_training(path: Path) -> dict[str, Any]:
    """The state that `save_training` saved, on the CPU.

    Raises:
        DamagedCheckpoint: no checkpoint, or not as it was saved.
        CheckpointError: it is missing, or can't be read at present.
    """
    what = f"{path} is damaged or no checkpoint of relloc"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); nothing was changed") from error
    _check_hash(path, content, what)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code in the file
        raise DamagedCheckpoint(f"{what}: it holds more than tensors and plain values") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{what}: {error}") from error
    if not isinstance(state, dict) or "step" not in state:
        raise DamagedCheckpoint(f"{what}: it names no step")
    return state


def _check_hash(path: Path, content: bytes, what: str) -> None:
    if _hash_file(path).exists():
        noted = _hash_file(path).read_text(encoding="ascii", errors="replace").split()[:1]
        if noted != [hashlib.sha256(content).hexdigest()]:
            raise DamagedCheckpoint(f"{what}: its SHA-256 is not the one noted in {_hash_file(path).name}")


def save_backbone(path: Path, backbone: nn.Module, about: Mapping[str, Any]) -> None:
    """Save a backbone's weights as safetensors, with `about` (JSON) telling what built and made it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    _write(path, save(tensors, metadata={"relloc": json.dumps(about, sort_keys=True)}))


def backbone_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or the one in the run folder `path`."""
    return path.resolve() / BACKBONE_FILE if path.is_dir() else path.resolve()


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
    state = load_training(file)
    if not {"model", "about"} <= state.keys():
        raise CheckpointError(f"{file} is damaged or no checkpoint of relloc: it holds no model")
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
    return weights, state["about"]


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights into a backbone, all or nothing; counters of batches may be missing, as in old files.

    Raises:
        CheckpointError: names or shapes do not fit, with what does not.
    """
    wanted = backbone.state_dict()
    missing = sorted(name for name in set(wanted) - set(weights) if not name.endswith("num_batches_tracked"))
    unknown = sorted(set(weights) - set(wanted))
    misfits = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if missing or unknown or misfits:
        kinds = {"missing": missing, "unknown": unknown, "of another shape": misfits}
        told = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names)
        raise CheckpointError(f"{origin} does not fit this backbone: {told}. Give the model it was trained with")
    backbone.load_state_dict(wanted | dict(weights))
