"""Connects data, logging, monitors, checkpoints and error messages to the training loop."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from relloc import ranks
from relloc.checkpoints import states
from relloc.data.crops import Crops
from relloc.data.image_set import Splits
from relloc.data.loader import Unreadable
from relloc.data.order import StepPlan, StepSampler
from relloc.data.readers import NoImagesCame
from relloc.data.slots import load_in_slots
from relloc.errors import Interrupted, UsageError
from relloc.optimization import StepsDone
from relloc.pretext.alarm import Diverged
from relloc.pretext.feed import HELD_FORWARDS, Feed
from relloc.pretext.loop import Task, train
from relloc.pretext.stopping import Stopped, StopRequest
from relloc.runs import console
from relloc.runs import engine as engines
from relloc.runs.build import Pretraining
from relloc.runs.engine import Engine
from relloc.runs.folder import RunFolder
from relloc.runs.monitors import Monitors
from relloc.runs.saving import Saver
from relloc.runs.watching import Monitoring, reporting
from relloc.seeds import Use
from relloc.status import Status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """All that a training needs. `identity` is what it may be resumed with, `milestones` the steps that are kept."""

    settings: Pretraining
    engine: Engine
    data: Splits
    task: Task
    plan: StepPlan
    identity: Mapping[str, Any]
    milestones: Mapping[int, str]
    run_dir: Path
    stop: StopRequest


def train_to_the_end(training: Training, begun: StepsDone, folder: RunFolder | None) -> None:
    """Train from `begun` on; only rank 0 has a folder.

    Where it was asked to stop, the process leaves with the signal's exit code, everything saved.
    """
    task, stop = training.task, training.stop
    if begun.step >= task.steps:
        return
    unreadable = Unreadable(
        n_images=len(training.data.train), most_share=training.settings.data.unreadable_share
    )
    done, is_saved = _train(training, begun, folder, unreadable)
    stop.listen(awaited=False)
    reasons = ranks.union(unreadable.reasons)
    if folder:
        folder.unreadable |= reasons
    if stop:  # also in the last step, after which evaluations would come
        if folder:
            kept = (
                "everything is saved"
                if is_saved
                else "no images came to end the next; the last checkpoint is saved"
            )
            console.say(f"{stop.name}: stopped after step {done} of {task.steps}; {kept}")
            folder.status = Status.STOPPED
        sys.exit(stop.exit_code)


def _train(
    training: Training, begun: StepsDone, folder: RunFolder | None, unreadable: Unreadable
) -> tuple[int, bool]:
    """Steps done, and whether they are saved."""
    settings, task, stop = training.settings, training.task, training.stop
    feed = _feed(training, begun.step, unreadable)
    monitoring = _monitoring(training, folder) if folder and settings.monitor.every_epochs else None
    saver = Saver(
        task=task,
        identity=training.identity,
        about=settings.about,
        run_dir=training.run_dir,
        stop=stop,
        every_s=settings.save_every_s,
        milestones=training.milestones,
    )
    reports = reporting(
        task,
        training.plan,
        feed,
        first_step=begun.step,
        collapse_steps=settings.collapse_steps or max(100, min(2000, task.steps // 4)),
        folder=folder,
    )
    last = begun

    def after_step(done: StepsDone) -> bool:
        nonlocal last
        last = done
        if monitoring and not stop:
            monitoring.after_step(done.step)
        return saver.after_step(done)

    with _explained(training), reports as report, engines.training(training.engine):
        try:
            steps = train(
                task,
                iter(feed),
                done=begun,
                report_every=settings.report_every_steps,
                report=report,
                after_step=after_step,
            )
        except Interrupted as error:
            # Images fail to come. Within a step running statistics of batch norms have moved, and other processes
            # wait for this one: what stands is saved where it is a whole number of steps of one process.
            is_whole = feed.taken == (last.step - begun.step) * task.accumulation
            if is_whole and last.step > begun.step and ranks.world_size() == 1:
                saver.save(last)
            if not isinstance(error, NoImagesCame):
                raise
            if (
                ranks.world_size() > 1
            ):  # the others wait for this one's gradients: there is nothing to agree on
                raise Stopped(stop.exit_code) from error
            return last.step, saver.saved_step == last.step
    return steps, True


def _feed(training: Training, first_step: int, unreadable: Unreadable) -> Feed:
    plan, seed, on = training.plan, training.settings.seed, training.engine.device
    grid = training.settings.patches.grid
    loaded = load_in_slots(
        Crops(training.data.train, grid, use=Use.CROP, seed=seed, centered=False),
        StepSampler(
            plan, seed=seed, first_step=first_step, steps=training.task.steps, rank=ranks.rank()
        ),
        workers=training.engine.workers,
        pin=on.type == "cuda",
        images=plan.images_per_batch_norm,
        side_px=grid.span_px,
        held=HELD_FORWARDS * plan.ghosts_per_forward,
        say=console.say,
        stopping=lambda: bool(training.stop),
    )
    return Feed(
        loaded,
        unreadable,
        images_per_batch=plan.images_per_batch_norm,
        batches_per_forward=plan.ghosts_per_forward,
        device=on,
    )


def _monitoring(training: Training, folder: RunFolder) -> Monitoring:
    settings, engine, asked = training.settings, training.engine, training.settings.monitor
    reading = settings.encode_config(engine, shown=False)
    monitors = Monitors(
        model=training.task.model,
        patches=settings.patches,
        data=training.data,
        reading=dataclasses.replace(reading, stopping=lambda: bool(training.stop)),
        view=settings.view,
        n_images=asked.images,
        k=asked.k,
        seed=settings.seed,
        folder=folder.path,
    )
    every_steps = max(1, round((asked.every_epochs or 0) * training.plan.steps_per_epoch))
    return Monitoring(
        monitors,
        every_steps=every_steps,
        most_share=asked.most_share,
        folder=folder,
        device=engine.device,
    )


@contextlib.contextmanager
def _explained(training: Training) -> Iterator[None]:
    """Failures of training itself, with what was saved and what to try."""
    try:
        yield
    except Diverged as error:
        saved = states.saved_trainings(training.run_dir)
        last = (
            f"the last good checkpoint is {saved[-1]}"
            if saved
            else "no checkpoint was saved before"
        )
        raise UsageError(
            f"training diverged: {error}. Nothing was saved after that; {last}. Try a lower optimizer.lr, a longer "
            "schedule.warmup_epochs, or precision=fp32, with another hydra.run.dir"
        ) from error
    except torch.OutOfMemoryError as error:
        images, ghost = training.plan.forward_images, training.plan.images_per_batch_norm
        raise UsageError(
            f"the GPU's memory is too small for {images} images at once: give "
            f"images_per_forward={max(images // 2 // ghost, 1) * ghost} or less, a multiple of "
            f"recipe.images_per_batch_norm={ghost} (the results stay the same)"
        ) from error
