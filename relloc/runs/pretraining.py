"""Pretraining from start to end, in the order of this file: prepare, train, ask held-out images, evaluate."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from relloc import checks, ranks
from relloc.checkpoints import backbone_files
from relloc.checkpoints.hashed_files import hash_file, note_hash
from relloc.data.crops import Crops
from relloc.data.image_set import Splits
from relloc.data.loader import ImageBatch, Unreadable, collate, load
from relloc.data.manifest import read_manifest
from relloc.data.order import StepPlan
from relloc.errors import CheckpointError
from relloc.evaluation.contract import EvaluatedModel, NamedEvaluation
from relloc.models.backbone import Backbone
from relloc.patches.picture import draw_patches
from relloc.pretext.held_out import accuracy, answers, count_hits
from relloc.pretext.loop import Task
from relloc.pretext.stopping import stop_request
from relloc.results import Result, append_results, read_results
from relloc.runs import assemble, checking, console, engine, saving
from relloc.runs.engine import Engine
from relloc.runs.evaluating import EvalRun, evaluate_model
from relloc.runs.folder import RunFolder, check_files, open_folder, own_folder
from relloc.runs.naming import pretraining_name
from relloc.runs.training import Run, train_run
from relloc.seeds import PRETRAINING_VERSION, Use

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
        run_dir = at_end.enter_context(own_folder())
        check_files(run_dir)
        data = assemble.splits(config.data)
        jobs = assemble.named_evaluations(config, data)  # also what only they need is found, or missed, before training
        for job in _with_labels(jobs):
            job.check_images()
        _tell_small_shards(config)
        _tell_scaled(config)
        task, plan = _task(config, data, how)
        identity = assemble.computed(config) | {
            "precision": how.precision,  # what auto became
            saving.RANDOM_NUMBERS: PRETRAINING_VERSION,
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
        name = pretraining_name(config, HydraConfig.get().runtime.choices["color"])
        record = assemble.record(config, name, used, how, run_dir)
        with open_folder(config, record, run_dir) as folder, stop.prevailing():
            saving.note_identity(run_dir, identity)
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
    checking.check_is_training(config)
    checking.check_numbers(config)
    checking.check_tracking(config)
    checking.check_roots(config)
    if config.collapse_steps != "auto":
        checks.whole("collapse_steps", config.collapse_steps)
    assemble.patches(config)
    assemble.call(config.schedule)
    assemble.evaluations(config)
    checking.check_network(config)
    checking.check_recalibration(config, how)


def _tell_scaled(config: DictConfig) -> None:
    """Say what became of warm-up and milestones where schedule.epochs is not what the recipe was made for."""
    schedule, made_for = config.schedule, config.recipe.epochs
    spans = [f"{name} {schedule[name]}" for name in ("warmup_epochs", "milestone_epochs") if name in schedule]
    if ranks.rank() == 0 and schedule.epochs != made_for and spans:
        console.say(f"spans   {schedule.epochs} epochs in place of the recipe's {made_for}: {', '.join(spans)}")


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
        images_per_step=config.recipe.images_per_step,
        images_per_batch_norm=config.recipe.images_per_batch_norm,
        images_per_forward=_images_per_forward(config, how),
        world=ranks.world_size(),
    )
    task = assemble.task(config, how, steps_per_epoch=plan.steps_per_epoch, accumulation=plan.accumulation)
    saving.milestone_steps(config.milestones, task)
    return task, plan


def _images_per_forward(config: DictConfig, how: Engine) -> int:
    """As asked; else one ghost batch, or compiled as many as divide a process's share of the step, up to 512."""
    if config.images_per_forward != "auto":
        return checks.whole("images_per_forward", config.images_per_forward)
    ghost, share = config.recipe.images_per_batch_norm, config.recipe.images_per_step // ranks.world_size()
    if not how.compiled:
        return ghost
    fitting = range(ghost, min(share, _MOST_FORWARD_IMAGES) + 1, ghost)
    return max((images for images in fitting if share % images == 0), default=ghost)


