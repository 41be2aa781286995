"""From a composed config to the objects of a run."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from relloc import ranks
from relloc.data.image_set import ImageSet, Splits
from relloc.data.order import key
from relloc.data.shards import shards
from relloc.errors import UsageError
from relloc.evals.run import Evaluation, Terms
from relloc.features.source import Reading
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.loop import Task
from relloc.pretext.objective import RelativeLocation
from relloc.runs import console
from relloc.runs.engine import Engine, number, whole
from relloc.tracking import DatasetRecord, RunRecord, environment_tags, flatten

# What a run may be resumed with: where the images lie, how fast they come, what is evaluated and told.
_NEUTRAL = (
    *("device", "workers", "compile", "memory_format", "deterministic", "images_per_forward", "bank_gib"),
    *("runs", "tracking", "save_every_s", "milestones", "report_every_steps", "collapse_steps", "monitor"),
    *("eval", "batch_norm", "calibration_images", "view", "data.linear", "data.knn"),
    *("data.root", "data.shards", "data.source", "data.unreadable_share"),  # the images' digest counts
)


# Numbers that no constructor looks at before data is listed or anything is trained: lowest, highest.
_WHOLE = {
    **dict.fromkeys(("seed", "report_every_steps", "monitor.images", "monitor.k", "calibration_images"), 1),
    **dict.fromkeys(("data.images_per_step", "data.images_per_batch_norm", "data.linear.epochs"), 1),
    **dict.fromkeys(("view.short_px", "view.crop_px", "view.batch"), 1),
    "seed": 0,
}
_NUMBERS = {
    **dict.fromkeys(("save_every_s", "bank_gib", "data.lr", "data.epochs", "data.warmup_epochs"), math.inf),
    **dict.fromkeys(("data.unreadable_share", "monitor.most_share"), 1),
    "monitor.every_epochs": math.inf,
}


def check_numbers(config: DictConfig) -> None:
    """A wrong number is told now, not after a data set was listed or 70 epochs were trained.

    Raises:
        UsageError: a setting that is no number, or outside what it may be.
    """
    for name, at_least in _WHOLE.items():
        if (value := OmegaConf.select(config, name)) is not None:
            whole(name, value, at_least=at_least)
    for name, at_most in _NUMBERS.items():
        if (value := OmegaConf.select(config, name)) is not None:
            number(name, value, at_most=at_most)
    for name in ("milestones", "data.milestone_epochs", "data.linear.milestone_epochs"):
        asked = OmegaConf.select(config, name, default=ListConfig([]))
        if not isinstance(asked, ListConfig):
            raise UsageError(f"{name}={asked} is not a list: give {name}=[{asked}]")
        for one in asked:
            number(name, one)


def call(node: DictConfig, **more: Any) -> Any:
    """What the `_target_` of a node makes of its keys and `more`; lists and mappings become plain ones."""
    return hydra.utils.instantiate(node, _convert_="all", **more)


def plain(node: DictConfig) -> dict[str, Any]:
    """A node with everything in it resolved, as JSON has it."""
    content = OmegaConf.to_container(node, resolve=True)
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}


def splits(config: DictConfig) -> Splits:
    """The images, with a line that says what was found. Rank 0 is first, so that one process downloads."""
    if ranks.rank() > 0:
        ranks.from_first("")
        return _splits(config)
    found = _splits(config)
    ranks.from_first("")
    labels = f"{len(found.train.classes)} classes" if found.labeled else "no labels"
    counts = f"{len(found.train)} images to train on, {len(found.held_out)} held out"
    console.say(f"data    {found.train.name}: {counts}, {labels}")
    return found


def _splits(config: DictConfig) -> Splits:
    packed = OmegaConf.select(config, "data.shards")
    return shards(root=packed) if packed else call(config.data.source)


def backbone(model: DictConfig | Mapping[str, Any]) -> Backbone:
    """A backbone at its initialization; seed torch before."""
    return call(OmegaConf.create(dict(model)).backbone)


def pretext_model(config: DictConfig, *, one_pass: bool = False) -> RelativeLocation:
    """Backbone and head at the initialization that config.seed gives."""
    torch.manual_seed(config.seed)
    trunk = backbone(config.model)
    head = call(config.model.head, embedding_dim=trunk.embedding_dim)
    return RelativeLocation(
        trunk,
        head,
        batch_norm=config.pretext_batch_norm,
        images_per_batch_norm=config.data.images_per_batch_norm,
        one_pass=one_pass,
    )


def task(config: DictConfig, engine: Engine, *, steps_per_epoch: int, accumulation: int) -> Task:
    """What is trained, on the engine's device, compiled where it compiles."""
    model, pipeline = pretext_model(config, one_pass=engine.compiled), patches(config)
    engine.place(model)
    return Task(
        model=model,
        network=engine.compile(model),
        optimizer=call(config.optimizer, model=model),
        schedule=call(config.schedule),
        draw=pipeline.draw,
        make=engine.compile(pipeline.make),
        steps_per_epoch=steps_per_epoch,
        accumulation=accumulation,
        seed_of=lambda step, place: key(config.seed, step, place),
        device=engine.device,
        bf16=engine.bf16,
    )


