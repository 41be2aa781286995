"""Loads weights into a backbone after checking that names, shapes, types and values fit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from relloc.errors import CheckpointError
from relloc.terminal import escaped

_LONGEST_SHOWN = 100  # characters of a tensor's name in a message


_ADVICE = "Give the model it was trained with"


def fill(
    backbone: nn.Module, weights: Mapping[str, Tensor], origin: str, advice: str = _ADVICE
) -> None:
    """Loads weights into a backbone: either all of them or, after an error, none.

    Batch norm's counters (num_batches_tracked) may be missing, as in files of torch before 0.4.1.

    Args:
        backbone: the module to change.
        weights: tensors by the names of the module's state dict.
        origin: where the weights are from, for messages.
        advice: what the user can do where names, shapes or types do not fit.

    Raises:
        CheckpointError: names, shapes or types do not fit, or values are not finite.
    """
    wanted = backbone.state_dict()
    check_fits(wanted, weights, origin, advice)
    not_finite: list[str] = []
    negative: list[str] = []
    for name, tensor in weights.items():
        # As float64, since torch.isfinite does not know every type that a file may have.
        values = tensor.double()
        # Values that are finite in the file may overflow in the type of the backbone.
        as_loaded = values.to(wanted[name].dtype)
        if not (torch.isfinite(values) & torch.isfinite(as_loaded)).all():
            not_finite.append(name)
        if name.endswith("running_var") and (values < 0).any():
            negative.append(name)
    if not_finite:
        raise CheckpointError(
            f"{origin} holds NaN or infinite weights, in {len(not_finite)} of {len(weights)} "
            f"tensors, such as {not_finite[0]}: its training diverged or the file is damaged; "
            "take an earlier or another one"
        )
    if negative:
        raise CheckpointError(
            f"{origin} has negative variances in {negative[0]}, from which batch norm computes "
            "NaN: the file is damaged; take another one"
        )
    # The backbone's own counters stand in for those that are missing in the file.
    backbone.load_state_dict(wanted | dict(weights))


def check_fits(
    wanted: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    origin: str,
    advice: str = _ADVICE,
) -> None:
    """Checks that weights have the names, shapes and kinds of numbers of a state dict.

    Batch norm's counters (num_batches_tracked) may be missing.

    Args:
        wanted: the state dict of a backbone, which may be on the meta device.
        weights: tensors by name.
        origin: where the weights are from, for the message.
        advice: what the user can do, the message's last sentence.

    Raises:
        CheckpointError: something does not fit; the message names it.
    """
    missing = [
        name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in weights if name not in wanted]
    other_shape: list[str] = []
    other_type: list[str] = []
    for name, tensor in weights.items():
        if name not in wanted:
            continue
        if tensor.shape != wanted[name].shape:
            shapes = f"{list(tensor.shape)} for {list(wanted[name].shape)}"
            other_shape.append(f"{name} {shapes}")
        if _kind(wanted[name]) != _kind(tensor):
            other_type.append(name)
    # One message names all problems, since the user will want to see the pattern in them.
    kinds = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": other_shape,
        "of another type": other_type,
    }
    misfits = [f"{len(names)} {kind} ({first_of(names)})" for kind, names in kinds.items() if names]
    if misfits:
        raise CheckpointError(
            f"{origin} does not fit this backbone: {'; '.join(misfits)}. {advice}"
        )


def first_of(names: Sequence[str], count: int = 3) -> str:
    """Returns the first `count` names as text that is short and can't control a terminal."""
    shown = [
        name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}…"
        for name in names[:count]
    ]
    return escaped(", ".join(shown)) + (", …" if len(names) > count else "")


def _kind(tensor: Tensor) -> str:
    """Returns the kind of a tensor's numbers, within which types are converted on loading."""
    if tensor.is_complex():
        return "complex"
    # A scalar is a counter of batch norm, which some projects save as a float.
    if tensor.is_floating_point() or tensor.dim() == 0:
        return "float"
    return "integer"
