"""Checks and describes the hyperparameters of evaluations that train with SGD."""

from collections.abc import Sequence
from typing import Any

from relloc import checks
from relloc.terminal import quantity


def describe_schedule(
    epochs: int,
    milestone_epochs: Sequence[int],
    gamma: float,
) -> str:
    """Returns a step schedule in words, such as `90 epochs, x0.1 at 30, 60`.

    Milestones that are never reached are left out.
    """
    words = quantity(epochs, "epoch")
    reached = [str(milestone) for milestone in milestone_epochs if milestone < epochs]
    if reached:
        milestones = ", ".join(reached)
        words += f", x{gamma:g} at {milestones}"
    return words


def check_sgd_settings(
    setting: str,
    evaluation: Any,
    *,
    batch_norm: bool,
) -> None:
    """Checks the SGD hyperparameters of an evaluation that is configured at `setting`.

    `setting` is the name in the config, such as eval.linear; `batch_norm` says whether batch
    statistics are computed in training.

    Raises:
        ValueError: epochs, milestone_epochs, gamma, momentum, weight_decay or batch is wrong; the
            message has the setting's name, its value and what is right.
    """
    checks.whole(f"{setting}.epochs", evaluation.epochs)
    checks.wholes(f"{setting}.milestone_epochs", evaluation.milestone_epochs, may_be_empty=True)
    checks.increasing(f"{setting}.milestone_epochs", evaluation.milestone_epochs)
    checks.number(f"{setting}.gamma", evaluation.gamma, above=0)
    checks.number(
        f"{setting}.momentum",
        evaluation.momentum,
        at_least=0,
        at_most=1,
    )
    checks.number(f"{setting}.weight_decay", evaluation.weight_decay, at_least=0)
    checks.whole(f"{setting}.batch", evaluation.batch)
    # Batch norm divides by the variance of a batch, and one image has none.
    if batch_norm and evaluation.batch < 2:
        raise ValueError(
            f"{setting}.batch is {evaluation.batch}: batch norm needs batches of 2 or more images"
        )
