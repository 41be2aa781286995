"""Pretrains a network from start to end: what `python -m relloc.train` runs.

The file follows the order of a run: set up, train, save the backbone, measure the pretext task on
held-out images, evaluate.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch

from relloc import ranks
from relloc.checkpoints import backbone_files
from relloc.checkpoints.hashed_files import hash_file
from relloc.checkpoints.paths import RECALIBRATED_FILE
from relloc.data.crops import Crops
from relloc.data.image_set import Splits
from relloc.data.loader import collate
from relloc.data.manifest import holds_pixels, read_manifest
from relloc.data.order import StepPlan
from relloc.errors import CheckpointError
from relloc.evaluation.contract import BATCH_NORMS, NamedEvaluation
from relloc.evaluation.strides import by_strides
from relloc.geometry import ShortSide
from relloc.models.backbone import Backbone
from relloc.models.cost import cost_of_patch
from relloc.models.resnet import ResNetBackbone
from relloc.patches.picture import draw_patches
from relloc.pretext.loop import Task
from relloc.pretext.stopping import stop_request
from relloc.results import RESULTS_FILE
from relloc.runs import console, saving
from relloc.runs.command_line import as_value
from relloc.runs.command_settings import Pretraining
from relloc.runs.engine import Engine, resolve_engine
from relloc.runs.evaluated_models import make_evaluated_model
from relloc.runs.evaluating import (
    check_images,
    print_left_out,
    print_report,
)
from relloc.runs.folder import RunFolder, check_files, lock_folder, open_folder
from relloc.runs.image_sizes import check_sizes
from relloc.runs.invocation import Invocation
from relloc.runs.measuring import evaluate_model
from relloc.runs.naming import pretraining_name
from relloc.runs.pretext_models import make_pretext_model
from relloc.runs.pretext_rows import measure_pretext
from relloc.runs.recalibrating import ENTRY, Recalibration
from relloc.runs.reusing import EvalRun
from relloc.runs.settings import content_of, flat, members
from relloc.runs.training import Training, train_to_the_end
from relloc.seeds import PRETRAINING_VERSION, Use, seed_for
from relloc.terminal import quantity

PICTURE = "patches.png"
_PICTURE_IMAGES = 6
# Settings of a schedule that are given in epochs and scaled when schedule.epochs changes.
_SCALED_WITH_LENGTH = ("warmup_epochs", "milestone_epochs")
# A compiled ResNet-50 on patches of this side needs half of a GPU's 80 GB for this many images.
_MAX_FORWARD_IMAGES = 512
_MAX_FORWARD_PX = 96


def pretrain(settings: Pretraining, invocation: Invocation) -> None:
    """Pretrains a network, or resumes the run in the folder, and then evaluates its backbone.

    Raises:
        UsageError: a setting can't be met, the run folder holds another run, or training diverged.
        DataError: images or labels can't be used.
        CheckpointError: the newest checkpoint is damaged.
    """
    engine = resolve_engine(settings.engine)
    ranks.join(engine.device)
    with contextlib.ExitStack() as at_end:
        at_end.callback(ranks.leave)
        # First of all take the folder, and check that its files can be read: until `open_folder`
        # nothing is written.
        stop = at_end.enter_context(stop_request())
        run_dir = at_end.enter_context(lock_folder(invocation.folder))
        check_files(run_dir)
        data = settings.data.read()
        # Missing data of an evaluation is an error now, not after days of training.
        evaluations, left_out = settings.named_evaluations(data)
        print_left_out(left_out)
        _check_data(settings, data, evaluations, engine)
        if ranks.rank() == 0:
            _warn_of_small_shards(settings)
            _report_scaled_schedule(settings)

        # Build what is trained.
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
                "precision": engine.precision,  # resolved, where the setting is "auto"
                saving.RANDOM_NUMBERS: PRETRAINING_VERSION,
                "training images": data.train.digest(),
            },
            milestones=saving.milestone_steps(settings.milestones, task),
            run_dir=run_dir,
            stop=stop,
        )

        # Resuming may refuse the folder, so it comes before anything is written there.
        done = saving.resume(training.identity, task, run_dir)
        # The other processes only train. Rank 0 alone writes files, logs and evaluates.
        if ranks.rank() > 0:
            train_to_the_end(training, done, None)
            return

        # Train, then measure what was learned.
        # A config that was composed before, such as a run's config.yaml, has no choices.
        color = invocation.choices.get("color", type(settings.patches.color).__name__.lower())
        name = pretraining_name(settings, str(color))
        data_sets = [data, *(named.splits for named in evaluations)]
        record = invocation.record(name, data_sets, engine)
        with open_folder(invocation, record, run_dir) as folder, stop.reraised():
            saving.note_identity(run_dir, training.identity)
            console.print_message(
                f"engine  {engine}; {quantity(plan.forward_images, 'image')} a forward"
            )
            _report_strides(settings, training.task.model.backbone)
            _draw_patches(settings, data, folder)
            train_to_the_end(training, done, folder)
            # From here on rank 0 works alone.
            ranks.leave()
            _save_backbone(training, folder)
            _save_recalibrated(training, folder)
            measure_pretext(training, folder)
            _evaluate(training, evaluations, folder)
            folder.summarize()

        if settings.report and (run_dir / RESULTS_FILE).exists():
            print_report(run_dir)
            print_left_out(left_out)
        # Print the next command; its paths are relative to the current folder.
        run = console.from_here(run_dir)
        if data.labeled:
            # This command also measures with recalibrated batch norm.
            words = [f"checkpoint={as_value([run, 'random'])}"]
            names = _chosen_evaluations(invocation)
        else:
            words = [f"checkpoint={as_value(run)}"]
            names = _label_free_members()
        if names != _default_evaluations():
            words.append(f"eval={as_value(names)}")
        console.print_next("evaluate", *words, *_words_of_evaluations(invocation, names, settings))


def _check_data(
    settings: Pretraining, data: Splits, evaluations: Sequence[NamedEvaluation], engine: Engine
) -> None:
    """Raises `UsageError` or `DataError` for images that will not do, also after the training."""
    check_images(_measurable(evaluations), settings.encode_config(engine))
    check_sizes(settings, data)


def _measurable(evaluations: Sequence[NamedEvaluation]) -> list[NamedEvaluation]:
    """Returns the evaluations but those that need a class of each image where images have none.

    Those are skipped, as the default evaluations need classes and images without any may be trained
    on. Other labels that an evaluation needs are not looked at here: where they are missing,
    `NamedEvaluation.check_images` refuses the run.
    """
    return [
        named for named in evaluations if named.evaluation.labels != "class" or named.splits.labeled
    ]


def _label_free_members() -> list[str]:
    """Returns the names in relloc's own conf/eval that need no labels."""
    label_free = []
    for name in members("eval"):
        target = content_of(f"eval/{name}").get("_target_", "")
        # A user's own members may need packages that are not installed: they are not imported.
        if target.startswith("relloc.") and hydra.utils.get_class(target).labels == "none":
            label_free.append(name)
    return label_free


