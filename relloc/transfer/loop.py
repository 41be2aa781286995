"""The one training loop of semi-supervised training, detection and segmentation.

It knows of a batch how many samples it has and how their loss is computed, and nothing else: images
may be one tensor or a list of different sizes, targets anything.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from relloc import ranks
from relloc.errors import DataError, UsageError
from relloc.optimization import Gradients, StepReport, StepsDone, all_finite, run_steps
from relloc.seeds import Use, seed_for
from relloc.transfer.schedule import Schedule
from relloc.transfer.sync_batch_norm import synchronize

T = TypeVar("T")


class Diverged(UsageError):
    """A training whose loss or weights are no longer finite: no further step mends it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Generic[T]):
    """What one forward is given, and how many samples its loss is the mean over: none, where all were unreadable."""

    content: T
    samples: int


# Where the batches come from. Called with (first, end), it yields this process's parts of each of the steps from
# `first` to before `end`. A step is the same whatever span it is asked for in, and has as many parts in each process.
PartsOfSteps = Callable[[int, int], Iterator[Sequence[Part[T]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """What a span of steps gave. `step` counts all steps done; `loss` is the mean over the span's samples."""

    step: int
    loss: float
    samples: int
    lr: float


def divided(samples: Sequence[T], accumulation: int = 1) -> list[Sequence[T]]:
    """This process's `accumulation` parts of a step's samples.

    Over all processes the parts are the samples in order, cut as evenly as possible. So two processes
    have the parts of one process with twice the accumulation.
    """
    n_parts = ranks.world_size() * accumulation
    edges = [len(samples) * part // n_parts for part in range(n_parts + 1)]
    first = ranks.rank() * accumulation
    return [samples[edges[part] : edges[part + 1]] for part in range(first, first + accumulation)]


@dataclasses.dataclass(eq=False)
class FineTuning(Generic[T]):
    """A training of `network` by `optimizer`, whose gradient of a step is that of the mean over its samples.

    `length` counts iterations, or epochs where `steps_per_unit` is the number of steps an epoch. In
    that unit `schedule` moves the rate of each parameter group, of which each has its own base rate.

    The gradients of a step's parts are added up, over all processes. Batch norm has the statistics of
    one part; where it is `synchronized`, of the parts that all processes compute at the same time.

    `loss` is given the content of a part. PyTorch's global generators, from which dropout draws, are
    seeded for each part by its place in the step and put back after: any step can be computed again.
    A step of fewer samples than `least_samples` is left out, as batch norm knows no variance of one.

    All processes start with the weights of the first. `name` is what messages call the training.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    _: dataclasses.KW_ONLY
    parts: PartsOfSteps[T]
    loss: Callable[[T], Tensor]
    length: int
    steps_per_unit: int
    schedule: Schedule
    synchronized: bool
    seed: int
    device: torch.device
    bf16: bool
    name: str
    least_samples: int = 1
    step: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.synchronized = self.synchronized and ranks.world_size() > 1
        if self.synchronized:
            synchronize(self.network, self.device)
        self._gradients = Gradients(self.network.parameters())
        ranks.copy_from_first(self.network.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on to the bit, in any number of processes."""
        return {"step": self.step, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.step = saved["step"]
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def spans(self, every: int) -> Iterator[Span]:
        """Train to the end, and pause after each `every` units: to evaluate, and to save `state_dict()`.

        In a pause the network may be in any mode, and is the same in all processes.

        Raises:
            Diverged: loss or weights are not finite after a span.
            DataError: no step of a span has enough samples.
        """
        last = self.length * self.steps_per_unit
        while self.step < last:
            # A resumed training pauses where one that was never stopped does.
            whole = every * self.steps_per_unit
            yield self._train_until(min(last, (self.step // whole + 1) * whole))

    def _train_until(self, end: int) -> Span:
        self.network.train()
        parts = self.parts(self.step, end)
        reports: list[StepReport] = []
        run_steps(
            lambda step: self._take_step(step, next(parts)),
            optimizer=self.optimizer,
            rate_factor=lambda step: self.schedule.factor(step / self.steps_per_unit),
            done=StepsDone(step=self.step, sums=torch.zeros(2, dtype=torch.float64, device=self.device)),
            steps=end,
            report_every=end,
            report=reports.append,
            after_step=lambda _done: False,
        )
        next(parts, None)  # what the parts have to say after the last one
        self.step = end
        # Batch norm that is not synchronized has seen other images in each process: the first one's counts.
        ranks.copy_from_first(self.network.buffers())
        sum_of_losses, samples = reports[0].sums
        lr = reports[0].lr
        if not samples:
            raise DataError(
                f"{self.name}: up to step {end} no step has {self.least_samples} or more images that can be "
                "read, so nothing can be trained on: mend or remove what can't be read"
            )
        if not math.isfinite(sum_of_losses) or not all_finite(self.network):
            raise Diverged(
                f"{self.name} diverged: loss or weights are no longer finite after step {end} of "
                f"{self.length * self.steps_per_unit}, at a learning rate of {lr:g}. Give a lower one"
                + (", or precision=fp32" if self.bf16 else "")
            )
        return Span(step=end, loss=sum_of_losses / samples, samples=int(samples), lr=lr)

    def _take_step(self, step: int, parts: Sequence[Part[T]]) -> Tensor:
        """One optimizer step; the sum of the losses of this process's samples, and their number."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        # How many samples all processes have is known before the first forward: it weights each part's loss.
        samples = int(ranks.total(torch.tensor(sum(part.samples for part in parts))))
        if samples < self.least_samples:
            return sums
        forked = [self.device] if self.device.type == "cuda" else []
        self._gradients.clear()
        for number, part in enumerate(parts, start=ranks.rank() * len(parts)):
            # Other processes wait in a synchronized batch norm for a part, also where it is empty.
            if not part.samples and not self.synchronized:
                continue
            with torch.random.fork_rng(forked), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                torch.manual_seed(seed_for(Use.FINE_TUNING_FORWARD, self.seed, step, number))
                loss = self.loss(part.content)
            # The mean over processes of the gradients is to be that of the mean over samples.
            (loss * (part.samples * ranks.world_size() / samples)).backward()
            if part.samples:  # the mean loss of no samples is NaN, and its gradients are zeros
                sums += torch.stack([loss.detach().double() * part.samples, sums.new_full((), part.samples)])
        self._gradients.average()
        self.optimizer.step()
        return sums
