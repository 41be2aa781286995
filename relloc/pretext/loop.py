"""The training loop, plain: steps in order, each a function of its number and the seed."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relloc import ranks
from relloc.pretext import objective
from relloc.pretext.schedule import Schedule

Images = Tensor  # uint8 (b 3 s s)
PAIRS = 8


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
    """What is trained, on what; the same for every step."""

    model: objective.RelativeLocation
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    patches: Callable[[Images, torch.Generator], Tensor]
    steps_per_epoch: int
    accumulation: int
    seed_of: Callable[..., int]
    device: torch.device
    bf16: bool

    @property
    def steps(self) -> int:
        """Length of the run in optimizer steps."""
        return max(1, round(self.schedule.epochs * self.steps_per_epoch))


def train(
    task: Task,
    batches: Iterable[Images],
    *,
    first_step: int,
    report_every: int,
    report: Callable[[Progress], None],
    after_step: Callable[[int], bool],
) -> int:
    """Run steps `first_step` to the end, or until `after_step(done)` returns True; steps done.

    `batches` are this process's images, forward by forward; `report` gets the means since the
    last report (every `report_every` steps and at the end). Ranks stop together only if
    `after_step` answers alike on all of them.
    """
    model = _spread(task)
    model.train()
    base_rates = [group["initial_lr"] for group in _with_initial_rates(task.optimizer)]
    forwards = iter(batches)
    tally = torch.zeros(3, dtype=torch.float64, device=task.device)  # loss x pairs, hits, pairs
    for step in range(first_step, task.steps):
        lr = _set_rate(task, base_rates, step)
        tally += _step(task, model, itertools.islice(forwards, task.accumulation), step)
        stop = after_step(step + 1)
        if stop or (step + 1) % report_every == 0 or step + 1 == task.steps:
            report(_means(ranks.total(tally), step + 1, task, lr))
            tally = torch.zeros_like(tally)
        if stop:
            return step + 1
    return task.steps


def _spread(task: Task) -> nn.Module:
    if ranks.world_size() == 1:
        return task.model
    devices = [task.device] if task.device.type == "cuda" else None
    return DistributedDataParallel(task.model, device_ids=devices)


def _with_initial_rates(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer.param_groups


def _set_rate(task: Task, base_rates: list[float], step: int) -> float:
    factor = task.schedule.factor(step / task.steps_per_epoch)
    for group, rate in zip(task.optimizer.param_groups, base_rates, strict=True):
        group["lr"] = rate * factor
    return base_rates[0] * factor


def _step(task: Task, model: nn.Module, forwards: Iterator[Images], step: int) -> Tensor:
    """One optimizer step over `accumulation` forwards; its loss x pairs, hits and pairs."""
    tally = torch.zeros(3, dtype=torch.float64, device=task.device)
    task.optimizer.zero_grad(set_to_none=True)
    for number, images in enumerate(forwards):
        with _unsynchronized(model, number < task.accumulation - 1):
            logits = _logits(task, model, images, step, number)
            loss = objective.loss(logits)
            (loss / task.accumulation).backward()
        pairs = logits.shape[0] * PAIRS
        hits = objective.hits(logits.detach()).sum()
        tally += torch.stack([loss.detach().double() * pairs, hits.double(), hits.new_tensor(pairs).double()])
    task.optimizer.step()
    return tally


def _logits(task: Task, model: nn.Module, images: Images, step: int, number: int) -> Tensor:
    # Keyed by the forward's place in the step, not carried along: any step can be computed again
    # alone, and processes draw what one process that accumulates would. Dropout reads the global
    # generator, so that is keyed as well.
    seed = task.seed_of(step, number * ranks.world_size() + ranks.rank())
    torch.manual_seed(seed)
    generator = torch.Generator(task.device).manual_seed(seed)
    patches = task.patches(images.to(task.device, non_blocking=True), generator)
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.bf16):
        return model(patches)


def _unsynchronized(model: nn.Module, more_to_come: bool) -> contextlib.AbstractContextManager[None]:
    if more_to_come and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _means(tally: Tensor, step: int, task: Task, lr: float) -> Progress:
    loss, hits, pairs = tally.tolist()
    return Progress(step=step, epoch=step / task.steps_per_epoch, loss=loss / pairs, top1=100 * hits / pairs, lr=lr)
