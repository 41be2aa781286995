"""The training of a run: what feeds it, what is told of it, what keeps it, and what its failures mean."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

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
from relloc.runs import assemble, console, engine
from relloc.runs.engine import Engine
from relloc.runs.folder import RunFolder
from relloc.runs.monitors import Monitors
from relloc.runs.saving import Saver, milestone_steps
from relloc.runs.watching import Monitoring, reporting
from relloc.seeds import Use


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A pretraining put together. `identity` is what it may be resumed with, `about` what its checkpoints tell."""

    config: DictConfig
    how: Engine
    data: Splits
    task: Task
    plan: StepPlan
    identity: dict[str, Any]
    about: dict[str, Any]
    stop: StopRequest


def train_run(run: Run, run_dir: Path, begun: StepsDone, folder: RunFolder | None) -> None:
    """Train from `begun` to the end; only rank 0 has a folder.

    Where it was asked to stop, the process leaves with the signal's exit code, everything saved.
    """
    if begun.step >= run.task.steps:
        return
    unreadable = Unreadable(n_images=len(run.data.train), most_share=run.config.data.unreadable_share)
    done, saved = _train(run, run_dir, begun, folder, unreadable)
    run.stop.listen(awaited=False)
    reasons = ranks.union(unreadable.reasons)
    if folder:
        folder.note_unreadable(reasons)
    if run.stop:  # also in the last step, after which evaluations would come
        if folder:
            kept = "everything is saved" if saved else "no images came to end the next; the last checkpoint is saved"
            console.say(f"{run.stop.name}: stopped after step {done} of {run.task.steps}; {kept}")
            folder.stopped()
        sys.exit(run.stop.exit_code)


def _train(
    run: Run, run_dir: Path, begun: StepsDone, folder: RunFolder | None, unreadable: Unreadable
) -> tuple[int, bool]:
    """Steps done, and whether they are saved."""
    feed, monitoring, saver = _feed(run, begun.step, unreadable), _monitoring(run, folder), _saver(run, run_dir)
    asked = run.config.collapse_steps
    told = reporting(
        run.task,
        run.plan,
        feed,
        first_step=begun.step,
        collapse_steps=max(100, min(2000, run.task.steps // 4)) if asked == "auto" else asked,
        folder=folder,
    )
    last = begun

    def after_step(at: StepsDone) -> bool:
        nonlocal last
        last = at
        if monitoring and not run.stop:
            monitoring.after_step(at.step)
        return saver.after_step(at)

    with _explained(run, run_dir), told as report, engine.training(run.how):
        try:
            steps_done = train(
                run.task,
                iter(feed),
                done=begun,
                report_every=run.config.report_every_steps,
                report=report,
                after_step=after_step,
            )
        except Interrupted as error:
            saved = _save_between_steps(run, saver, feed, last, first_step=begun.step)
            if not isinstance(error, NoImagesCame):
                raise
            if ranks.world_size() > 1:  # the others wait for this one's gradients: there is nothing to agree on
                raise Stopped(run.stop.exit_code) from error
            return last.step, saved
    return steps_done, True


def _save_between_steps(run: Run, saver: Saver, feed: Feed, last: StepsDone, *, first_step: int) -> bool:
    """Save what stands where images fail to come, if that is a whole number of steps; whether it is saved.

    Within a step running statistics of batch norms have moved, and other processes wait for this one.
    """
    whole = feed.taken == (last.step - first_step) * run.task.accumulation
    if whole and last.step > first_step and ranks.world_size() == 1:
        saver.save(last)
    return saver.saved_step == last.step


def _feed(run: Run, first_step: int, unreadable: Unreadable) -> Feed:
    plan, grid = run.plan, assemble.patches(run.config).grid
    sampler = StepSampler(plan, seed=run.config.seed, first_step=first_step, steps=run.task.steps, rank=ranks.rank())
    loaded = load_in_slots(
        Crops(run.data.train, grid, use=Use.CROP, seed=run.config.seed, centered=False),
        sampler,
        workers=run.how.workers,
        pin=run.how.device.type == "cuda",
        images=plan.images_per_batch_norm,
        side_px=grid.span_px,
        held=HELD_FORWARDS * plan.ghosts_per_forward,
        say=console.say,
        stopping=lambda: bool(run.stop),
    )
    return Feed(
        loaded,
        unreadable,
        images_per_batch=plan.images_per_batch_norm,
        batches_per_forward=plan.ghosts_per_forward,
        device=run.how.device,
    )


def _monitoring(run: Run, folder: RunFolder | None) -> Monitoring | None:
    asked = run.config.monitor
    if folder is None or not asked.every_epochs:
        return None
    encode_config = assemble.encode_config(run.config, run.how, told=False)
    monitors = Monitors(
        model=run.task.model,
        patches=assemble.patches(run.config),
        data=run.data,
        reading=dataclasses.replace(encode_config, stopping=lambda: bool(run.stop)),
        view=assemble.view(run.config),
        n_images=asked.images,
        k=asked.k,
        seed=run.config.seed,
        folder=folder.path,
    )
    every_steps = max(1, round(asked.every_epochs * run.plan.steps_per_epoch))
    return Monitoring(
        monitors, every_steps=every_steps, most_share=asked.most_share, folder=folder, device=run.how.device
    )


def _saver(run: Run, run_dir: Path) -> Saver:
    return Saver(
        task=run.task,
        identity=run.identity,
        about=run.about,
        run_dir=run_dir,
        stop=run.stop,
        every_s=run.config.save_every_s,
        milestones=milestone_steps(run.config.milestones, run.task),
    )


@contextlib.contextmanager
def _explained(run: Run, run_dir: Path) -> Iterator[None]:
    """Failures of training itself, with what was saved and what to try."""
    try:
        yield
    except Diverged as error:
        saved = states.saved_trainings(run_dir)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before"
        raise UsageError(
            f"training diverged: {error}. Nothing was saved after that; {last}. Try a lower optimizer.lr, a longer "
            "schedule.warmup_epochs, or precision=fp32, with another hydra.run.dir"
        ) from error
    except torch.OutOfMemoryError as error:
        images, ghost = run.plan.forward_images, run.plan.images_per_batch_norm
        raise UsageError(
            f"the GPU's memory is too small for {images} images at once: give "
            f"images_per_forward={max(images // 2 // ghost, 1) * ghost} or less, a multiple of "
            f"recipe.images_per_batch_norm={ghost} (the results stay the same)"
        ) from error
