"""The constants of evaluations that train by SGD: whether they make sense, and how they are written."""

from collections.abc import Sequence
from typing import Any

from relloc import checks


def in_words(epochs: int, milestone_epochs: Sequence[int], gamma: float) -> str:
    """`90 epochs, x0.1 at 30, 60`, as protocols say it; milestones that are never reached are left out."""
    reached = ", ".join(str(milestone) for milestone in milestone_epochs if milestone < epochs)
    return f"{epochs} epochs" + (f", x{gamma:g} at {reached}" if reached else "")


def check_training(setting: str, constants: Any, *, batch_norm: bool) -> None:
    """Whether what SGD is told can train anything; `constants` is the evaluation `setting`, such as eval.linear.

    Raises:
        ValueError: epochs, milestone_epochs, gamma, momentum, weight_decay or batch can't; with which and why.
    """
    checks.whole(f"{setting}.epochs", constants.epochs)
    checks.wholes(f"{setting}.milestone_epochs", constants.milestone_epochs, may_be_empty=True)
    checks.rising(f"{setting}.milestone_epochs", constants.milestone_epochs)
    checks.number(f"{setting}.gamma", constants.gamma, above=0)
    checks.number(f"{setting}.momentum", constants.momentum, at_least=0, at_most=1)
    checks.number(f"{setting}.weight_decay", constants.weight_decay, at_least=0)
    checks.whole(f"{setting}.batch", constants.batch)
    if batch_norm and constants.batch < 2:
        raise ValueError(f"{setting}.batch is {constants.batch}: batch norm needs 2 or more")
