"""The training loop of the pretext task.

Every optimizer step is a function of the weights, its images, its number and the seed, so that a
run that is stopped and resumed equals one that was not, bit for bit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from relloc import ranks
from relloc.optimization import Gradients, StepReport, StepsDone, run_steps
from relloc.pretext.feed import Images
from relloc.pretext.graphed import Graphed
from relloc.pretext.relative_location import RelativeLocation
from relloc.pretext.schedule import Schedule

# Sum of the losses of all questions, number of right answers, number of questions
Sums = Float[Tensor, "3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A report of the training: means over the questions of all steps since the last report.

    `step` counts the optimizer steps done so far, `top1` is in percent, and `lr` is the rate of the
    last step.
    """

    step: int
    epoch: float
    loss: float
    top1: float
    lr: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model and everything that its training steps need and that stays the same for all of them.

    Args:
        model: the model that is trained.
        network: `model`, or its compiled form; gives outputs for questions.
        optimizer: holds the initial learning rates, which `schedule` multiplies.
        schedule: number of epochs and course of the learning rate.
        draw: makes the random numbers for the patches of a number of images, given a generator and
            the share of the training's steps that is done.
        make: makes patches from images and what `draw` returned; may be compiled.
        steps_per_epoch: optimizer steps in an epoch.
        accumulation: forwards of this process in each optimizer step, whose gradients are added.
        seed_of: gives the seed of a ghost batch from (step, index of the ghost batch in the step).
        device: where the model is.
        bf16: whether forwards run in bfloat16 by autocast.
        cuda_graphs: whether forward and backward are recorded as a CUDA graph.

    A forward consists of ghost batches of `model.images_per_batch_norm` images each.
    """

    model: RelativeLocation
    network: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    draw: Callable[[int, torch.Generator, float], tuple[Tensor, ...]]
    make: Callable[..., Tensor]
    steps_per_epoch: int
    accumulation: int
    seed_of: Callable[..., int]
    device: torch.device
    bf16: bool
    cuda_graphs: bool = False

    @property
    def steps(self) -> int:
        """The length of the run in optimizer steps, at least one."""
        steps = round(self.schedule.epochs * self.steps_per_epoch)
        return max(1, steps)

    def start(self) -> StepsDone:
        """Returns the state of a training that has done no step."""
        return StepsDone(step=0, sums=_no_sums(self.device))


def train(
    task: Task,
    forwards: Iterator[Images],
    *,
    done: StepsDone,
    report_every: int,
    report: Callable[[Progress], None],
    after_step: Callable[[StepsDone], bool],
) -> int:
    """Trains from `done` to the end of the schedule, and returns the number of steps done.

    Args:
        task: what is trained.
        forwards: the images of this process's forwards, on the device.
        done: where to begin: `task.start()`, or what a run that is resumed had saved.
        report_every: optimizer steps between reports; there is one more at the end.
        report: is called with each report.
        after_step: is called after each step; training ends early if it returns True. Processes
            that train together stop together only if it returns the same on all of them.
    """
    # Weights may differ between processes, such as after resuming: those of rank 0 count.
    ranks.copy_from_first(task.model.state_dict().values())
    task.model.train()
    stepper = Stepper(task)

    def report_means(totals: StepReport) -> None:
        # Means over questions and not over forwards, which may have unequal sizes.
        loss, hits, asked = totals.sums
        progress = Progress(
            step=totals.step,
            epoch=totals.step / task.steps_per_epoch,
            loss=loss / asked,
            top1=100 * hits / asked,
            lr=totals.lr,
        )
        report(progress)

    def take_step(step: int) -> Tensor:
        return stepper.step(forwards, step)

    def rate_factor(step: int) -> float:
        epoch = step / task.steps_per_epoch
        return task.schedule.factor(epoch)

    return run_steps(
        take_step,
        optimizer=task.optimizer,
        rate_factor=rate_factor,
        done=done,
        steps=task.steps,
        report_every=report_every,
        report=report_means,
        after_step=after_step,
    )


class Stepper:
    """Takes optimizer steps of a task, and owns the memory of its model's gradients."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._gradients = Gradients(task.model.parameters())
        compute = functools.partial(_forward_backward, task)
        self._compute = Graphed(compute) if task.cuda_graphs else compute

    def step(self, forwards: Iterator[Images], step: int) -> Sums:
        """Takes one step over the next `accumulation` forwards, and returns the sums of these."""
        sums = _no_sums(self.task.device)
        self._gradients.clear()
        forwards_of_step = itertools.islice(forwards, self.task.accumulation)
        for index, images in enumerate(forwards_of_step):
            # Random numbers are drawn outside of `_compute`, which may be a recorded CUDA graph.
            drawn, dropout_mask = _draw(self.task, len(images), step, index)
            sums += self._compute(images, dropout_mask, *drawn)
        # Once a step, after all its backwards.
        self._gradients.average()
        self.task.optimizer.step()
        return sums


def _no_sums(device: torch.device) -> Sums:
    # float64, since sums over many steps would lose digits in float32.
    return torch.zeros(3, dtype=torch.float64, device=device)


def _forward_backward(
    task: Task,
    images: Images,
    dropout_mask: Tensor | None,
    *drawn: Tensor,
) -> Sums:
    """Adds the gradients of a forward to those of the step, and returns the forward's sums."""
    patches = task.make(images, *drawn)
    autocast = torch.autocast(task.device.type, torch.bfloat16, enabled=task.bf16)
    with autocast:
        outputs = task.network(patches, dropout_mask)
    questions = task.model.questions
    truth = questions.truth(*drawn)
    loss = questions.loss(outputs, truth)
    # Gradients of the forwards of a step add up; divided, they are the gradient of the step's mean.
    (loss / task.accumulation).backward()
    # Everything stays on the device: reading a number would make the host wait for the GPU.
    asked = len(images) * questions.n_questions
    mean_loss = loss.detach().double()
    hits_of_images = questions.hits(outputs.detach(), truth)
    hits = hits_of_images.sum().double()
    asked_tensor = torch.full_like(mean_loss, asked)
    return torch.stack([mean_loss * asked, hits, asked_tensor])


def _draw(
    task: Task,
    n_images: int,
    step: int,
    forward_index: int,
) -> tuple[list[Tensor], Tensor | None]:
    """Returns the random numbers for the patches of a forward, and its dropout mask.

    Each ghost batch has a seed of its own, made of the step and its index in the step. So any step
    can be computed again by itself, in forwards of any size and by any number of processes.
    """
    ghost_size = task.model.images_per_batch_norm
    n_ghosts = n_images // ghost_size
    # Ghost batches are counted over all forwards of all ranks, in the order of the images.
    forwards_before = ranks.rank() * task.accumulation + forward_index
    first = forwards_before * n_ghosts
    share = step / task.steps
    generator = torch.Generator(task.device)
    drawn_of_ghosts = []
    masks = []
    for ghost_index in range(first, first + n_ghosts):
        generator.manual_seed(task.seed_of(step, ghost_index))
        drawn_of_ghosts.append(task.draw(ghost_size, generator, share))
        # After the patches' numbers: the order is part of what the seed decides.
        mask = task.model.head.draw_dropout_mask(ghost_size, generator)  # pyright: ignore[reportCallIssue]
        masks.append(mask)
    # Each kind of random numbers becomes one tensor of the forward, image by image.
    kinds = zip(*drawn_of_ghosts, strict=True)
    drawn = [torch.cat(of_ghosts) for of_ghosts in kinds]
    if masks[0] is None:  # a head without dropout
        return drawn, None
    return drawn, torch.cat(masks)
