"""Pretraining from start to end, in the order of this file: prepare, train, ask held-out images, evaluate."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from relloc import checkpoints, ranks
from relloc.data.crops import Crops
from relloc.data.image_set import Splits
from relloc.data.loader import Batch, Unreadable, collate, load
from relloc.data.order import StepPlan, StepSampler, key
from relloc.errors import DataError, UsageError
from relloc.evals.run import Subject
from relloc.patches.picture import draw_patches
from relloc.pretext.held_out import accuracy, count_hits
from relloc.pretext.loop import Progress, Task, train
from relloc.pretext.stopping import StopRequest, stop_request
from relloc.results import Result, append_results, read_results
from relloc.runs import assemble, console
from relloc.runs.evaluating import evaluate_subjects
from relloc.runs.folder import RunFolder, open_folder
from relloc.tracking import Journal

PICTURE = "patches.png"
_PICTURED = 6


def pretrain(config: DictConfig) -> None:
    """Pretrain, or go on with what the run folder holds, then run the evaluations that `eval` names."""
    device = assemble.device(config)
    _make_what_needs_no_data(config, device)
    ranks.join(device)
    try:
        data = assemble.splits(config)
        task, plan = _task(config, data, device)
        run_dir = assemble.run_dir()
        identity = assemble.computed(config) | {"training images": data.train.digest()}
        first_step = _resume(identity, task, run_dir)  # before anything is written there
        if ranks.rank() > 0:
            _train(config, data, task, plan, run_dir, identity, first_step, None)
            return
        record = assemble.record(config, assemble.short_name(config), data, device, run_dir)
        with open_folder(config, record, run_dir) as folder:
            _draw(config, data, task, folder)
            _train(config, data, task, plan, run_dir, identity, first_step, folder)
            ranks.leave()
            _finish(config, data, task, folder)
    finally:
        ranks.leave()


def _make_what_needs_no_data(config: DictConfig, device: torch.device) -> None:
    """A wrong setting is told now, not after a data set was listed or 70 epochs were trained."""
    for name in ("data.images_per_step", "data.images_per_forward", "report_every_steps"):
        assemble.whole(name, OmegaConf.select(config, name), at_least=1)
    assemble.patches(config)
    assemble.pretext_model(config)
    assemble.call(config.schedule)
    assemble.evaluations(config)
    assemble.terms(config, device)


def _task(config: DictConfig, data: Splits, device: torch.device) -> tuple[Task, StepPlan]:
    plan = StepPlan(
        n_images=len(data.train),
        images_per_step=config.data.images_per_step,
        images_per_forward=config.data.images_per_forward,
        world=ranks.world_size(),
    )
    model = assemble.pretext_model(config).to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - an overload torch lacks
    task = Task(
        model=model,
        optimizer=assemble.call(config.optimizer, model=model),
        schedule=assemble.call(config.schedule),
        patches=assemble.patches(config),
        steps_per_epoch=plan.steps_per_epoch,
        accumulation=plan.accumulation,
        seed_of=lambda step, forward: key(config.seed, step, forward),
        device=device,
        bf16=assemble.bf16(config, device),
    )
    return task, plan


def _draw(config: DictConfig, data: Splits, task: Task, folder: RunFolder) -> None:
    pipeline = assemble.patches(config)
    crops = Crops(data.train, pipeline.grid, centered=False)
    chosen = range(0, len(data.train), max(1, len(data.train) // _PICTURED))
    images = collate([crops[index, key(config.seed, index)] for index in chosen[:_PICTURED]]).pixels
    draw_patches(images, pipeline, folder.path / PICTURE, seed=config.seed)
    folder.keep(PICTURE)
    console.say(f"picture {folder.path / PICTURE}")


def _train(
    config: DictConfig,
    data: Splits,
    task: Task,
    plan: StepPlan,
    run_dir: Path,
    identity: dict[str, Any],
    first_step: int,
    folder: RunFolder | None,
) -> None:
    """Train from `first_step` to the end, or until asked to stop; only rank 0 has a folder."""
    if first_step >= task.steps:
        return
    grid = assemble.patches(config).grid
    sampler = StepSampler(plan, seed=config.seed, first_step=first_step, steps=task.steps, rank=ranks.rank())
    crops = Crops(data.train, grid, centered=False)
    loaded = load(crops, sampler, workers=assemble.workers(config, task.device), pin=task.device.type == "cuda")
    unreadable = Unreadable(n_images=len(data.train), most_share=config.data.unreadable_share)
    with stop_request() as stop, _reporting(task, plan, first_step, folder) as report:
        saver = _Saver(config, identity, task, run_dir, stop)
        done = train(
            task,
            _pixels(loaded, unreadable),
            first_step=first_step,
            report_every=config.report_every_steps,
            report=report,
            after_step=saver.after_step,
        )
    reasons = ranks.union(unreadable.reasons)
    if folder:
        folder.note_unreadable(reasons)
    if done < task.steps:
        if folder:
            console.say(f"stopped after step {done} of {task.steps}; everything is saved")
            folder.stopped()
        sys.exit(stop.exit_code)


def _pixels(loaded: Iterable[Batch], unreadable: Unreadable) -> Iterator[torch.Tensor]:
    for crops in loaded:
        unreadable.add(crops.unreadable)
        if not len(crops.pixels):
            first, reason = next(iter(crops.unreadable.items()))
            raise DataError(f"no image of a whole batch can be used; the first is {first}: {reason}")
        yield crops.pixels


def _noting(loaded: Iterable[Batch], indices: list[int]) -> Iterator[Batch]:
    for crops in loaded:
        indices += crops.indices.tolist()
        yield crops


def _resume(identity: dict[str, Any], task: Task, run_dir: Path) -> int:
    """Put the newest checkpoint of the run folder into `task`; its step, 0 if there is none."""
    saved = checkpoints.saved_trainings(run_dir)
    if not saved:
        return 0
    state = checkpoints.load_training(saved[-1])
    changed = _changed(state["identity"], identity)
    if changed:
        raise UsageError(
            f"{run_dir} holds a run with other settings: {changed}. "
            "Give another hydra.run.dir, or the run's own settings"
        )
    task.model.load_state_dict(state["model"])
    task.optimizer.load_state_dict(state["optimizer"])
    if ranks.rank() == 0:
        console.say(f"resume  {saved[-1]} after step {state['step']} of {task.steps}")
    return state["step"]


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)


class _Saver:
    """Saves every `save_every_s` seconds, at the end, and when asked to stop."""

    def __init__(
        self, config: DictConfig, identity: dict[str, Any], task: Task, run_dir: Path, stop: StopRequest
    ) -> None:
        self.config = config
        self.identity = identity
        self.task = task
        self.run_dir = run_dir
        self.stop = stop
        self.last = time.monotonic()

    def after_step(self, done: int) -> bool:
        stopping = self._anyone_stops()
        due = time.monotonic() - self.last > self.config.save_every_s
        if ranks.rank() == 0 and (stopping or due or done == self.task.steps):
            self._save(done)
            self.last = time.monotonic()
        return stopping

    def _anyone_stops(self) -> bool:
        if ranks.world_size() == 1:
            return bool(self.stop)
        asked = torch.tensor([self.stop.signal or 0], device=self.task.device)
        highest = int(ranks.total(asked).item())
        if highest and not self.stop:
            self.stop.signal = highest
        return bool(highest)

    def _save(self, done: int) -> None:
        state = {
            "model": self.task.model.state_dict(),
            "optimizer": self.task.optimizer.state_dict(),
            "identity": self.identity,
            "about": about(self.config, done),
        }
        checkpoints.save_training(self.run_dir, state, done)


def about(config: DictConfig, step: int) -> dict[str, Any]:
    """What a backbone file tells of itself: enough to build it, and how it came to be."""
    return {"model": assemble.plain(config.model), "step": step, "computed": assemble.computed(config)}


@contextlib.contextmanager
def _reporting(task: Task, plan: StepPlan, first_step: int, folder: RunFolder | None) -> Iterator:
    if folder is None:
        yield lambda progress: None
        return
    journal = Journal(folder.path)
    clock = [time.monotonic(), first_step]
    with console.progress_bar("pretrain", task.steps, first_step) as bar:

        def report(progress: Progress) -> None:
            now = time.monotonic()
            rate = (progress.step - clock[1]) * plan.images_per_step / (now - clock[0])
            clock[:] = [now, progress.step]
            journal.log(
                {
                    "train/loss": progress.loss,
                    "train/top1": progress.top1,
                    "train/lr": progress.lr,
                    "train/epoch": progress.epoch,
                    "speed/images_per_s": rate,
                },
                progress.step,
            )
            bar(progress.step, f"loss {progress.loss:.3f}  top-1 {progress.top1:.1f} %  {rate:.0f} images/s")

        yield report


def _finish(config: DictConfig, data: Splits, task: Task, folder: RunFolder) -> None:
    weights = folder.path / checkpoints.BACKBONE_FILE
    if not weights.exists():
        checkpoints.save_backbone(weights, task.model.backbone, about(config, task.steps))
    folder.keep(checkpoints.BACKBONE_FILE)
    if not any(row.eval == "pretext" for row in read_results(folder.path)):
        append_results(folder.path, [_held_out(config, data, task, folder)])
    evaluations = assemble.evaluations(config)
    if evaluations and not data.labeled:
        console.say(
            f"eval    skipped: {data.train.name} has no labels; on labeled data: "
            f"python -m relloc.evaluate checkpoint={folder.path} data=…"
        )
    elif evaluations:
        torch.manual_seed(config.seed)
        untrained = assemble.backbone(config.model).to(task.device)
        subjects = [
            Subject(backbone=task.model.backbone, checkpoint=str(weights), model=config.model.name),
            Subject(backbone=untrained, checkpoint="random", model=config.model.name),
        ]
        evaluate_subjects(subjects, data, evaluations, assemble.terms(config, task.device), folder)
    folder.summarize()


def _held_out(config: DictConfig, data: Splits, task: Task, folder: RunFolder) -> Result:
    crops = Crops(data.held_out, assemble.patches(config).grid, centered=True)
    size = config.data.images_per_forward
    places = [(index, key(config.seed, index)) for index in range(len(data.held_out))]
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    loaded = load(crops, batches, workers=assemble.workers(config, task.device), pin=task.device.type == "cuda")
    unreadable = Unreadable(n_images=len(crops), most_share=config.data.unreadable_share)
    asked: list[int] = []
    shown = console.counted(loaded, "held-out pretext", len(batches))
    pixels = _pixels(_noting(shown, asked), unreadable)
    hits = count_hits(task.model, pixels, task.patches, seed=config.seed, device=task.device, bf16=task.bf16)
    folder.note_unreadable(unreadable.reasons)
    sources = [data.held_out.source(index) for index in asked]
    found = accuracy(hits, sources)
    return Result(
        eval="pretext",
        dataset=data.held_out.name,
        split=data.held_out.split,
        layer="avgpool",
        metric="top1",
        value=found.percent,
        low=found.low,
        high=found.high,
        n=found.n_pairs,
        seed=config.seed,
        protocol="1.1 center crop, eight pairs with the center, jitter and colors as in training; "
        "interval: t over sources",
        checkpoint=str(folder.path / checkpoints.BACKBONE_FILE),
        model=config.model.name,
    )
