"""Parts that all trainings share: the loop over steps, learning rates, averages of gradients."""

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relloc import ranks

# Each parameter's gradients begin at a multiple of this many values, as vectorized kernels need it.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsDone:
    """The state of a training: optimizer steps done, and sums that were not reported yet.

    `sums` are those of this process over the steps since the last report.
    """

    step: int
    sums: Float[Tensor, "k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """Sums over the steps since the last report and over all processes.

    `step` counts the optimizer steps done, and `lr` is the learning rate of the last one.
    """

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
    """Takes optimizer steps from `done` on, and returns how many are done at the end.

    Args:
        take_step: is called with the step's number, counted from 0. It does forward, backward and
            the optimizer's step, and returns numbers (k) that are added up, such as the sum of
            losses, right answers and images.
        optimizer: its learning rates are set before each step.
        rate_factor: gives the factor on the initial learning rates from the step's number.
        done: where to begin.
        steps: the number of steps at which training ends.
        report_every: steps between reports; there is one more at the end.
        report: is called with each report.
        after_step: is called after each step, and may save or evaluate; what it is given is all
            that has to be saved beside model and optimizer. Training ends early if it returns True.
            Processes that train together stop together only if it returns the same on all of them.
    """
    for number in range(done.step, steps):
        lr = set_rates(optimizer, rate_factor(number))
        # Sums stay on the device between reports, since to read them makes the host wait.
        sums = done.sums + take_step(number)
        n_done = number + 1
        # Totals are a collective call: all processes report at the same steps.
        if n_done % report_every == 0 or n_done == steps:
            totals = ranks.total(sums).tolist()
            report(StepReport(step=n_done, sums=totals, lr=lr))
            sums = torch.zeros_like(sums)
        done = StepsDone(step=n_done, sums=sums)
        if after_step(done):
            break
    return done.step


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each parameter group's learning rate to `factor` times its initial one.

    The initial rate is what the group had at the first call. It is kept in the group and so saved
    and loaded with the optimizer's state. Returns the new rate of the first group.
    """
    # The key is that of torch's own schedulers.
    for group in optimizer.param_groups:
        initial_lr = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial_lr * factor
    return optimizer.param_groups[0]["lr"]


def milestone_factor(
    epoch: float,
    milestone_epochs: Sequence[float],
    gamma: float,
) -> float:
    """Returns the factor on learning rates at `epoch`: `gamma` for each milestone reached.

    Epochs are counted from 0.

    Example:
        >>> milestone_factor(35, [30, 50], 0.1)
        0.1
    """
    # A milestone counts from its own epoch on.
    n_reached = bisect.bisect_right(milestone_epochs, epoch)
    return gamma**n_reached


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Returns whether all parameters and all floating-point buffers are finite."""
    tensors = model.state_dict().values()
    values = [value for value in tensors if value.is_floating_point()]
    # The largest magnitude of all, by few kernels: it is nan or infinite if any value is.
    largest = torch.nn.utils.get_total_norm(values, norm_type=torch.inf)
    return bool(largest.isfinite())


class Gradients:
    """The gradients of parameters in one block of memory, so that one kernel or call handles all.

    Each parameter's `grad` is a view of its part of that memory, and backwards add to it. The
    memory stays where it is, so that a recorded CUDA graph can write to it.

    Processes average their gradients in one call after the last backward of a step.
    DistributedDataParallel would do it beside the backward, but its hooks and kernels take time
    that the process that feeds a GPU does not have.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        lengths = [_aligned(parameter.numel()) for parameter in trained]
        first = trained[0]
        self._all = torch.zeros(sum(lengths), dtype=first.dtype, device=first.device)
        parts = self._all.split(lengths)
        for parameter, part in zip(trained, parts, strict=True):
            # With the strides of the weights, such as channels-last: the optimizer's kernel reads
            # weights and gradients together.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())

    def clear(self) -> None:
        """Sets all gradients to zero."""
        self._all.zero_()

    def average(self) -> None:
        """Replaces the gradients by their mean over all processes."""
        n_processes = ranks.world_size()
        if n_processes > 1:
            # Divided before the sum, which could overflow otherwise.
            ranks.total(self._all.div_(n_processes))


def _aligned(length: int) -> int:
    """Returns the next multiple of the alignment."""
    n_blocks = -(-length // _ALIGNMENT)  # rounded up
    return n_blocks * _ALIGNMENT
