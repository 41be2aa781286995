"""The training loop, plain: steps in order, each a function of its number and the seed."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from relloc import ranks
from relloc.geometry import NEIGHBORS
from relloc.optimization import Gradients, StepReport, StepsDone, run_steps
from relloc.pretext import objective
from relloc.pretext.feed import Images
from relloc.pretext.graphed import Graphed
from relloc.pretext.schedule import Schedule

PAIRS = len(NEIGHBORS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a stretch of steps gave: means over its pairs. `step` counts the steps done so far."""

    step: int
    epoch: float
    loss: float
    top1: float
    lr: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on what; the same for every step.

    `network` and `make` are `model` and the making of patches from images and what `draw` drew, as
    they are or compiled; `cuda_graphs` records forward and backward as one. A forward has ghost batches
    of `model.images_per_batch_norm` images, and the random numbers of each come from
    `seed_of(step, its place in the step)`.
    """

    model: objective.RelativeLocation
    network: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    draw: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    make: Callable[..., Tensor]
    steps_per_epoch: int
    accumulation: int
    seed_of: Callable[..., int]
    device: torch.device
    bf16: bool
    cuda_graphs: bool = False

    @property
    def steps(self) -> int:
        """Length of the run in optimizer steps."""
        return max(1, round(self.schedule.epochs * self.steps_per_epoch))

    def start(self) -> StepsDone:
        """Of a training that has done nothing. What steps add up is loss x pairs, right answers and pairs."""
        return StepsDone(step=0, sums=torch.zeros(3, dtype=torch.float64, device=self.device))


def train(
    task: Task,
    forwards: Iterator[Images],
    *,
    done: StepsDone,
    report_every: int,
    report: Callable[[Progress], None],
    after_step: Callable[[StepsDone], bool],
) -> int:
    """Run steps from `done` to the end, or until `after_step` returns True; steps done.

    `forwards` are this process's images on the device, forward by forward; `report` gets the means
    since the last report, every `report_every` steps and at the end. Ranks stop together only if
    `after_step` answers alike on all of them.
    """
    ranks.copy_from_first(task.model.state_dict().values())
    task.model.train()
    stepper = Stepper(task)

    def report_means(sums: StepReport) -> None:
        loss, hits, pairs = sums.sums
        epoch = sums.step / task.steps_per_epoch
        report(Progress(step=sums.step, epoch=epoch, loss=loss / pairs, top1=100 * hits / pairs, lr=sums.lr))

    return run_steps(
        lambda step: stepper.step(forwards, step),
        optimizer=task.optimizer,
        rate_factor=lambda step: task.schedule.factor(step / task.steps_per_epoch),
        done=done,
        steps=task.steps,
        report_every=report_every,
        report=report_means,
        after_step=after_step,
    )


class Stepper:
    """Optimizer steps of a task, whose model's gradients it owns."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._gradients = Gradients(task.model.parameters())
        compute = functools.partial(_forward_backward, task)
        self._compute = Graphed(compute) if task.cuda_graphs else compute

    def step(self, forwards: Iterator[Images], step: int) -> Tensor:
        """One step over the images of the next `accumulation` forwards; its loss x pairs, right answers and pairs."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.task.device)
        self._gradients.clear()
        for number, images in enumerate(itertools.islice(forwards, self.task.accumulation)):
            drawn, dropout_mask = _draw(self.task, len(images), step, number)
            sums += self._compute(images, dropout_mask, *drawn)
        self._gradients.average()
        self.task.optimizer.step()
        return sums


def _forward_backward(task: Task, images: Images, dropout_mask: Tensor | None, *drawn: Tensor) -> Tensor:
    """Add a forward's share to the gradients; its loss x pairs, right answers and pairs."""
    patches = task.make(images, *drawn)
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.bf16):
        logits = task.network(patches, dropout_mask)
    loss = objective.loss(logits)
    (loss / task.accumulation).backward()
    pairs = len(images) * PAIRS
    loss, right = loss.detach().double(), objective.hits(logits.detach()).sum().double()
    return torch.stack([loss * pairs, right, torch.full_like(loss, pairs)])


def _draw(task: Task, n_images: int, step: int, number: int) -> tuple[list[Tensor], Tensor | None]:
    """The random numbers of a forward: those of its patches, and the mask of what dropout keeps.

    Each ghost batch has a seed of its own, by the step and its number in the step: any step can be computed
    again alone, in forwards of any size, by any number of processes.
    """
    size = task.model.images_per_batch_norm
    ghosts = n_images // size
    first = (ranks.rank() * task.accumulation + number) * ghosts
    generator = torch.Generator(task.device)
    drawn, masks = [], []
    for ghost in range(first, first + ghosts):
        generator.manual_seed(task.seed_of(step, ghost))
        drawn.append(task.draw(size, generator))
        masks.append(task.model.head.draw_dropout_mask(size, generator))  # pyright: ignore[reportCallIssue]
    return [torch.cat(parts) for parts in zip(*drawn, strict=True)], None if masks[0] is None else torch.cat(masks)