def _default_evaluations() -> list[str]:
    """Returns the members of conf/eval that relloc.evaluate runs where none are chosen."""
    chosen = [entry["eval"] for entry in content_of("evaluate")["defaults"] if "eval" in entry]
    return list(chosen[0])


def _chosen_evaluations(invocation: Invocation) -> list[str]:
    """Returns the members of conf/eval that a training chose, or the default where it chose none.

    A training with `eval=[]` only puts its evaluations off.
    """
    # Hydra notes one member as a string, and several as a list.
    chosen = invocation.choices.get("eval") or []
    names = [chosen] if isinstance(chosen, str) else [str(name) for name in chosen]
    return names or _default_evaluations()


def _words_of_evaluations(
    invocation: Invocation, names: Sequence[str], settings: Pretraining
) -> list[str]:
    """Returns the words by which relloc.evaluate measures `names` as this training does.

    relloc.evaluate takes the data set and its probe from the run folder, but not these settings.
    """
    # Those of single evaluations, as they were typed.
    prefixes = tuple(f"eval.{name}." for name in names)
    words = [word for word in invocation.words if word.lstrip("+~").startswith(prefixes)]
    # Those of all evaluations, where this training has another value than by default. The seed
    # decides which random weights are measured beside the trained ones.
    of_run = flat(invocation.settings)
    by_default = flat(content_of("_settings"))
    shared = [name for name in by_default if name.startswith("view.")]
    # relloc.evaluate refuses those that no evaluation makes use of. The evaluations that are
    # proposed where the training has none make use of all.
    if settings.evaluations and names == _chosen_evaluations(invocation):
        used = settings.used_view_settings(BATCH_NORMS)
        shared = [name for name in shared if name.removeprefix("view.") in used]
    by_default["strides"] = content_of("evaluate")["strides"]
    for name in (*shared, "calibration_images", "strides", "seed"):
        if of_run[name] != by_default[name]:
            words.append(f"{name}={as_value(of_run[name])}")
    return words


