"""Alarms while training: a loss that stays at chance, and one that is no number any more."""

import math
from collections.abc import Callable

from torch import nn

from relloc.errors import UsageError
from relloc.geometry import NEIGHBORS
from relloc.optimization import all_finite
from relloc.pretext.loop import Progress

CHANCE_LOSS = math.log(len(NEIGHBORS))
_CLOSE = 0.01  # field.md 2, item 39


class Diverged(UsageError):
    """Loss or weights are not finite: nothing that follows could be right."""


class Alarm:
    """Looks at each report. Says once when the loss has stayed at log 8 for `collapse_steps` steps.

    The paper warns of this collapse: the network answers all eight positions alike.
    """

    def __init__(self, *, collapse_steps: int, first_step: int, say: Callable[[str], None]) -> None:
        self.collapse_steps = collapse_steps
        self.say = say
        self._left_chance_at = first_step
        self._said = False

    def look(self, progress: Progress) -> None:
        """Raises `Diverged` where the loss is not finite."""
        if not math.isfinite(progress.loss):
            raise Diverged(f"the loss is {progress.loss} at step {progress.step} (learning rate {progress.lr:g})")
        if abs(progress.loss - CHANCE_LOSS) >= _CLOSE:
            self._left_chance_at = progress.step
        elif progress.step - self._left_chance_at >= self.collapse_steps and not self._said:
            self._said = True
            self.say(
                f"alarm   the loss has stayed at log 8 = {CHANCE_LOSS:.3f} for {progress.step - self._left_chance_at} "
                "steps: the network answers at chance. If that goes on, try a lower optimizer.lr, a longer "
                "schedule.warmup_epochs, or an easier question (a smaller grid.gap_px, color=gray)"
            )


def check_finite(model: nn.Module, step: int) -> None:
    """Raises `Diverged` unless all parameters and running statistics are finite."""
    if not all_finite(model):
        raise Diverged(f"weights or running statistics are not finite after step {step}")
