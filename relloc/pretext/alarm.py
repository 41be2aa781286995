"""Warns while training if the loss stays at chance, and ends a training that diverged."""

import math
from collections.abc import Callable

from torch import nn

from relloc.errors import UsageError
from relloc.optimization import all_finite
from relloc.pretext.loop import Progress

_AT_CHANCE = 0.01  # a loss within this distance of that of chance counts as chance


class Diverged(UsageError):
    """The loss or the weights are not finite, so that nothing that follows could be right."""


class Alarm:
    """Watches the loss of a training and warns once of a collapse to chance.

    The paper (Doersch 2015) reports that a network may collapse: it gives all eight positions the
    same probability, and the loss stays at log 8.

    Args:
        chance_loss: the loss of a network that does not look at the patches.
        collapse_steps: how many optimizer steps the loss has to stay at chance before the warning.
        first_step: the step from which this process trains, where counting begins.
        warn: is called with the text of the warning.
    """

    def __init__(
        self,
        *,
        chance_loss: float,
        collapse_steps: int,
        first_step: int,
        warn: Callable[[str], None],
    ) -> None:
        self.chance_loss = chance_loss
        self.collapse_steps = collapse_steps
        self.warn = warn
        self._last_step_off_chance = first_step
        self._has_warned = False

    def check(self, progress: Progress) -> None:
        """Takes a report of the training.

        Raises:
            Diverged: the loss is not finite.
        """
        if not math.isfinite(progress.loss):
            where = f"at step {progress.step} (learning rate {progress.lr:g})"
            raise Diverged(f"the loss is {progress.loss} {where}")
        # Steps are counted from the last report whose loss differed from chance, up or down.
        distance = abs(progress.loss - self.chance_loss)
        if distance >= _AT_CHANCE:
            self._last_step_off_chance = progress.step
            return
        steps_at_chance = progress.step - self._last_step_off_chance
        if steps_at_chance >= self.collapse_steps and not self._has_warned:
            self._has_warned = True
            self.warn(
                f"alarm   the loss has stayed at {self.chance_loss:.3f}, that of guessing, for "
                f"{steps_at_chance} steps: the network answers at chance. If that goes on, try a "
                "lower optimizer.lr, a longer schedule.warmup_epochs, or an easier question (a "
                "smaller grid.gap_px, color=gray)"
            )


def check_finite(model: nn.Module, step: int) -> None:
    """Raises `Diverged` unless all parameters and running statistics of the model are finite."""
    if not all_finite(model):
        raise Diverged(f"weights or running statistics are not finite after step {step}")
