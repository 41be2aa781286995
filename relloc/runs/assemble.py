"""From a composed config to the objects of a run."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from relloc import checks, ranks
from relloc.data.image_set import ImageSet, SlowToIdentify, Splits
from relloc.data.lists import MultiLabeled
from relloc.data.processes import without_progress
from relloc.data.shards import shards
from relloc.data.views import Center
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import EvalSettings, Evaluation, NamedEvaluation
from relloc.features.source import EncodeConfig, encode
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.loop import Task
from relloc.pretext.objective import RelativeLocation
from relloc.runs import console
from relloc.runs.engine import Engine
from relloc.seeds import Use, seed_for
from relloc.sweeps.points import identity
from relloc.tracking import (
    DatasetRecord,
    RunRecord,
    environment_tags,
    experiment_name,
    flatten,
)

# What a run may be resumed with: where the images lie, how fast they come, what is evaluated and told.
_NEUTRAL = (
    *("device", "workers", "compile", "cuda_graphs", "memory_format", "deterministic", "images_per_forward"),
    "bank_gib",
    *("runs", "tracking", "launcher", "sweep", "objective", "save_every_s", "milestones"),
    *("report_every_steps", "collapse_steps", "monitor"),
    *("eval", "batch_norm", "calibration_images", "view", "probe"),
    *("recipe.epochs", "recipe.warmup_epochs", "recipe.milestone_epochs", "recipe.lr"),  # schedule and optimizer say it
    *("data.root", "data.shards", "data.source", "data.unreadable_share"),  # the images' digest counts
)


def call(node: DictConfig, **more: Any) -> Any:
    """What the `_target_` of a node makes of its keys and `more`; lists and mappings become plain ones."""
    return hydra.utils.instantiate(node, _convert_="all", **more)


def plain(node: DictConfig) -> dict[str, Any]:
    """A node with everything in it resolved, as JSON has it."""
    content = OmegaConf.to_container(node, resolve=True)
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}


def splits(data: DictConfig, *, identified: bool = True) -> Splits:
    """The images, with lines that say what was found. Rank 0 is first, so that one process downloads.

    They are `identified`, with progress shown, unless nobody will ask for their digest.
    """
    if ranks.rank() > 0:
        ranks.from_first("")
        found = _splits(data)
    else:
        found = _splits(data)
        ranks.from_first("")
        _tell_found(found)
    if identified:
        _identify(found)
    return found


def _tell_found(found: Splits) -> None:
    labels = f"{len(found.train.classes)} classes" if found.labeled else "no labels"
    if isinstance(found.train, MultiLabeled):
        labels = f"{len(found.train.classes)} classes, several an image"
    counts = f"{len(found.train)} images to train on, {len(found.held_out)} held out"
    console.say(f"data    {found.train.name}: {counts}, {labels}")
    for remark in found.remarks:
        console.say(f"        {remark}")


def _identify(found: Splits) -> None:
    """Make the digests now: a minute of reading files on a slow file server is not to look as if nothing happened."""
    shown = console.progress_if_long if ranks.rank() == 0 else None
    for images in (found.train, found.held_out):
        if isinstance(images, SlowToIdentify):
            images.identify(functools.partial(shown, f"identify {images.split}") if shown else without_progress)


def _splits(data: DictConfig) -> Splits:
    return shards(root=data.shards) if data.get("shards") else call(data.source)


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
        images_per_batch_norm=config.recipe.images_per_batch_norm,
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
        seed_of=lambda step, place: seed_for(Use.PATCHES, config.seed, step, place),
        device=engine.device,
        bf16=engine.bf16,
        cuda_graphs=engine.cuda_graphs,
    )


def patches(config: DictConfig) -> PatchPipeline:
    """How patches are sampled, cut, treated and normalized."""
    return PatchPipeline(grid=call(config.grid), color=call(config.color), normalize=call(config.normalize))


def evaluations(config: DictConfig) -> dict[str, Evaluation]:
    """The evaluations that `eval` names."""
    return {str(name): _evaluation(str(name), node) for name, node in (config.eval or {}).items()}


def _evaluation(name: str, node: DictConfig) -> Evaluation:
    constants = {key: value for key, value in plain(node).items() if key != "data"}
    try:
        return call(OmegaConf.create(constants))
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # it knows its kind, eval.linear, and not what it is called here
            raise UsageError(re.sub(r"\beval\.[a-z0-9_]+", f"eval.{name}", str(error.__cause__))) from error
        raise


def own_data(config: DictConfig) -> list[str]:
    """The evaluations that bring their data set with them, whatever `data` is."""
    return [str(name) for name, node in (config.eval or {}).items() if node.get("data")]


def named_evaluations(config: DictConfig, data: Splits | None) -> list[NamedEvaluation]:
    """The evaluations on their images: `data`, or what they bring; each data set is listed once."""
    listed = {_source(config.data): data} if data else {}
    made = []
    for name, evaluation in evaluations(config).items():
        node = config.eval[name].get("data")
        if node is None and data is not None:
            made.append(NamedEvaluation(name=name, evaluation=evaluation, splits=data))
        elif node is not None:
            source = _source(node)
            listed[source] = listed.get(source) or _brought(name, node)
            share = checks.number("unreadable_share", node.unreadable_share, at_least=0, at_most=1)
            made.append(
                NamedEvaluation(name=name, evaluation=evaluation, splits=listed[source], unreadable_share=share)
            )
    return made


def _brought(name: str, data: DictConfig) -> Splits:
    try:
        return splits(data)
    except InstantiationException as error:
        if isinstance(error.__cause__, DataError):  # which knows of one data set a run only
            raise DataError(str(error.__cause__).replace("data.root", f"eval.{name}.data.root")) from error
        raise


def _source(data: DictConfig) -> str:
    return repr((data.get("shards"), plain(data.source)))


def encode_config(config: DictConfig, engine: Engine, *, told: bool = True) -> EncodeConfig:
    """How full images are read and encoded; with progress shown if `told`."""
    read = EncodeConfig(
        batch=checks.whole("view.batch", config.view.batch),
        workers=engine.workers,
        device=engine.device,
        precision=engine.precision,
        unreadable_share=config.data.unreadable_share,
        encode=engine.compile(encode),
    )
    return dataclasses.replace(read, progress=console.counted) if told and ranks.rank() == 0 else read


def view(config: DictConfig) -> Center:
    """How full images are seen: by monitors, and by evaluations that say nothing else."""
    return Center(short_px=config.view.short_px, crop_px=config.view.crop_px)


def eval_settings(config: DictConfig, engine: Engine) -> EvalSettings:
    """How evaluations are run."""
    ways = [config.batch_norm] if isinstance(config.batch_norm, str) else list(config.batch_norm)
    return EvalSettings(
        encode_config=encode_config(config, engine),
        batch_norms=ways,
        calibration_images=config.calibration_images,
        bank_gib=config.bank_gib,
        seed=checks.whole("seed", config.seed, at_least=0),
    )


def run_dir() -> Path:
    """This run's folder, which Hydra made: rank 0's on every rank."""
    return Path(ranks.from_first(os.path.abspath(HydraConfig.get().runtime.output_dir)))


def computed(config: DictConfig) -> dict[str, Any]:
    """The settings that decide what pretraining computes, flat."""
    settings = flatten(plain(config))
    neutral = tuple(f"{name}." for name in _NEUTRAL)
    return {name: value for name, value in settings.items() if not f"{name}.".startswith(neutral)}


def record(config: DictConfig, name: str, data: Sequence[Splits], engine: Engine, run_dir: Path) -> RunRecord:
    """What a tracker is told of this run."""
    on = engine.device
    devices = [torch.cuda.get_device_name(on)] * ranks.world_size() if on.type == "cuda" else ["cpu"]
    choices = HydraConfig.get().runtime.choices
    tags = {"relloc.kind": HydraConfig.get().job.name, "relloc.run_dir": str(run_dir), "relloc.data": config.data.name}
    tags["relloc.engine"] = str(engine)
    tags["relloc.config"] = identity(plain(config))
    if choices.get("experiment"):
        tags["relloc.preset"] = str(choices["experiment"])
    if os.environ.get("RELLOC_SWEEP"):  # a sweep's launcher says which, and a job's what it is
        tags["relloc.sweep"] = os.environ["RELLOC_SWEEP"]
    tags |= dict(told.split("=", 1) for told in os.environ.get("RELLOC_TAGS", "").split(";") if "=" in told)
    return RunRecord(
        name=name,
        experiment=experiment_name(config.tracking.experiment),
        tracking_uri=config.tracking.uri or "",
        tags=tags | environment_tags(devices),
        params=_params(config),
        datasets=tuple(
            dict.fromkeys(
                _dataset(images, use) for one in data for images, use in ((one.train, "train"), (one.held_out, "eval"))
            )
        ),
    )


def _params(config: DictConfig) -> dict[str, Any]:
    """All settings, flat; of the data that evaluations bring only which it is, not how to pretrain on it."""
    told = {name: node for name, node in plain(config).items() if name not in ("launcher", "sweep", "objective")}
    for node in told["eval"].values():
        if "data" in node:
            node["data"] = {name: node["data"][name] for name in ("name", "root", "shards", "source")}
    return flatten(told)


def _dataset(images: ImageSet, use: str) -> DatasetRecord:
    return DatasetRecord(
        name=f"{images.name}-{images.split}",
        context=use,
        digest=images.digest(),
        source=os.path.dirname(images.source(0)) or "scikit-image, scikit-learn",
        n_images=len(images),
    )
