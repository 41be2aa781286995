"""Connects data, logging, monitors, checkpoints and error messages to the training loop.

The loop itself, which knows nothing of these, is `relloc.pretext.loop.train`.
"""

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
from relloc.data.device_decoding import load_to_device
from relloc.data.image_set import Splits
from relloc.data.loader import Unreadable
from relloc.data.order import StepPlan, StepSampler, joined
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
from relloc.runs.command_settings import Pretraining
from relloc.runs.engine import Engine
from relloc.runs.folder import RunFolder
from relloc.runs.monitors import Monitors
from relloc.runs.saving import Saver
from relloc.runs.watching import Monitoring, reporting
from relloc.seeds import Use
from relloc.status import Status
from relloc.terminal import quantity

_DECODED_AT_ONCE = 512  # images at most, since up to four batches are in a GPU's memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that pretraining works with, built from the settings.

    Args:
        identity: the settings that decide the weights; a checkpoint is resumed only with the same.
        milestones: steps whose checkpoints are kept for good, with the name of each.
        stop: tells whether a signal asked the run to stop.
    """

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
    """Trains from step `begun` to the last one.

    Only rank 0 has a folder; the other ranks give None. After a signal everything is saved and the
    process exits with the signal's exit code.

    Raises:
        UsageError: the loss diverged, or the GPU's memory is too small.
        DataError: too many images can't be read.
    """
    task, stop = training.task, training.stop
    if begun.step >= task.steps:
        return
    unreadable = Unreadable(
        n_images=len(training.data.train), most_share=training.settings.data.unreadable_share
    )
    done, is_saved = _train(training, begun, folder, unreadable)
    # Nothing waits to be saved any more: from here on a signal ends the process at once.
    stop.listen(awaited=False)
    # Each process knows only of the images that it has read.
    reasons = ranks.union(unreadable.reasons)
    if folder:
        folder.unreadable |= reasons
    # This holds for the last step too: a run that was asked to stop begins no evaluation.
    if stop:
        if folder:
            saved = "everything is saved"
            if not is_saved:
                saved = "no images came to end the next; the last checkpoint is saved"
            console.print_message(
                f"{stop.name}: stopped after step {done} of {task.steps}; {saved}"
            )
            folder.status = Status.STOPPED
        sys.exit(stop.exit_code)


def _train(
    training: Training, begun: StepsDone, folder: RunFolder | None, unreadable: Unreadable
) -> tuple[int, bool]:
    """Runs the training loop. Returns the number of steps done, and whether they are saved."""
    settings = training.settings
    task = training.task
    stop = training.stop
    feed = _feed(training, begun.step, unreadable)
    monitoring = None
    if folder and settings.monitor.every_epochs:
        monitoring = _monitoring(training, folder)
    saver = Saver(
        task=task,
        identity=training.identity,
        about=settings.about,
        run_dir=training.run_dir,
        stop=stop,
        every_s=settings.save_every_s,
        milestones=training.milestones,
    )
    # After so many steps at chance the alarm warns that the network has collapsed. In a short run
    # that is a quarter of its length, so that the warning can come before its end.
    collapse_steps = settings.collapse_steps or max(100, min(2000, task.steps // 4))

    def paused_s() -> float:
        return saver.spent_s + (monitoring.spent_s if monitoring else 0)

    reports = reporting(
        task,
        training.plan,
        feed,
        first_step=begun.step,
        collapse_steps=collapse_steps,
        folder=folder,
        paused_s=paused_s,
    )
    # The last whole step, which is what can be saved if the next one fails.
    last = begun

    def after_step(done: StepsDone) -> bool:
        nonlocal last
        last = done
        # A signal leaves little time: saving comes before monitors.
        if monitoring and not stop:
            monitoring.after_step(done.step)
        return saver.after_step(done)

    with _explained_failures(training), reports as report, engines.training(training.engine):
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
            # The loader gave no more images. In the middle of a step the running statistics of
            # batch norm have already moved, and saving takes all processes, which wait for this
            # one. So the state is saved only between two steps of a single process.
            steps_done = last.step - begun.step
            is_between_steps = feed.taken == steps_done * task.accumulation
            if is_between_steps and steps_done > 0 and ranks.world_size() == 1:
                saver.save(last)
            if not isinstance(error, NoImagesCame):
                raise
            # `NoImagesCame` follows a signal. Of several processes the others wait for this one's
            # gradients, so that no common last step can be agreed on: it exits by itself.
            if ranks.world_size() > 1:
                raise Stopped(stop.exit_code) from error
            return last.step, saver.saved_step == last.step
    return steps, True


def _feed(training: Training, first_step: int, unreadable: Unreadable) -> Feed:
    """Returns the images of each forward, from step `first_step` on, on the device."""
    plan = training.plan
    seed = training.settings.seed
    device = training.engine.device
    grid = training.settings.training_patches.grid
    flip = training.settings.flip
    crops = Crops(training.data.train, grid, use=Use.CROP, seed=seed, centered=False, flip=flip)
    # The order of images follows from the seed and the step alone: a resumed run sees the same.
    sampler = StepSampler(
        plan, seed=seed, first_step=first_step, steps=training.task.steps, rank=ranks.rank()
    )
    images_per_batch = plan.images_per_batch_norm
    batches_per_forward = plan.ghosts_per_forward
    if training.settings.decode == "device":
        at_once = _ghosts_decoded_at_once(plan)
        images_per_batch *= at_once
        batches_per_forward //= at_once
        loaded = load_to_device(
            crops,
            joined(sampler, at_once),
            workers=training.engine.workers,
            device=device,
            print_message=console.print_message,
            stopping=lambda: bool(training.stop),
        )
    else:
        # Loader processes write into slots, parts of shared memory that are used again and again.
        # As many are held back as there are batches in forwards that the device has not finished.
        loaded = load_in_slots(
            crops,
            sampler,
            workers=training.engine.workers,
            pin=device.type == "cuda",
            images=plan.images_per_batch_norm,
            side_px=grid.span_px,
            batches_held=HELD_FORWARDS * plan.ghosts_per_forward,
            print_message=console.print_message,
            stopping=lambda: bool(training.stop),
        )
    return Feed(
        loaded,
        unreadable,
        images_per_batch=images_per_batch,
        batches_per_forward=batches_per_forward,
        device=device,
    )


def _ghosts_decoded_at_once(plan: StepPlan) -> int:
    """Returns how many ghost batches of a forward the device decodes together.

    Each batch takes the process that feeds the device some milliseconds, however small it is.
    """
    n_ghosts = plan.ghosts_per_forward
    most = max(1, _DECODED_AT_ONCE // plan.images_per_batch_norm)
    return max(n for n in range(1, n_ghosts + 1) if n_ghosts % n == 0 and n <= most)


def _monitoring(training: Training, folder: RunFolder) -> Monitoring:
    """Returns what measures the monitors, every so many steps."""
    settings = training.settings
    engine = training.engine
    monitor = settings.monitor
    # Shows no progress bar, and gives up loading when a signal asks the run to stop.
    config = dataclasses.replace(
        settings.encode_config(engine, shown=False), stopping=lambda: bool(training.stop)
    )
    monitors = Monitors(
        model=training.task.model,
        patches=settings.patches,
        data=training.data,
        config=config,
        view=settings.view,
        n_images=monitor.images,
        k=monitor.k,
        seed=settings.seed,
        folder=folder.path,
    )
    every_epochs = monitor.every_epochs or 0
    every_steps = max(1, round(every_epochs * training.plan.steps_per_epoch))
    return Monitoring(
        monitors,
        every_steps=every_steps,
        most_share=monitor.most_share,
        folder=folder,
        device=engine.device,
    )


@contextlib.contextmanager
def _explained_failures(training: Training) -> Iterator[None]:
    """Turns failures of training into messages that say what was saved and what to try.

    Raises:
        UsageError: the loss diverged, or the GPU's memory is too small.
    """
    try:
        yield
    except Diverged as error:
        checkpoints = states.saved_trainings(training.run_dir)
        last_good = "no checkpoint was saved before"
        if checkpoints:
            last_good = f"the last good checkpoint is {checkpoints[-1]}"
        raise UsageError(
            f"training diverged: {error}. Nothing was saved after that; {last_good}. Try a lower "
            "optimizer.lr, a longer schedule.warmup_epochs, or precision=fp32, with another "
            "hydra.run.dir"
        ) from error
    except torch.OutOfMemoryError as error:
        images = training.plan.forward_images
        ghost = training.plan.images_per_batch_norm
        # Half as many, in whole ghost batches.
        fewer = max(images // 2 // ghost, 1) * ghost
        raise UsageError(
            f"the GPU's memory is too small for {quantity(images, 'image')} at once: give "
            f"images_per_forward={fewer} or less, a multiple of "
            f"recipe.images_per_batch_norm={ghost} (the results stay the same)"
        ) from error
