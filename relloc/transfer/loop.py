"""The training loop that semi-supervised classification, detection and segmentation share.

Of a batch it knows how many samples it has and how their loss is computed, and nothing else. So
images may be one tensor or a list of different sizes, and targets anything.
"""

import contextlib
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
    """A training whose loss or weights are no longer finite, which further steps can't repair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch(Generic[T]):
    """The input of one forward, and the number of samples over which its loss is the mean.

    `samples` is 0 where none of them could be read.
    """

    content: T
    samples: int


# Called once with (first, end), it yields this process's micro-batches of each step from `first` to
# before `end`. A step is the same wherever a training begins, and has the same number of
# micro-batches in each process.
MicroBatchSource = Callable[[int, int], Iterator[Sequence[MicroBatch[T]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossReport:
    """What a range of steps gave: the mean loss of its samples, and the last learning rate.

    `step` counts all steps of the training so far.
    """

    step: int
    loss: float
    samples: int
    lr: float


def split_for_rank(samples: Sequence[T], accumulation: int = 1) -> list[Sequence[T]]:
    """Returns this process's micro-batches of the samples of a step, `accumulation` of them.

    Over all processes, the micro-batches are the samples in order, cut as evenly as possible. So
    two processes have the micro-batches of one process with twice the accumulation.

    Example:
        split_for_rank(range(7), 3)  # one process: [range(0, 2), range(2, 4), range(4, 7)]
    """
    n_micro_batches = ranks.world_size() * accumulation
    edges = []
    for number in range(n_micro_batches + 1):
        edges.append(len(samples) * number // n_micro_batches)
    first = ranks.rank() * accumulation
    own_micro_batches = []
    for number in range(first, first + accumulation):
        start, end = edges[number], edges[number + 1]
        own_micro_batches.append(samples[start:end])
    return own_micro_batches


@dataclasses.dataclass(eq=False)
class FineTuning(Generic[T]):
    """A training of `network` by `optimizer` on the mean loss over the samples of each step.

    Gradients of a step's micro-batches are added up, over all processes. A batch norm uses the
    statistics of one micro-batch; with `synchronized`, of the micro-batches that all processes
    compute at the same time. All processes start with the weights of the first.

    PyTorch's global generators, from which dropout draws, are seeded for each micro-batch by its
    place in the step, and put back afterwards. So any step can be computed again.

    Args:
        network: trained in place.
        optimizer: one that has the parameters of the network, each group with its own base rate.
        micro_batches: where the data comes from.
        loss: the mean loss of the content of a micro-batch.
        length: how long to train, in units of `schedule`: iterations, or epochs.
        steps_per_unit: 1 for iterations, or the number of steps in an epoch.
        schedule: the factor of the base rates.
        synchronized: whether batch norms use the statistics of all processes.
        seed: of dropout.
        device: where the network is.
        bf16: whether forwards run in bfloat16.
        name: what messages call the training.
        least_samples: a step with fewer samples over all processes is left out. 2 where a batch
            norm sees one value per channel of a sample, which has no variance.
        gradient_limit: the largest norm that the gradient of a step may have, over all trained
            weights; larger gradients are scaled down to it. None for no limit.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    _: dataclasses.KW_ONLY
    micro_batches: MicroBatchSource[T]
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
    gradient_limit: float | None = None
    step: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        # One process has nobody to synchronize with.
        self.synchronized = self.synchronized and ranks.world_size() > 1
        if self.synchronized:
            synchronize(self.network, self.device)
        self._gradients = Gradients(self.network.parameters())
        ranks.copy_from_first(self.network.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on to the bit, in any number of processes."""
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`."""
        self.step = saved["step"]
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def reports(self, every: int) -> Iterator[LossReport]:
        """Trains to the end, and yields after each `every` units of the schedule.

        The caller may then evaluate, and save `state_dict()`. It may leave the network in any mode,
        which has to be the same in all processes.

        Raises:
            Diverged: loss or weights are not finite after a span.
            DataError: no step of a span has enough samples.
        """
        last_step = self.length * self.steps_per_unit
        steps_per_span = every * self.steps_per_unit
        # Reading goes on beside what the caller does between two spans.
        steps = self.micro_batches(self.step, last_step)
        while self.step < last_step:
            # Spans end at multiples of their length, wherever a resumed training began.
            next_pause = (self.step // steps_per_span + 1) * steps_per_span
            yield self._train_until(min(last_step, next_pause), steps)
        # The source finishes after its last step: it counts unreadable images, and may raise.
        next(steps, None)

    def _train_until(self, end: int, steps: Iterator[Sequence[MicroBatch[T]]]) -> LossReport:
        self.network.train()
        reports: list[StepReport] = []
        run_steps(
            lambda step: self._take_step(step, next(steps)),
            optimizer=self.optimizer,
            rate_factor=lambda step: self.schedule.factor(step / self.steps_per_unit),
            done=StepsDone(
                step=self.step,
                sums=torch.zeros(2, dtype=torch.float64, device=self.device),
            ),
            steps=end,
            report_every=end,
            report=reports.append,
            after_step=lambda _done: False,
        )
        self.step = end
        # Batch norm that is not synchronized has seen other images in each process: the statistics
        # of the first one count.
        ranks.copy_from_first(self.network.buffers())
        (report,) = reports
        return self._check_span(report)

    def _check_span(self, report: StepReport) -> LossReport:
        """Returns the span that ends with `report`, unless it trained nothing or diverged."""
        sum_of_losses, samples = report.sums
        if not samples:
            raise DataError(
                f"{self.name}: up to step {self.step} no step has {self.least_samples} or more "
                "images that can be read, so nothing can be trained on. Repair or remove the "
                "images that can't be read."
            )
        # The loss of this span comes from weights before its last step, so both are looked at.
        if not math.isfinite(sum_of_losses) or not all_finite(self.network):
            remedy = "Give a lower one, or precision=fp32." if self.bf16 else "Give a lower one."
            raise Diverged(
                f"{self.name} diverged: loss or weights are no longer finite after step "
                f"{self.step} of {self.length * self.steps_per_unit}, at a learning rate of "
                f"{report.lr:g}. {remedy}"
            )
        return LossReport(
            step=self.step,
            loss=sum_of_losses / samples,
            samples=int(samples),
            lr=report.lr,
        )

    def _take_step(self, step: int, micro_batches: Sequence[MicroBatch[T]]) -> Tensor:
        """Takes one optimizer step.

        Returns the sum of the losses of this process's samples, and their number.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        # The number of samples of all processes weights each loss, so it is needed before the first
        # forward.
        own_samples = sum(micro_batch.samples for micro_batch in micro_batches)
        all_samples = int(ranks.total(torch.tensor(own_samples)))
        if all_samples < self.least_samples:
            return sums
        self._gradients.clear()
        first_number = ranks.rank() * len(micro_batches)
        for number, micro_batch in enumerate(micro_batches, start=first_number):
            samples = micro_batch.samples
            # An empty micro-batch changes nothing. But where batch norm is synchronized, the other
            # processes wait in it for this one.
            if not samples and not self.synchronized:
                continue
            loss = self._forward(step, number, micro_batch.content)
            # `Gradients.average` takes the mean over processes. With this weight that mean is the
            # gradient of the mean over all samples, however they are divided.
            weight = samples * ranks.world_size() / all_samples
            (loss * weight).backward()
            if samples:  # the mean loss of no samples is NaN, and its gradients are zeros
                sum_of_losses = loss.detach().double() * samples
                sums += torch.stack([sum_of_losses, sums.new_full((), samples)])
        self._gradients.average()
        if self.gradient_limit is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_limit)
        self.optimizer.step()
        return sums

    def _forward(self, step: int, number: int, content: T) -> Tensor:
        """Returns the loss of micro-batch `number` of a step, counted through all processes."""
        seed = seed_for(Use.FINE_TUNING_FORWARD, self.seed, step, number)
        with forward_conditions(self.device, bf16=self.bf16, seed=seed):
            return self.loss(content)


@contextlib.contextmanager
def forward_conditions(device: torch.device, *, bf16: bool, seed: int) -> Iterator[None]:
    """Sets precision and PyTorch's global generators for a forward of a training in the block."""
    gpus = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(gpus),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        torch.manual_seed(seed)
        yield
