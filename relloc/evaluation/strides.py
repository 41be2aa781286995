"""In which strides a network is evaluated that was trained with strides of its own.

Strides are no weights. A network that was trained with a last stage of stride 1 on small patches
can be evaluated with stride 2, as everybody does who loads its weights into an unchanged ResNet, or
with stride 1 as it was trained.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from relloc.evaluation.contract import EvaluatedModel
from relloc.models.backbone import Backbone

# "standard": those that other projects give the weights; "as_trained": the network's own.
STRIDES = ("standard", "as_trained")


@runtime_checkable
class _Grouped(Protocol):
    """An evaluation that knows which config group it was chosen from."""

    @property
    def group(self) -> str: ...


T = TypeVar("T", bound=_Grouped)


def strides_of(group: str, chosen: Sequence[str]) -> Sequence[str]:
    """Returns in which of `STRIDES` an evaluation of a config group looks at a network.

    `chosen` are those of the run. Studies are about the network that was trained, and what they
    compare with, such as patches, is what that was trained on.
    """
    return ("as_trained",) if group == "study" else chosen


def in_strides(backbone: Backbone, strides: str) -> Backbone:
    """Returns a network in one of `STRIDES`; the same one where there is no difference."""
    return backbone.with_standard_strides() if strides == "standard" else backbone


def by_strides(
    models: Sequence[EvaluatedModel],
    evaluations: Sequence[T],
    chosen: Sequence[str],
) -> list[tuple[EvaluatedModel, list[T]]]:
    """Returns each model in each of the chosen strides, with the evaluations that look at it so.

    A model without strides of its own is returned as it is, with all evaluations. Results of
    another one name its strides: in the name of the model where they are its own, and otherwise
    among the details.
    """
    variants: list[tuple[EvaluatedModel, list[T]]] = []
    for model in models:
        if not model.backbone.own_strides:
            variants.append((model, list(evaluations)))
            continue
        for strides in STRIDES:
            looking = [each for each in evaluations if strides in strides_of(each.group, chosen)]
            if looking:
                variants.append((_in_strides(model, strides), looking))
    return variants


def _in_strides(model: EvaluatedModel, strides: str) -> EvaluatedModel:
    """Returns a model with strides of its own in one of `STRIDES`, as its results name it."""
    own_strides = model.backbone.own_strides
    if strides == "standard":
        detail = f"network with {own_strides}, evaluated with the standard strides"
        return dataclasses.replace(
            model,
            backbone=in_strides(model.backbone, strides),
            details=(*model.details, detail),
        )
    return dataclasses.replace(
        model,
        model=f"{model.model} {own_strides}",
        strides=strides,
        details=(*model.details, f"network with {own_strides}, evaluated so"),
    )
