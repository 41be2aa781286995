"""Pretraining from start to end, in the order of this file: prepare, train, ask held-out images, evaluate."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from relloc import backbone_files, ranks
from relloc.data.crops import Crops
from relloc.data.image_set import Splits
from relloc.data.loader import Batch, Unreadable, collate, load
from relloc.data.order import StepPlan, key
from relloc.data.shards import read_manifest
from relloc.errors import UsageError
from relloc.evals.contract import Job, Subject
from relloc.models.backbone import Backbone
from relloc.patches.picture import draw_patches
from relloc.pretext.held_out import accuracy, answers, count_hits
from relloc.pretext.loop import Task
from relloc.pretext.stopping import stop_request
from relloc.results import Result, append_results, read_results
from relloc.runs import assemble, console, engine, saving
from relloc.runs.engine import Engine
from relloc.runs.evaluating import evaluate_subject
from relloc.runs.folder import RunFolder, open_folder
from relloc.runs.training import Run, full_batches, train_run

PICTURE = "patches.png"
_PICTURED = 6
_MOST_FORWARD_IMAGES = 512  # what 80 GB hold of a compiled ResNet-50 at 96 px twice over


def pretrain(config: DictConfig) -> None:
    """Pretrain, or go on with what the run folder holds, then run the evaluations that `eval` names."""
    how = engine.settle(config)
    _make_what_needs_no_data(config, how)
    ranks.join(how.device)
    with contextlib.ExitStack() as at_end:
        at_end.callback(ranks.leave)
        stop = at_end.enter_context(stop_request())
        data = assemble.splits(config.data)
        jobs = assemble.jobs(config, data)  # also what only they need is found, or missed, before training
        _tell_small_shards(config)
        task, plan = _task(config, data, how)
        run_dir = assemble.run_dir()
        identity = assemble.computed(config) | {
            "precision": how.precision,  # what auto became
            "training images": data.train.digest(),
        }
        standing = saving.resume(identity, task, run_dir)  # before anything is written there
        run = Run(
            config=config, how=how, data=data, task=task, plan=plan, identity=identity, about=about(config), stop=stop
        )
        if ranks.rank() > 0:
            train_run(run, run_dir, standing, None)
            return
        used = [data, *(job.splits for job in jobs)]
        record = assemble.record(config, assemble.short_name(config), used, how, run_dir)
        with open_folder(config, record, run_dir) as folder:
            console.say(f"engine  {how}; {plan.forward_images} images a forward")
            _draw(config, data, folder)
            train_run(run, run_dir, standing, folder)
            ranks.leave()
            _finish(run, jobs, folder)
        _say_next(run_dir, data)


def _say_next(run_dir: Path, data: Splits) -> None:
    """An evaluation with recalibrated batch norm as well, or, without labels, one that needs none."""
    run = console.from_here(run_dir)
    if data.labeled:
        console.say_next("evaluate", checkpoint=[run, "random"])
    else:
        console.say_next("evaluate", checkpoint=run, eval="label_free")


def _make_what_needs_no_data(config: DictConfig, how: Engine) -> None:
    """A wrong setting is told now, not after a data set was listed or 70 epochs were trained."""
    if "checkpoint" in config:
        raise UsageError("this experiment evaluates checkpoints: run it with python -m relloc.evaluate")
    assemble.check_numbers(config)
    assemble.check_roots(config)
    if config.collapse_steps != "auto":
        engine.whole("collapse_steps", config.collapse_steps, at_least=1)
    assemble.patches(config)
    assemble.pretext_model(config)
    assemble.call(config.schedule)
    assemble.evaluations(config)
    assemble.view(config)
    assemble.terms(config, how)


def _tell_small_shards(config: DictConfig) -> None:
    grid = assemble.patches(config).grid
    if ranks.rank() > 0 or not config.data.get("shards") or grid.resize is None:
        return
    manifest, wanted = read_manifest(Path(config.data.shards)), grid.resize.longest_short_side()
    packed = manifest["packed"]["short_px"]
    if packed < wanted and manifest["train"]["stored"]["reduced"]:
        console.say(
            f"shards  were reduced to a short side of {packed} px, and this grid enlarges them to up to {wanted} px: "
            f"pack them with short_px={wanted}"
        )


def _task(config: DictConfig, data: Splits, how: Engine) -> tuple[Task, StepPlan]:
    plan = StepPlan(
        n_images=len(data.train),
        images_per_step=config.data.images_per_step,
        images_per_batch_norm=config.data.images_per_batch_norm,
        images_per_forward=_images_per_forward(config, how),
        world=ranks.world_size(),
    )
    task = assemble.task(config, how, steps_per_epoch=plan.steps_per_epoch, accumulation=plan.accumulation)
    saving.milestone_steps(config.milestones, task)
    return task, plan


def _images_per_forward(config: DictConfig, how: Engine) -> int:
    """As asked; else one ghost batch, or compiled as many as divide a process's share of the step, up to 512."""
    if config.images_per_forward != "auto":
        return engine.whole("images_per_forward", config.images_per_forward, at_least=1)
    ghost, share = config.data.images_per_batch_norm, config.data.images_per_step // ranks.world_size()
    if not how.compiled:
        return ghost
    fitting = range(ghost, min(share, _MOST_FORWARD_IMAGES) + 1, ghost)
    return max((images for images in fitting if share % images == 0), default=ghost)


