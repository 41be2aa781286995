"""Pretraining from start to end, in the order of this file: prepare, train, ask held-out images, evaluate."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from torch import Tensor

from relloc import ranks
from relloc.checkpoints import backbone_files
from relloc.checkpoints.hashed_files import hash_file
from relloc.data.crops import Crops
from relloc.data.image_set import Splits
from relloc.data.loader import collate
from relloc.data.manifest import read_manifest
from relloc.data.order import StepPlan
from relloc.errors import CheckpointError
from relloc.evaluation.contract import NamedEvaluation
from relloc.files import path_as_text
from relloc.models.backbone import Backbone
from relloc.patches.picture import draw_patches
from relloc.pretext.held_out import accuracy, answers, count_hits
from relloc.pretext.loop import Task
from relloc.pretext.stopping import stop_request
from relloc.results import Result, append_results, read_results
from relloc.runs import console, saving
from relloc.runs.build import Pretraining
from relloc.runs.engine import Engine, settle
from relloc.runs.evaluated_models import evaluated
from relloc.runs.evaluating import evaluate_model
from relloc.runs.folder import RunFolder, check_files, open_folder, own_folder
from relloc.runs.invocation import Invocation
from relloc.runs.monitors import held_out_crops
from relloc.runs.naming import pretraining_name
from relloc.runs.reusing import EvalRun
from relloc.runs.settings import content_of, members
from relloc.runs.training import Training, train_to_the_end
from relloc.seeds import PRETRAINING_VERSION, Use, seed_for

PICTURE = "patches.png"
_PICTURED = 6
_SPANS = ("warmup_epochs", "milestone_epochs")
_MOST_FORWARD_IMAGES = 512  # what 80 GB hold of a compiled ResNet-50 at 96 px twice over


def pretrain(settings: Pretraining, invocation: Invocation) -> None:
    """Pretrain, or go on with what the run folder holds, then run the evaluations that are asked for."""
    engine = settle(settings.engine)
    ranks.join(engine.device)
    with contextlib.ExitStack() as at_end:
        at_end.callback(ranks.leave)
        stop = at_end.enter_context(stop_request())
        run_dir = at_end.enter_context(own_folder(invocation.folder))
        check_files(run_dir)
        data = settings.data.read()
        # What only evaluations need is found, or missed, before training.
        evaluations = settings.named_evaluations(data)
        for one in _with_labels(evaluations):
            one.check_images()
        if ranks.rank() == 0:
            _say_small_shards(settings)
            _say_scaled(settings)
        plan = make_plan(settings, data, engine)
        task = make_task(
            settings, engine, steps_per_epoch=plan.steps_per_epoch, accumulation=plan.accumulation
        )
        training = Training(
            settings=settings,
            engine=engine,
            data=data,
            task=task,
            plan=plan,
            identity={
                **settings.identity,
                "precision": engine.precision,  # what auto became
                saving.RANDOM_NUMBERS: PRETRAINING_VERSION,
                "training images": data.train.digest(),
            },
            milestones=saving.milestone_steps(settings.milestones, task),
            run_dir=run_dir,
            stop=stop,
        )
        done = saving.resume(training.identity, task, run_dir)  # before anything is written there
        if ranks.rank() > 0:
            train_to_the_end(training, done, None)
            return
        name = pretraining_name(settings, str(invocation.choices["color"]))
        record = invocation.record(name, [data, *(one.splits for one in evaluations)], engine)
        with open_folder(invocation, record, run_dir) as folder, stop.reraised():
            saving.note_identity(run_dir, training.identity)
            console.say(f"engine  {engine}; {plan.forward_images} images a forward")
            _draw_patches(settings, data, folder)
            train_to_the_end(training, done, folder)
            ranks.leave()
            _save_backbone(training, folder)
            _measure_pretext(training, folder)
            _evaluate(training, evaluations, folder)
            folder.summarize()
        run = console.from_here(run_dir)
        if data.labeled:  # with recalibrated batch norm as well
            console.say_next("evaluate", checkpoint=[run, "random"])
        else:
            console.say_next("evaluate", checkpoint=run, eval=_members_without_labels())


def _with_labels(evaluations: Sequence[NamedEvaluation]) -> list[NamedEvaluation]:
    """The evaluations whose images have the labels that they need; the others are skipped."""
    return [one for one in evaluations if one.evaluation.labels != "class" or one.splits.labeled]


def _members_without_labels() -> list[str]:
    """The members of our conf/eval that measure whatever images they are given, without labels."""
    targets = {name: content_of(f"eval/{name}").get("_target_", "") for name in members("eval")}
    ours = {name: target for name, target in targets.items() if target.startswith("relloc.")}
    return [name for name, target in ours.items() if hydra.utils.get_class(target).labels == "none"]


def _say_small_shards(settings: Pretraining) -> None:
    """Say it where images were packed smaller than the grid takes them."""
    resize, shards = settings.patches.grid.resize, settings.data.shards
    if not shards or resize is None:
        return
    manifest, wanted = read_manifest(Path(shards)), resize.longest_short_side()
    packed = manifest["packed"]["short_px"]
    if packed < wanted and manifest["train"]["stored"]["reduced"]:
        console.say(
            f"shards  were reduced to a short side of {packed} px, and this grid enlarges them to up to {wanted} px: "
            f"pack them with short_px={wanted}"
        )


def _say_scaled(settings: Pretraining) -> None:
    """Say what became of warm-up and milestones where schedule.epochs is not what the recipe was made for."""
    schedule, made_for = settings.schedule, settings.recipe_epochs
    spans = [f"{name} {value}" for name, value in vars(schedule).items() if name in _SPANS]
    if schedule.epochs != made_for and spans:
        console.say(
            f"spans   {schedule.epochs} epochs in place of the recipe's {made_for}: {', '.join(spans)}"
        )


def make_plan(settings: Pretraining, data: Splits, engine: Engine) -> StepPlan:
    return StepPlan(
        n_images=len(data.train),
        images_per_step=settings.images_per_step,
        images_per_batch_norm=settings.images_per_batch_norm,
        images_per_forward=settings.images_per_forward
        or fastest_forward(settings, compiled=engine.compiled),
        world=ranks.world_size(),
    )


def fastest_forward(settings: Pretraining, *, compiled: bool) -> int:
    """Images a forward: one ghost batch, or compiled as many as divide a process's share of the step, up to 512."""
    ghost, share = settings.images_per_batch_norm, settings.images_per_step // ranks.world_size()
    if not compiled:
        return ghost
    fitting = range(ghost, min(share, _MOST_FORWARD_IMAGES) + 1, ghost)
    return max((images for images in fitting if share % images == 0), default=ghost)