def _draw(config: DictConfig, data: Splits, folder: RunFolder) -> None:
    pipeline = assemble.patches(config)
    crops = Crops(data.train, pipeline.grid, use=Use.PICTURE_CROP, seed=config.seed, centered=False)
    chosen = range(0, len(data.train), max(1, len(data.train) // _PICTURED))
    images = collate([crops[(index,)] for index in chosen[:_PICTURED]]).pixels
    draw_patches(images, pipeline, folder.path / PICTURE, seed=config.seed)
    folder.keep(PICTURE)
    console.say(f"picture {folder.path / PICTURE}")


def _pixels(loaded: Iterable[ImageBatch], unreadable: Unreadable, indices: list[int]) -> Iterator[Tensor]:
    """Pixels of batches; which images they are of is added to `indices`."""
    for batch in loaded:
        unreadable.add_full(batch, images=1)
        indices += batch.indices.tolist()
        yield batch.pixels


def about(config: DictConfig) -> dict[str, Any]:
    """What a backbone file tells of itself: enough to build it, and how it came to be."""
    return {"model": assemble.plain(config.model), "computed": assemble.computed(config)}


def _finish(run: Run, jobs: Sequence[NamedEvaluation], folder: RunFolder) -> None:
    config, how, data, task = run.config, run.how, run.data, run.task
    weights = folder.path / backbone_files.BACKBONE_FILE
    _save_finished(weights, task.model.backbone, about(config) | {"step": task.steps})
    for kept in (weights, hash_file(weights)):
        folder.keep(kept.name)
    if not any(row.kind == "pretext" for row in read_results(folder.path)):
        append_results(folder.path, [_held_out(config, how, data, task, folder)])
    labeled = _with_labels(jobs)
    if unlabeled := [job.name for job in jobs if job not in labeled]:
        console.say(
            f"eval    {', '.join(unlabeled)} skipped: {data.train.name} has no labels; on labeled data: "
            f"python -m relloc.evaluate checkpoint={folder.path} data=…"
        )
    if labeled:
        trained, untrained = (_plain_backbone(config, how) for _ in range(2))
        trained.load_state_dict(task.model.backbone.state_dict())
        models = [
            EvaluatedModel(
                backbone=backbone,
                checkpoint=name,
                model=config.model.name,
                weights=backbone_files.digest(backbone.state_dict()),
            )
            for name, backbone in ((str(weights), trained), ("random", untrained))
        ]
        eval_run = EvalRun(
            run_dir=folder.path,
            folder=folder,
            stop=run.stop,
            save_every_s=config.save_every_s,
            runs=Path(config.runs) if config.reuse else None,
        )
        for model in models:
            evaluate_model(model, labeled, assemble.eval_settings(config, how), eval_run)
    folder.summarize()


def _save_finished(path: Path, backbone: Backbone, about: dict[str, Any]) -> None:
    """Save the trained weights, unless the file of an earlier start holds just these."""
    if path.exists():
        reason = _why_anew(path, backbone)
        if not reason:
            if not hash_file(path).exists():  # of an older version of relloc
                note_hash(path)
            return
        console.say(f"weights {path} is written anew from the checkpoint: {reason}")
    backbone_files.save_backbone(path, backbone, about)


def _why_anew(path: Path, backbone: Backbone) -> str:
    """What is wrong with a backbone's file; "" where it is that of this backbone."""
    try:
        saved, _ = backbone_files.load_backbone(path)
    except CheckpointError as error:
        return str(error)
    same = backbone_files.digest(saved) == backbone_files.digest(backbone.state_dict())
    return "" if same else "it held other weights"


def _with_labels(jobs: Sequence[NamedEvaluation]) -> list[NamedEvaluation]:
    """The evaluations whose images have the labels that they need; the others are skipped."""
    return [job for job in jobs if job.evaluation.labels != "class" or job.splits.labeled]


def _plain_backbone(config: DictConfig, how: Engine) -> Backbone:
    """At random initialization, without the ghost batches of pretraining."""
    torch.manual_seed(config.seed)
    backbone = assemble.backbone(config.model)
    how.place(backbone)
    return backbone


def _held_out(config: DictConfig, how: Engine, data: Splits, task: Task, folder: RunFolder) -> Result:
    patches = assemble.patches(config)
    crops = Crops(data.held_out, patches.grid, use=Use.HELD_OUT_CROP, seed=config.seed, centered=True)
    size = config.recipe.images_per_batch_norm
    keys = [(index,) for index in range(len(crops))]
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    loaded = load(crops, batches, workers=how.workers, pin=how.device.type == "cuda")
    unreadable = Unreadable(n_images=len(crops), most_share=config.data.unreadable_share)
    asked: list[int] = []
    shown = console.counted(loaded, "held-out pretext", len(batches))
    pixels = _pixels(shown, unreadable, asked)
    given = answers(task.model, pixels, patches, seed=config.seed, device=how.device, bf16=how.bf16)
    folder.note_unreadable(unreadable.reasons)
    found = accuracy(count_hits(given), [data.held_out.source(index) for index in asked])
    return Result(
        eval="pretext",
        dataset=data.held_out.name,
        split=data.held_out.split,
        kind="pretext",
        table="Pretext accuracy, top-1",
        column="held out",
        metric="top1",
        headline=True,
        value=found.percent,
        low=found.low,
        high=found.high,
        n=found.n_pairs,
        seed=config.seed,
        protocol="1.1",
        details=(
            "center crop, eight pairs with the center, jitter and colors as in training",
            "interval: t over sources",
        ),
        checkpoint=str(folder.path / backbone_files.BACKBONE_FILE),
        model=config.model.name,
    )