def _draw(config: DictConfig, data: Splits, folder: RunFolder) -> None:
    pipeline = assemble.patches(config)
    crops = Crops(data.train, pipeline.grid, centered=False)
    chosen = range(0, len(data.train), max(1, len(data.train) // _PICTURED))
    images = collate([crops[index, key(config.seed, index)] for index in chosen[:_PICTURED]]).pixels
    draw_patches(images, pipeline, folder.path / PICTURE, seed=config.seed)
    folder.keep(PICTURE)
    console.say(f"picture {folder.path / PICTURE}")


def _noting(loaded: Iterable[Batch], indices: list[int]) -> Iterator[Batch]:
    for crops in loaded:
        indices += crops.indices.tolist()
        yield crops


def about(config: DictConfig) -> dict[str, Any]:
    """What a backbone file tells of itself: enough to build it, and how it came to be."""
    return {"model": assemble.plain(config.model), "computed": assemble.computed(config)}


def _finish(run: Run, jobs: Sequence[Job], folder: RunFolder) -> None:
    config, how, data, task = run.config, run.how, run.data, run.task
    weights = folder.path / backbone_files.BACKBONE_FILE
    if not weights.exists():
        backbone_files.save_backbone(weights, task.model.backbone, about(config) | {"step": task.steps})
    folder.keep(backbone_files.BACKBONE_FILE)
    if not any(row.eval == "pretext" for row in read_results(folder.path)):
        append_results(folder.path, [_held_out(config, how, data, task, folder)])
    unlabeled = [job.name for job in jobs if job.evaluation.labels == "class" and not job.splits.labeled]
    if unlabeled:
        console.say(
            f"eval    {', '.join(unlabeled)} skipped: {data.train.name} has no labels; on labeled data: "
            f"python -m relloc.evaluate checkpoint={folder.path} data=…"
        )
        jobs = [job for job in jobs if job.name not in unlabeled]
    if jobs:
        trained, untrained = (_plain_backbone(config, how) for _ in range(2))
        trained.load_state_dict(task.model.backbone.state_dict())
        subjects = [
            Subject(
                backbone=backbone,
                checkpoint=name,
                model=config.model.name,
                weights=backbone_files.digest(backbone.state_dict()),
            )
            for name, backbone in ((str(weights), trained), ("random", untrained))
        ]
        for subject in subjects:
            evaluate_subject(subject, jobs, assemble.terms(config, how), folder, config, run.stop)
    folder.summarize()


def _plain_backbone(config: DictConfig, how: Engine) -> Backbone:
    """At random initialization, without the ghost batches of pretraining."""
    torch.manual_seed(config.seed)
    backbone = assemble.backbone(config.model)
    how.place(backbone)
    return backbone


def _held_out(config: DictConfig, how: Engine, data: Splits, task: Task, folder: RunFolder) -> Result:
    patches = assemble.patches(config)
    crops = Crops(data.held_out, patches.grid, centered=True)
    size = config.data.images_per_batch_norm
    places = [(index, key(config.seed, index)) for index in range(len(data.held_out))]
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    loaded = load(crops, batches, workers=how.workers, pin=how.device.type == "cuda")
    unreadable = Unreadable(n_images=len(crops), most_share=config.data.unreadable_share)
    asked: list[int] = []
    shown = console.counted(loaded, "held-out pretext", len(batches))
    pixels = full_batches(_noting(shown, asked), unreadable, at_least=1)
    given = answers(task.model, pixels, patches, seed=config.seed, device=how.device, bf16=how.bf16)
    folder.note_unreadable(unreadable.reasons)
    found = accuracy(count_hits(given), [data.held_out.source(index) for index in asked])
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
        checkpoint=str(folder.path / backbone_files.BACKBONE_FILE),
        model=config.model.name,
    )
