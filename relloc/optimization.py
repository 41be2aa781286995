"""What trainings share: the loop over optimizer steps, rates that follow a schedule, gradients averaged over ranks."""

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from relloc import ranks

_ALIGNED = 64  # values: where vectorized kernels may begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsDone:
    """How far a training is: optimizer steps done, and what this process's steps since the last report add up to."""

    step: int
    sums: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """Sums over the steps since the last report and over all ranks; `lr` is the rate of the last of these steps."""

    step: int
    sums: list[float]
    lr: float


def run_steps(
    take_step: Callable[[int], Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    rate_factor: Callable[[int], float],
    done: StepsDone,
    steps: int,
    report_every: int,
    report: Callable[[StepReport], None],
    after_step: Callable[[StepsDone], bool],
) -> int:
    """Take steps from `done` to `steps`, or until `after_step` returns True; how many are done then.

    `take_step(number)` does forward, backward and the optimizer's step, and returns numbers (k,) that are added up,
    such as the sum of losses, right answers and images. Learning rates are `rate_factor(number)` times the initial
    ones. `after_step` may save (`done` is all that is to be kept beside model and optimizer), evaluate, and stop;
    ranks stop together only if it answers alike on all of them.
    """
    for number in range(done.step, steps):
        lr = set_rates(optimizer, rate_factor(number))
        sums = done.sums + take_step(number)
        if (number + 1) % report_every == 0 or number + 1 == steps:
            report(StepReport(step=number + 1, sums=ranks.total(sums).tolist(), lr=lr))
            sums = torch.zeros_like(sums)
        done = StepsDone(step=number + 1, sums=sums)
        if after_step(done):
            break
    return done.step


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Give each parameter group `factor` times its initial learning rate; the rate of the first group.

    The initial rate is what the group had at the first call. It is saved and loaded with the optimizer's state.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def milestone_factor(epoch: float, milestone_epochs: Sequence[float], gamma: float) -> float:
    """What rates are multiplied by at `epoch`, counted from 0: `gamma` for each milestone reached."""
    return gamma ** bisect.bisect_right(milestone_epochs, epoch)


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether all parameters, running statistics and other floating-point buffers are finite."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.nn.utils.get_total_norm(values, norm_type=torch.inf).isfinite())


class Gradients:
    """The gradients of parameters in one piece of memory: one kernel clears them, one collective averages them.

    Each parameter's `grad` is its part of that memory, for backwards to add to. Its place stays, so that a recorded
    CUDA graph can write there. Processes average in one call after the last backward: nothing of it runs beside the
    backward, as it does with DistributedDataParallel, whose hooks and kernels the process that feeds a GPU has no
    time for.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        learned = [value for value in parameters if value.requires_grad]
        lengths = [-(-value.numel() // _ALIGNED) * _ALIGNED for value in learned]
        self._all = torch.zeros(sum(lengths), dtype=learned[0].dtype, device=learned[0].device)
        for value, part in zip(learned, self._all.split(lengths), strict=True):
            value.grad = part.as_strided(value.shape, value.stride())  # in the memory format of the weights

    def clear(self) -> None:
        self._all.zero_()

    def average(self) -> None:
        """Replace them by their mean over all processes."""
        if ranks.world_size() > 1:
            ranks.total(self._all.div_(ranks.world_size()))