def make_task(
    settings: Pretraining, engine: Engine, *, steps_per_epoch: int, accumulation: int
) -> Task:
    """What is trained, on the engine's device, compiled where it compiles."""
    model = settings.network(one_pass=engine.compiled)
    engine.place(model)
    return Task(
        model=model,
        network=engine.compile(model),
        optimizer=settings.make_optimizer(model=model),
        schedule=settings.schedule,
        draw=settings.patches.draw,
        make=engine.compile(settings.patches.make),
        steps_per_epoch=steps_per_epoch,
        accumulation=accumulation,
        seed_of=lambda step, place: seed_for(Use.PATCHES, settings.seed, step, place),
        device=engine.device,
        bf16=engine.bf16,
        cuda_graphs=engine.cuda_graphs,
    )


def _draw_patches(settings: Pretraining, data: Splits, folder: RunFolder) -> None:
    """A picture of what some training images become."""
    crops = Crops(
        data.train, settings.patches.grid, use=Use.PICTURE_CROP, seed=settings.seed, centered=False
    )
    chosen = range(0, len(data.train), max(1, len(data.train) // _PICTURED))[:_PICTURED]
    images = collate([crops[(index,)] for index in chosen]).pixels
    draw_patches(images, settings.patches, folder.path / PICTURE, seed=settings.seed)
    folder.keep(PICTURE)
    console.say(f"picture {folder.path / PICTURE}")


def _save_backbone(training: Training, folder: RunFolder) -> None:
    """Save the trained weights, unless the file of an earlier start holds just these."""
    path, backbone = folder.path / backbone_files.BACKBONE_FILE, training.task.model.backbone
    trouble = _why_anew(path, backbone) if path.exists() else ""
    if trouble:
        console.say(f"weights {path} is written anew from the checkpoint: {trouble}")
    if (
        trouble or not path.exists() or not hash_file(path).exists()
    ):  # an older relloc wrote no hash
        backbone_files.save_backbone(
            path, backbone, training.settings.about | {"step": training.task.steps}
        )
    for file in (path, hash_file(path)):
        folder.keep(file.name)


def _why_anew(path: Path, backbone: Backbone) -> str:
    """What is wrong with a backbone's file; "" where it is that of this backbone."""
    try:
        saved, _ = backbone_files.load_backbone(path)
    except CheckpointError as error:
        return str(error)
    same = backbone_files.digest(saved) == backbone_files.digest(backbone.state_dict())
    return "" if same else "it held other weights"


def _measure_pretext(training: Training, folder: RunFolder) -> None:
    """Accuracy on held-out images, unless an earlier start measured it."""
    if any(row.kind == "pretext" for row in read_results(folder.path)):
        return
    settings, images = training.settings, training.data.held_out
    config = dataclasses.replace(
        settings.encode_config(training.engine), batch=settings.images_per_batch_norm
    )
    loaded = held_out_crops(
        images, range(len(images)), settings.patches.grid, settings.seed, config
    )
    unreadable = config.unreadable_of(len(images))
    indices: list[int] = []

    def pixels() -> Iterator[Tensor]:
        for batch in config.progress(
            loaded, "held-out pretext", math.ceil(len(images) / config.batch)
        ):
            unreadable.add_full(batch, images=1)
            indices.extend(batch.indices.tolist())
            yield batch.pixels

    given = answers(
        training.task.model,
        pixels(),
        settings.patches,
        seed=settings.seed,
        device=config.device,
        bf16=config.bf16,
    )
    folder.unreadable |= unreadable.reasons
    found = accuracy(count_hits(given), [images.source(index) for index in indices])
    row = Result(
        eval="pretext",
        dataset=images.name,
        split=images.split,
        kind="pretext",
        table="Pretext accuracy, top-1",
        column="held out",
        metric="top1",
        headline=True,
        value=found.percent,
        low=found.low,
        high=found.high,
        n=found.n_pairs,
        seed=settings.seed,
        protocol="1.1",
        details=(
            "center crop, eight pairs with the center, jitter and colors as in training",
            "interval: t over sources",
        ),
        checkpoint=path_as_text(folder.path / backbone_files.BACKBONE_FILE),
        model=settings.model.name,
    )
    append_results(folder.path, [row])


def _evaluate(
    training: Training, evaluations: Sequence[NamedEvaluation], folder: RunFolder
) -> None:
    """Evaluate the trained backbone, and beside it the same at random initialization."""
    settings, engine = training.settings, training.engine
    labeled = _with_labels(evaluations)
    if unlabeled := [one.name for one in evaluations if one not in labeled]:
        console.say(
            f"eval    {', '.join(unlabeled)} skipped: {training.data.train.name} has no labels; on labeled data: "
            f"python -m relloc.evaluate checkpoint={folder.path} data=…"
        )
    if not labeled:
        return
    # Both without the ghost batches of pretraining
    trained, untrained = (settings.model.backbone(settings.seed) for _ in range(2))
    trained.load_state_dict(training.task.model.backbone.state_dict())
    weights = str(folder.path / backbone_files.BACKBONE_FILE)
    run = EvalRun(
        run_dir=folder.path,
        folder=folder,
        stop=training.stop,
        save_every_s=settings.save_every_s,
        reused_runs=settings.reused_runs,
    )
    for checkpoint, backbone in ((weights, trained), ("random", untrained)):
        engine.place(backbone)
        model = evaluated(backbone, checkpoint, settings.model.name)
        evaluate_model(model, labeled, settings.eval_settings(engine), run)
