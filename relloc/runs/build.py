"""From a composed config to the objects of a run, once: below this module nobody sees a config.

Here `pretraining`, `evaluating` and `preparing` see one, and make it plain first.

The objects check themselves, so that a wrong setting is found by building, before data is listed or anything is
computed, and also on a login node without a GPU: `refusals` builds all points of a sweep before any is sent.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relloc import checks, neutral, ranks
from relloc.data.image_set import Splits
from relloc.data.order import StepPlan
from relloc.data.packing import Packing
from relloc.data.views import Center
from relloc.errors import UsageError
from relloc.evaluation.contract import BATCH_NORMS, EvalSettings, Evaluation, NamedEvaluation
from relloc.features.batch_norm import check_one_image
from relloc.features.source import EncodeConfig, encode
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.objective import RelativeLocation, check_batch_norms
from relloc.pretext.schedule import Schedule
from relloc.results import NOT_OURS
from relloc.runs import console
from relloc.runs.data_sets import DataSet
from relloc.runs.engine import Engine, EngineSettings
from relloc.runs.renamed import refuse_old_names
from relloc.runs.settings import conf_dir, plain
from relloc.tracking import absolute_uri, experiment_name, flatten, import_driver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network that is made when it is needed. `settings` are those of conf/model, which a backbone's file tells."""

    name: str
    settings: Mapping[str, Any]
    make_backbone: Callable[[], Backbone]
    make_head: Callable[..., torch.nn.Module]

    def backbone(self, seed: int) -> Backbone:
        """A backbone at the initialization that the seed gives."""
        torch.manual_seed(seed)
        return self.make_backbone()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """What is asked of held-out images every so many epochs of training, None for never."""

    every_epochs: float | None
    images: int
    k: int
    most_share: float

    def __post_init__(self) -> None:
        if self.every_epochs is not None:
            checks.number("monitor.every_epochs", self.every_epochs, at_least=0, at_most=math.inf)
        checks.whole("monitor.images", self.images)
        checks.whole("monitor.k", self.k)
        checks.number("monitor.most_share", self.most_share, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationAsked:
    """An evaluation by the name of its rows, and the data set that it brings; None for that of the run."""

    name: str
    evaluation: Evaluation
    data: DataSet | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What pretraining and evaluating share.

    `view` is how whole images are seen, `view_batch` of them at once. Results of other runs below `reused_runs` are
    used again.
    """

    seed: int
    engine: EngineSettings
    data: DataSet
    evaluations: Sequence[EvaluationAsked]
    view: Center
    view_batch: int
    batch_norms: Sequence[str]
    calibration_images: int
    bank_gib: float
    save_every_s: float
    reused_runs: Path | None

    def __post_init__(self) -> None:
        checks.whole("seed", self.seed, at_least=0)
        checks.whole("view.batch", self.view_batch)
        checks.some_of("batch_norm", self.batch_norms, BATCH_NORMS)
        checks.whole("calibration_images", self.calibration_images)
        checks.number("bank_gib", self.bank_gib, at_least=0, at_most=math.inf)
        checks.number("save_every_s", self.save_every_s, at_least=0, at_most=math.inf)
        lost = [told for one in self.evaluations if one.data and (told := one.data.what_is_missing)]
        if lost:
            raise UsageError(
                f"{len(lost)} evaluations don't know where their data set lies; give {'; '.join(lost)}"
            )

    @property
    def needs_own_data(self) -> bool:
        """Whether the run's data set is read at all: evaluations may all bring their own."""
        return any(one.data is None for one in self.evaluations)

    def check_places(self, made_by_jobs: Sequence[str]) -> None:
        """Raises `UsageError` for what is to be read and is not there; of data as `DataSet.check_folders`."""
        if self.needs_own_data:
            self.data.check_folders(made_by_jobs)
        for one in self.evaluations:
            if one.data:
                one.data.check_folders(made_by_jobs)

    def encode_config(self, engine: Engine, *, shown: bool = True) -> EncodeConfig:
        """How whole images are read and encoded; with progress if `shown`."""
        config = EncodeConfig(
            batch=self.view_batch,
            workers=engine.workers,
            device=engine.device,
            precision=engine.precision,
            unreadable_share=self.data.unreadable_share,
            encode=engine.compile(encode),
        )
        return (
            dataclasses.replace(config, progress=console.counted)
            if shown and ranks.rank() == 0
            else config
        )

    def eval_settings(self, engine: Engine) -> EvalSettings:
        """How evaluations are run."""
        return EvalSettings(
            encode_config=self.encode_config(engine),
            batch_norms=self.batch_norms,
            calibration_images=self.calibration_images,
            bank_gib=self.bank_gib,
            seed=self.seed,
        )

    def named_evaluations(self, own: Splits | None) -> list[NamedEvaluation]:
        """The evaluations on their images: the run's `own`, or what they bring; each data set is listed once."""
        listed = {self.data.images: own} if own else {}
        found = []
        for one in self.evaluations:
            data = one.data or self.data
            if data.images not in listed:
                listed[data.images] = data.read()
            named = NamedEvaluation(
                name=one.name,
                evaluation=one.evaluation,
                splits=listed[data.images],
                unreadable_share=one.data.unreadable_share if one.data else None,
                how_to_give=one.data.how_to_give if one.data else "",
            )
            found.append(named)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(RunSettings):
    """A pretraining; the evaluations come at its end.

    `identity` has the settings that decide what is computed, by name: a run is resumed with the same ones.
    `images_per_forward` and `collapse_steps` are None where they follow from others.
    """

    model: Model
    patches: PatchPipeline
    schedule: Schedule
    recipe_epochs: float
    make_optimizer: Callable[..., torch.optim.Optimizer]
    batch_norm: str
    images_per_step: int
    images_per_batch_norm: int
    images_per_forward: int | None
    collapse_steps: int | None
    milestones: Sequence[float]
    report_every_steps: int
    monitor: MonitorSettings
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("recipe.images_per_step", self.images_per_step)
        checks.whole("recipe.images_per_batch_norm", self.images_per_batch_norm)
        if self.images_per_forward is not None:
            checks.whole("images_per_forward", self.images_per_forward)
        if self.collapse_steps is not None:
            checks.whole("collapse_steps", self.collapse_steps)
        checks.whole("report_every_steps", self.report_every_steps)
        checks.numbers("milestones", self.milestones, at_least=0, may_be_empty=True)
        StepPlan(  # what divides at best, in one process
            n_images=self.images_per_step,
            images_per_step=self.images_per_step,
            images_per_batch_norm=self.images_per_batch_norm,
            images_per_forward=self.images_per_forward or self.images_per_batch_norm,
        )

    @property
    def needs_own_data(self) -> bool:
        return True

    @property
    def about(self) -> dict[str, Any]:
        """What files of weights tell of themselves: enough to build the backbone, and how it came to be."""
        return {"model": dict(self.model.settings), "computed": dict(self.identity)}

    def network(self, *, one_pass: bool = False) -> RelativeLocation:
        """Backbone and head at the initialization that the seed gives."""
        backbone = self.model.backbone(self.seed)
        return RelativeLocation(
            backbone,
            self.model.make_head(embedding_dim=backbone.embedding_dim),
            batch_norm=self.batch_norm,  # pyright: ignore[reportArgumentType] - which it checks
            images_per_batch_norm=self.images_per_batch_norm,
            one_pass=one_pass,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating(RunSettings):
    """Evaluations of the backbones that `checkpoints` name; without a `model`, that of each file."""

    checkpoints: Sequence[str]
    checkpoint_prefix: str | None
    model: Model | None
    verdict: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints or any(
            not isinstance(one, str) or not one for one in self.checkpoints
        ):
            raise UsageError(
                f"checkpoint={self.checkpoints} names no backbone: give a run folder, a file, or random"
            )
        if not self.evaluations:
            raise UsageError(
                "eval=[] leaves nothing to do: name evaluations, such as eval=[linear_fast,knn]"
            )

    def check_places(self, made_by_jobs: Sequence[str]) -> None:
        for name in self.checkpoints:
            if name not in NOT_OURS and not Path(name).exists():
                places = f"a run folder, a file, or {' or '.join(NOT_OURS)}"
                raise UsageError(f"checkpoint={name} is not there: give {places}")
        super().check_places(made_by_jobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparing:
    """Checking a data set, and packing it into `out`, None for checking alone. `workers` is None for all cores."""

    data: DataSet
    published: Mapping[str, int] | None
    out: str | None
    packing: Packing
    workers: int | None

    def __post_init__(self) -> None:
        if self.workers is not None:
            checks.whole("workers", self.workers)
        if self.out == "":
            raise UsageError(
                "out= names no folder: give out=FOLDER to pack into, or leave it out to check only"
            )
        if self.out is not None and self.data.shards:
            raise UsageError(
                "data.shards names images that are packed already: give data.root to pack the originals"
            )


def pretraining(config: DictConfig) -> Pretraining:
    """What relloc.train is to do. Raises `UsageError`, or what Hydra raises of a call that can't be made."""
    given = plain(config)
    if "checkpoint" in given:
        raise UsageError(
            "this experiment evaluates checkpoints: run it with python -m relloc.evaluate"
        )
    settings = Pretraining(
        **_shared(given),
        model=_model(given["model"]),
        patches=PatchPipeline(
            **{name: call(name, given[name]) for name in ("grid", "color", "normalize")}
        ),
        schedule=call("schedule", given["schedule"]),
        recipe_epochs=given["recipe"]["epochs"],
        make_optimizer=functools.partial(call, "optimizer", given["optimizer"]),
        batch_norm=given["pretext_batch_norm"],
        images_per_step=given["recipe"]["images_per_step"],
        images_per_batch_norm=given["recipe"]["images_per_batch_norm"],
        images_per_forward=_unless_auto(given["images_per_forward"]),
        collapse_steps=_unless_auto(given["collapse_steps"]),
        milestones=given["milestones"],
        report_every_steps=given["report_every_steps"],
        monitor=MonitorSettings(**given["monitor"]),
        identity=neutral.settings_of_weights(flatten(given)),
    )
    # The slow checks come last. Many points of a sweep have the same network.
    names = ("model", "optimizer", "pretext_batch_norm")
    _check_network(
        json.dumps({name: given[name] for name in names}),
        settings.images_per_batch_norm,
        settings.patches.grid.patch_px,
    )
    if settings.evaluations and "recalibrated" in settings.batch_norms and settings.view_batch == 1:
        check_one_image(settings.model.backbone(settings.seed), settings.view.crop_px)
    return settings


def evaluating(config: DictConfig) -> Evaluating:
    """What relloc.evaluate is to do. Raises as `pretraining`."""
    given = plain(config)
    asked: Any = (
        given["checkpoint"] if config.checkpoint is not None else None
    )  # unset, the config says so itself
    return Evaluating(
        **_shared(given),
        checkpoints=asked if isinstance(asked, list) else [asked],
        checkpoint_prefix=given["checkpoint_prefix"],
        model=_model(given["model"]) if given.get("model") else None,
        verdict=given["verdict"],
    )


def preparing(config: DictConfig) -> Preparing:
    """What relloc.prepare is to do. Raises as `pretraining`."""
    given = plain(config)
    names = ("short_px", "quality", "subsampling", "images_per_shard")
    return Preparing(
        data=_data_set("data", given["data"]),
        published=given["data"]["source"].get("published_images"),
        out=given["out"],
        packing=Packing(**{name: given[name] for name in names}),
        workers=_unless_auto(given["workers"]),
    )


def refusals(
    command: str, configs: Sequence[DictConfig], made_by_jobs: Sequence[str] = ()
) -> list[str | None]:
    """Why each point of a sweep can't be run, in one line; None for those that nothing is known against.

    Whether the machine has the GPU, and whether the images are any good, is seen where the point runs. Folders of data
    that stand in `made_by_jobs`, lines of a batch script, are not looked for.
    """
    make = pretraining if command == "train" else evaluating
    found: list[str | None] = []
    for config in configs:
        try:
            make(config).check_places(made_by_jobs)
            found.append(None)
        # A TypeError is of a value of another kind.
        except (UsageError, InstantiationException, TypeError, OmegaConfBaseException) as error:
            found.append(" ".join(str(error).split()))
    return found


def call(setting: str, node: Mapping[str, Any], **more: Any) -> Any:
    """What the `_target_` of a plain node makes of its keys and `more`.

    A mistake in a setting is raised as the target tells it, without Hydra's words around it; Hydra's own errors name
    `setting`, where users have the node.
    """
    config = OmegaConf.create()
    OmegaConf.update(config, setting, node)
    try:
        return hydra.utils.instantiate(OmegaConf.select(config, setting), _convert_="all", **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ValueError):
            raise UsageError(str(error.__cause__)) from error
        raise


def model_of_conf(member: str) -> Model:
    """A member of conf/model."""
    return _model(plain(OmegaConf.load(conf_dir() / "model" / f"{member}.yaml")))


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `RunSettings`."""
    refuse_old_names(flatten(given))  # a user's preset or data set may still have them
    _check_tracking(**given["tracking"])
    batch_norm, view = given["batch_norm"], given["view"]
    engine = {field.name: given[field.name] for field in dataclasses.fields(EngineSettings)}
    return {
        **{
            name: given[name] for name in ("seed", "calibration_images", "bank_gib", "save_every_s")
        },
        "engine": EngineSettings(**engine),
        "data": _data_set("data", given["data"]),
        "evaluations": [_evaluation(name, node) for name, node in (given["eval"] or {}).items()],
        "view": Center(short_px=view["short_px"], crop_px=view["crop_px"]),
        "view_batch": view["batch"],
        "batch_norms": [batch_norm] if isinstance(batch_norm, str) else batch_norm,
        "reused_runs": Path(given["runs"]) if given["reuse"] else None,
    }


def _check_tracking(uri: str | None, experiment: str) -> None:
    """Raises `UsageError` for an address that is none, and a name that MLflow refuses; asks no server."""
    if uri is not None:
        try:
            import_driver(absolute_uri(uri))
        except UsageError as error:
            raise UsageError(f"tracking.uri: {error}; tracking=none does without MLflow") from error
    try:
        experiment_name(experiment, uri)
    except UsageError as error:
        raise UsageError(f"tracking.experiment: {error}") from error


def _data_set(setting: str, node: Mapping[str, Any]) -> DataSet:
    return DataSet(
        setting=setting,
        name=str(node["name"]),
        shards=node.get("shards"),
        unreadable_share=node["unreadable_share"],
        source=node["source"],
        list_images=functools.partial(call, f"{setting}.source", node["source"]),
    )


def _model(node: Mapping[str, Any]) -> Model:
    return Model(
        name=str(node["name"]),
        settings=node,
        make_backbone=functools.partial(call, "model.backbone", node["backbone"]),
        make_head=functools.partial(call, "model.head", node["head"]),
    )


def _evaluation(name: str, node: Mapping[str, Any]) -> EvaluationAsked:
    constants = {key: value for key, value in node.items() if key != "data"}
    try:
        evaluation = call(f"eval.{name}", constants)
    except UsageError as error:  # it knows its kind, eval.linear, and not what it is called here
        raise UsageError(re.sub(r"\beval\.[a-z0-9_]+", f"eval.{name}", str(error))) from error
    data = _data_set(f"eval.{name}.data", node["data"]) if node.get("data") else None
    return EvaluationAsked(name=name, evaluation=evaluation, data=data)


def _unless_auto(value: Any) -> Any:
    return None if value == "auto" else value


@functools.cache
def _check_network(nodes: str, images_per_batch_norm: int, patch_px: int) -> None:
    """Make the network and its optimizer, without memory for the weights.

    Raises `UsageError` where one can't be made, or a batch norm would be trained on one value a channel.
    """
    given = json.loads(nodes)
    model = _model(given["model"])
    with torch.device("meta"):
        backbone = model.make_backbone()
        network = RelativeLocation(
            backbone,
            model.make_head(embedding_dim=backbone.embedding_dim),
            batch_norm=given["pretext_batch_norm"],
            images_per_batch_norm=images_per_batch_norm,
        )
        check_batch_norms(network, patch_px)
        call("optimizer", given["optimizer"], model=network)