def _warn_of_small_shards(settings: Pretraining) -> None:
    """Warns where images were packed smaller than the patch grid wants them."""
    resize = settings.patches.grid.resize
    shards = settings.data.shards
    if not shards or resize is None:
        return
    manifest = read_manifest(Path(shards))
    packed_px = manifest["packed"]["short_px"]
    wanted_px = resize.longest_short_side()
    # Small originals show no more when packed larger: only images that packing reduced are worth a
    # warning.
    if packed_px < wanted_px and manifest["train"]["stored"]["reduced"]:
        console.print_message(
            f"shards  packed at a short side of {packed_px} px, and this grid enlarges them "
            f"to up to {wanted_px} px: pack them with short_px={wanted_px}"
        )
    # Pixels are packed to be cut only. Of sizes that are drawn anew each time none can be packed.
    elif packed_px != wanted_px and isinstance(resize, ShortSide) and holds_pixels(manifest):
        console.print_message(
            f"shards  pixels of a short side of {packed_px} px, and this grid resizes each crop to "
            f"{wanted_px} px: packed with short_px={wanted_px}, crops are only cut, which is faster"
        )


def _report_scaled_schedule(settings: Pretraining) -> None:
    """Prints warm-up and milestones where schedule.epochs differs from the recipe's length."""
    schedule = settings.schedule
    recipe_epochs = settings.recipe_epochs
    scaled = []
    for name, value in vars(schedule).items():
        if name in _SCALED_WITH_LENGTH:
            scaled.append(f"{name} {value}")
    # A warm-up of 5 of 70 epochs becomes one of 0.5 of 7, which is easily overlooked.
    if schedule.epochs != recipe_epochs and scaled:
        console.print_message(
            f"schedule  {quantity(schedule.epochs, 'epoch')}, not the recipe's {recipe_epochs}: "
            f"{', '.join(scaled)}"
        )


def _report_strides(settings: Pretraining, backbone: Backbone) -> None:
    """Prints of a network with strides of its own what they cost, and how it is evaluated."""
    if not backbone.own_strides:
        return
    patch_px = settings.patches.grid.patch_px
    standard = cost_of_patch(backbone.with_standard_strides(), patch_px)
    own = cost_of_patch(backbone, patch_px)
    factor = own.multiplications / standard.multiplications
    listed = " and ".join(strides.replace("_", " ") for strides in settings.strides)
    console.print_message(
        f"strides {backbone.own_strides}: {factor:.2f} times the multiplications of the standard "
        f"ones on a patch of {patch_px} px; evaluated with strides {listed}"
    )


def make_plan(settings: Pretraining, data: Splits, engine: Engine) -> StepPlan:
    """Returns how the images of each step are divided into forwards and among processes."""
    images_per_forward = settings.images_per_forward
    if images_per_forward is None:
        images_per_forward = fastest_images_per_forward(settings, compiled=engine.compiled)
    return StepPlan(
        n_images=len(data.train),
        images_per_step=settings.images_per_step,
        images_per_batch_norm=settings.images_per_batch_norm,
        images_per_forward=images_per_forward,
        world=ranks.world_size(),
    )


