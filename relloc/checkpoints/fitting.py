"""Weights and the backbone that is to have them: whether they fit, and loading them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from relloc.errors import CheckpointError
from relloc.terminal import escaped

_LONGEST_SHOWN = 100


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights into a backbone, all or nothing; counters of batches may be missing, as in old files.

    Raises:
        CheckpointError: names or shapes do not fit, with what does not; or values that are not finite.
    """
    wanted = backbone.state_dict()
    check_fits(wanted, weights, origin)
    broken, negative = [], []
    for name, tensor in weights.items():
        # As float64, since isfinite does not know every type that a file may have; and as loaded, where large ones
        # may become infinite.
        values = tensor.double()
        if not (torch.isfinite(values) & torch.isfinite(values.to(wanted[name].dtype))).all():
            broken.append(name)
        if name.endswith("running_var") and (values < 0).any():
            negative.append(name)
    if broken:
        raise CheckpointError(
            f"{origin} holds NaN or infinite weights, in {len(broken)} of {len(weights)} tensors, such as "
            f"{broken[0]}: its training diverged or the file is damaged; take an earlier or another one"
        )
    if negative:
        raise CheckpointError(
            f"{origin} has negative variances in {negative[0]}, of which batch norm makes NaN: the file is damaged; "
            "take another one"
        )
    backbone.load_state_dict(wanted | dict(weights))


def check_fits(
    wanted: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    origin: str,
    advice: str = "Give the model it was trained with",
) -> None:
    """Compare names, shapes and kinds of numbers with those of a backbone, which may be on the meta device.

    Counters of batches may be missing.

    Raises:
        CheckpointError: what does not fit.
    """
    both = [name for name in weights if name in wanted]
    kinds = {
        "missing": [
            name
            for name in wanted
            if name not in weights and not name.endswith("num_batches_tracked")
        ],
        "unknown": [name for name in weights if name not in wanted],
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}"
            for name in both
            if weights[name].shape != wanted[name].shape
        ],
        "of another type": [name for name in both if _kind(wanted[name]) != _kind(weights[name])],
    }
    misfits = [f"{len(names)} {kind} ({first_of(names)})" for kind, names in kinds.items() if names]
    if misfits:
        raise CheckpointError(
            f"{origin} does not fit this backbone: {'; '.join(misfits)}. {advice}"
        )


def first_of(names: Sequence[str], count: int = 3) -> str:
    """The first of some names, none of them long or such that it acts on a terminal."""
    shown = [
        name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}…"
        for name in names[:count]
    ]
    return escaped(", ".join(shown)) + (", …" if len(names) > count else "")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return (
        "float" if tensor.is_floating_point() or tensor.dim() == 0 else "whole"
    )  # a counter may be either