def patches(config: DictConfig) -> PatchPipeline:
    """How patches are sampled, cut, treated and normalized."""
    return PatchPipeline(grid=call(config.grid), color=call(config.color), normalize=call(config.normalize))


def evaluations(config: DictConfig) -> dict[str, Evaluation]:
    """The evaluations that `eval` names."""
    return {str(name): call(node) for name, node in (config.eval or {}).items()}


def reading(config: DictConfig, engine: Engine, *, told: bool = True) -> Reading:
    """How full images are viewed and encoded; with progress shown if `told`."""
    if config.view.crop_px > config.view.short_px:
        raise UsageError(f"view.crop_px={config.view.crop_px} is larger than view.short_px={config.view.short_px}")
    return Reading(
        short_px=config.view.short_px,
        crop_px=config.view.crop_px,
        batch=whole("view.batch", config.view.batch, at_least=1),
        workers=engine.workers,
        device=engine.device,
        bf16=engine.bf16,
        unreadable_share=config.data.unreadable_share,
        **({"progress": console.counted} if told else {}),
    )


def terms(config: DictConfig, engine: Engine) -> Terms:
    """How evaluations are run."""
    ways = [config.batch_norm] if isinstance(config.batch_norm, str) else list(config.batch_norm)
    return Terms(
        reading=reading(config, engine),
        batch_norms=ways,
        calibration_images=config.calibration_images,
        bank_gib=config.bank_gib,
        seed=whole("seed", config.seed),
    )


def run_dir() -> Path:
    """This run's folder, which Hydra made: rank 0's on every rank."""
    return Path(ranks.from_first(os.path.abspath(HydraConfig.get().runtime.output_dir)))


def computed(config: DictConfig) -> dict[str, Any]:
    """The settings that decide what pretraining computes, flat."""
    settings = flatten(plain(config))
    neutral = tuple(f"{name}." for name in _NEUTRAL)
    return {name: value for name, value in settings.items() if not f"{name}.".startswith(neutral)}


def short_name(config: DictConfig) -> str:
    """A pretraining's name, what is studied first: `gap21 jit0..21 gray small s0`."""
    jitter = config.grid.jitter_px
    moved = jitter if isinstance(jitter, int) else "..".join(map(str, jitter))
    color = HydraConfig.get().runtime.choices["color"]
    return f"gap{config.grid.gap_px} jit{moved} {color} {config.model.name} s{config.seed}"


def record(config: DictConfig, name: str, data: Splits, engine: Engine, run_dir: Path) -> RunRecord:
    """What a tracker is told of this run."""
    on = engine.device
    devices = [torch.cuda.get_device_name(on)] * ranks.world_size() if on.type == "cuda" else ["cpu"]
    choices = HydraConfig.get().runtime.choices
    tags = {"relloc.kind": HydraConfig.get().job.name, "relloc.run_dir": str(run_dir), "relloc.data": config.data.name}
    tags["relloc.engine"] = str(engine)
    if choices.get("experiment"):
        tags["relloc.preset"] = str(choices["experiment"])
    return RunRecord(
        name=name,
        experiment=config.tracking.experiment,
        tracking_uri=config.tracking.uri or "",
        tags=tags | environment_tags(devices),
        params=flatten(plain(config)),
        datasets=tuple(_dataset(images, use) for images, use in ((data.train, "train"), (data.held_out, "eval"))),
    )


def _dataset(images: ImageSet, use: str) -> DatasetRecord:
    return DatasetRecord(
        name=f"{images.name}-{images.split}",
        context=use,
        digest=images.digest(),
        source=os.path.dirname(images.source(0)) or "scikit-image, scikit-learn",
        n_images=len(images),
    )