def fastest_images_per_forward(settings: Pretraining, *, compiled: bool) -> int:
    """Returns how many images to pass through the network at once.

    Without compilation that is one ghost batch: the `recipe.images_per_batch_norm` images that
    share batch-norm statistics. A network that is compiled, or has kernels of its own in its
    place (`has_kernels`), takes several ghost batches at once: the most, up to 512 images, that
    divide a process's share of the step. Wider networks and those of finer maps take fewer. Batch
    norm still normalizes each ghost batch by itself, so results stay the same.
    """
    images_per_ghost_batch = settings.images_per_batch_norm
    if not compiled:
        return images_per_ghost_batch
    share = settings.images_per_step // ranks.world_size()
    most = min(share, _max_forward_images(settings))
    candidates = range(images_per_ghost_batch, most + 1, images_per_ghost_batch)
    divisors = [images for images in candidates if share % images == 0]
    return max(divisors, default=images_per_ghost_batch)


def _max_forward_images(settings: Pretraining) -> int:
    """Returns for how many images at once a GPU's memory will do, by the values that are kept."""
    # The meta device has shapes without numbers.
    with torch.device("meta"):
        backbone = settings.model.make_backbone()
        largest = ResNetBackbone(depth=50)
    # Patches of other sizes have always taken as many images.
    if not backbone.size and not backbone.own_strides:
        return _MAX_FORWARD_IMAGES
    kept = cost_of_patch(backbone, settings.patches.grid.patch_px).values
    allowed = _MAX_FORWARD_IMAGES * cost_of_patch(largest, _MAX_FORWARD_PX).values
    return min(_MAX_FORWARD_IMAGES, allowed // kept)


def make_task(
    settings: Pretraining,
    engine: Engine,
    *,
    steps_per_epoch: int,
    accumulation: int,
    compile_network: bool | None = None,
) -> Task:
    """Builds network, optimizer, schedule and patch pipeline on the engine's device.

    The patch pipeline is compiled where the engine compiles, and so is the network unless it has
    kernels of its own (`has_kernels`). `compile_network` asks for one or the other, for benchmarks.
    `accumulation` is the number of forwards whose gradients one step of the optimizer sums.
    """
    # The network is placed first, so that the optimizer's state lies on the same device.
    model = settings.network(one_pass=engine.compiled)
    engine.place(model)
    if compile_network is None:
        compile_network = not has_kernels(model.backbone, engine)
    patches = settings.training_patches
    return Task(
        model=model,
        network=engine.compile(model) if compile_network else model,
        optimizer=settings.make_optimizer(model=model),
        schedule=settings.schedule,
        draw=patches.draw,
        make=patches.maker(engine.compile if engine.compiled else None),
        steps_per_epoch=steps_per_epoch,
        accumulation=accumulation,
        seed_of=lambda step, ghost: seed_for(Use.PATCHES, settings.seed, step, ghost),
        device=engine.device,
        bf16=engine.bf16,
        cuda_graphs=engine.cuda_graphs,
    )


def has_kernels(backbone: Backbone, engine: Engine) -> bool:
    """Returns whether a backbone trains faster without being compiled, where `engine` compiles.

    Batch norms of a ResNet have kernels of their own, which also add shortcuts and apply ReLUs
    (`relloc.models.ghost_batch_norm_kernel`), and so has its max pooling. They spare minutes of
    compiling. Of float32 maps and of other memory formats nothing was measured, and that
    `deterministic` gives the same bits was tested of compiled networks alone.
    """
    return (
        engine.compiled
        and engine.device.type == "cuda"
        and engine.bf16
        and engine.memory_format == "channels_last"
        and not engine.deterministic
        and isinstance(backbone, ResNetBackbone)
    )


def _draw_patches(settings: Pretraining, data: Splits, folder: RunFolder) -> None:
    """Saves a picture of the patches of some training images."""
    crops = Crops(
        data.train,
        settings.patches.grid,
        use=Use.PICTURE_CROP,
        seed=settings.seed,
        centered=False,
        flip=settings.flip,
    )
    # Many data sets list their images class by class, so evenly spaced ones differ most.
    spacing = max(1, len(data.train) // _PICTURE_IMAGES)
    indices = range(0, len(data.train), spacing)[:_PICTURE_IMAGES]
    images = collate([crops[(index,)] for index in indices]).pixels
    draw_patches(images, settings.patches, folder.path / PICTURE, seed=settings.seed)
    folder.mirror_file(PICTURE)
    console.print_message(f"picture {folder.path / PICTURE}")


def _save_backbone(training: Training, folder: RunFolder) -> None:
    """Saves the trained weights, unless the folder's file already holds them."""
    path = folder.path / backbone_files.BACKBONE_FILE
    backbone = training.task.model.backbone
    problem = _problem_of_file(path, backbone) if path.exists() else ""
    if problem:
        console.print_message(f"weights {path} is written anew from the checkpoint: {problem}")
    # Older versions of relloc wrote no file with the hash beside the weights.
    is_complete = path.exists() and hash_file(path).exists()
    if problem or not is_complete:
        backbone_files.save_backbone(path, backbone, _about(training))
    for file in (path, hash_file(path)):
        folder.mirror_file(file.name)


def _save_recalibrated(training: Training, folder: RunFolder) -> None:
    """Saves the trained weights with batch-norm statistics of whole images, if that is asked for.

    A file that an earlier start of the run wrote stays.
    """
    settings = training.settings
    if not settings.save_recalibrated:
        return
    path = folder.path / RECALIBRATED_FILE
    recalibration = Recalibration(
        backbone=_trained_backbone(training), images=training.data.train, settings=settings
    )
    if not recalibration.is_in(path):
        backbone, about = recalibration.run(training.engine)
        backbone_files.save_backbone(path, backbone, {**_about(training), ENTRY: about})
        console.print_message(
            f"weights {path}: batch norm recalibrated on {quantity(about['images'], 'image')}"
        )
    for file in (path, hash_file(path)):
        folder.mirror_file(file.name)


def _about(training: Training) -> dict[str, Any]:
    """Returns what a file of the trained weights says of itself."""
    return training.settings.about | {"step": training.task.steps}


def _trained_backbone(training: Training) -> Backbone:
    """Returns the trained backbone, on the CPU, with ordinary batch norm in place of ghost batches.

    The weights are those of the checkpoint, without reading a file again.
    """
    settings = training.settings
    backbone = settings.model.backbone(settings.seed)
    backbone.load_state_dict(training.task.model.backbone.state_dict())
    return backbone


def _problem_of_file(path: Path, backbone: Backbone) -> str:
    """Returns what is wrong with a backbone file, or "" where it holds this backbone's weights."""
    try:
        saved, _ = backbone_files.load_backbone(path)
    except CheckpointError as error:
        return str(error)
    if backbone_files.digest(saved) != backbone_files.digest(backbone.state_dict()):
        return "it held other weights"
    return ""


def _evaluate(
    training: Training, evaluations: Sequence[NamedEvaluation], folder: RunFolder
) -> None:
    """Evaluates the trained backbone, and for comparison the same one as randomly initialized."""
    settings = training.settings
    engine = training.engine
    measurable = _measurable(evaluations)
    skipped = [named for named in evaluations if named not in measurable]
    if skipped:
        names = ", ".join(named.name for named in skipped)
        # Some evaluations have images of their own.
        unlabeled = " and ".join(sorted({named.splits.train.name for named in skipped}))
        console.print_message(
            f"eval    {names} skipped: {unlabeled} has no labels; "
            f"on labeled data: python -m relloc.evaluate checkpoint={folder.path} data=…"
        )
    if not measurable:
        return
    trained = _trained_backbone(training)
    untrained = settings.model.backbone(settings.seed)
    weights = str(folder.path / backbone_files.BACKBONE_FILE)
    run = EvalRun(
        run_dir=folder.path,
        folder=folder,
        stop=training.stop,
        save_every_s=settings.save_every_s,
        reused_runs=settings.reused_runs,
    )
    for checkpoint, backbone in ((weights, trained), ("random", untrained)):
        model = make_evaluated_model(backbone, checkpoint, settings.model.name)
        if backbone is trained and any(each.evaluation.wants_pretext for each in measurable):
            # A network with ordinary batch norm too, with the head that was trained.
            network = settings.network()
            network.load_state_dict(training.task.model.state_dict())
            engine.place(network)
            has_curriculum = settings.training_patches.curriculum is not None
            pretext = make_pretext_model(network, settings.patches, has_curriculum=has_curriculum)
            model = dataclasses.replace(model, pretext=pretext)
        for variant, looking in by_strides([model], measurable, settings.strides):
            engine.place(variant.backbone)
            evaluate_model(variant, looking, settings.eval_settings(engine), run)
