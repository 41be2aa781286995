"""Builds the objects of a run from a composed config.

`pretraining`, `evaluating` and `preparing` turn a config into frozen dataclasses; the code that
gets these sees no config.

The dataclasses check themselves, so that building finds a wrong setting before images are listed or
anything is computed, also on a login node without a GPU: `refusals` builds all points of a sweep
before any is submitted.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from relloc.data.packing import Packing, packing_of
from relloc.data.views import Center
from relloc.errors import MissingData, UsageError
from relloc.evaluation.contract import BATCH_NORMS, EvalSettings, Evaluation, NamedEvaluation
from relloc.features.batch_norm import check_one_image
from relloc.features.source import EncodeConfig, encode
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.relative_location import RelativeLocation, check_batch_norms
from relloc.pretext.schedule import Schedule
from relloc.results import NO_FILES, PERSON, REFERENCE_MODELS
from relloc.runs import console
from relloc.runs.data_sets import DATA_PAGE, DataSet
from relloc.runs.engine import Engine, EngineSettings
from relloc.runs.renamed import refuse_old_names
from relloc.runs.settings import EVALUATION_GROUPS, conf_dir, content_of, plain, resolved
from relloc.terminal import quantity
from relloc.tracking import absolute_uri, experiment_name, flatten, import_driver

# What may become of an evaluation whose data set is not there
MISSING_DATA = ("error", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network that is made when it is needed.

    `settings` are those of conf/model, which are also written into the file of a backbone.
    """

    name: str
    settings: Mapping[str, Any]
    make_backbone: Callable[[], Backbone]
    make_head: Callable[..., torch.nn.Module]

    def backbone(self, seed: int) -> Backbone:
        """Returns a backbone initialized with the seed `seed`."""
        # Layers draw their initial weights from the global generator of PyTorch.
        torch.manual_seed(seed)
        return self.make_backbone()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """Settings of the monitors, which measure the network on held-out images during training.

    They run every `every_epochs` epochs, or never if that is None.
    """

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
class ChosenEvaluation:
    """An evaluation, the name of its results, and its data set, or None for that of the run.

    `group` is the config group that it was chosen from: "eval" or "study". `shared_view` has the
    names of the settings of the run's `view` that it takes its own from.
    """

    name: str
    group: str
    evaluation: Evaluation
    data: DataSet | None
    shared_view: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings that pretraining and evaluating share.

    `view` crops and resizes whole images, of which `view_batch` are encoded at once. Results of
    other runs in the folder `reused_runs` are used again. `missing_data` says what becomes of an
    evaluation whose data set is not there: "error" ends the run, "skip" leaves the evaluation out.
    With `report` the run ends in the report of its results beside the published ones.
    """

    seed: int
    engine: EngineSettings
    data: DataSet
    evaluations: Sequence[ChosenEvaluation]
    view: Center
    view_batch: int
    batch_norms: Sequence[str]
    calibration_images: int
    bank_gib: float
    save_every_s: float
    reused_runs: Path | None
    missing_data: str
    report: bool

    def __post_init__(self) -> None:
        checks.whole("seed", self.seed, at_least=0)
        checks.one_of("missing_data", self.missing_data, MISSING_DATA)
        checks.whole("view.batch", self.view_batch)
        checks.some_of("batch_norm", self.batch_norms, BATCH_NORMS)
        checks.whole("calibration_images", self.calibration_images)
        checks.number("bank_gib", self.bank_gib, at_least=0, at_most=math.inf)
        checks.number("save_every_s", self.save_every_s, at_least=0, at_most=math.inf)
        missing = [one for one in self.evaluations if one.data and one.data.missing_setting]
        # Evaluations may be left out, but not all of them.
        is_error = self.missing_data == "error" or len(missing) == len(self.evaluations)
        if missing and is_error:
            lost = quantity(
                len(missing),
                "evaluation doesn't know where its data set lies",
                "evaluations don't know where their data set lies",
            )
            listed = "\n  ".join(_missing_data_sets(missing))
            raise UsageError(
                f"{lost}. Unpack each data set into a folder, and name the folder by its variable "
                f"or setting ({DATA_PAGE}):\n  {listed}"
            )

    @property
    def needs_own_data(self) -> bool:
        """Whether the run's own data set is read, which is not so if each evaluation brings one."""
        return any(one.data is None for one in self.evaluations)

    def used_view_settings(self, batch_norms: Sequence[str]) -> set[str]:
        """Returns which settings of `view`, such as "crop_px", the evaluations make use of.

        Many have a view of their own. `batch` is the number of images that are encoded at once
        where batch norm is recalibrated, and where features are kept; `batch_norms` says whether
        it is recalibrated.
        """
        used: set[str] = set()
        for chosen in self.evaluations:
            evaluation = chosen.evaluation
            used |= chosen.shared_view
            is_recalibrated = evaluation.kind != "fine-tuned" and "recalibrated" in batch_norms
            keeps_features = evaluation.keeps_features or evaluation.tests_in_shared_batches
            if is_recalibrated or keeps_features:
                used.add("batch")
        return used

    def check_paths(self, made_by_jobs: Sequence[str]) -> None:
        """Raises `UsageError` if a file or folder that is to be read does not exist.

        `made_by_jobs` is passed to `DataSet.check_folders`.
        """
        if self.needs_own_data:
            self.data.check_folders(made_by_jobs)
        for chosen in self.evaluations:
            # A data set that no setting names is an error before this, or left out.
            if chosen.data and not chosen.data.missing_setting:
                chosen.data.check_folders(made_by_jobs)

    def encode_config(self, engine: Engine, *, shown: bool = True) -> EncodeConfig:
        """Returns how whole images are read and encoded, with a progress bar if `shown`."""
        config = EncodeConfig(
            batch=self.view_batch,
            workers=engine.workers,
            device=engine.device,
            precision=engine.precision,
            unreadable_share=self.data.unreadable_share,
            encode=engine.compile(encode),
            compile=engine.compile_training,
        )
        # Several processes would draw their bars over each other.
        if shown and ranks.rank() == 0:
            return dataclasses.replace(config, progress=console.counted)
        return config

    def eval_settings(self, engine: Engine) -> EvalSettings:
        """Returns the settings that all evaluations of the run share."""
        return EvalSettings(
            encode_config=self.encode_config(engine),
            batch_norms=self.batch_norms,
            calibration_images=self.calibration_images,
            bank_gib=self.bank_gib,
            seed=self.seed,
        )

    def named_evaluations(self, own: Splits | None) -> tuple[list[NamedEvaluation], dict[str, str]]:
        """Returns the evaluations with their images: the run's `own`, or those they bring.

        A data set that several evaluations bring is listed once. The dictionary has the reason for
        each evaluation that is left out because its data set is not there, by its name.

        Raises:
            MissingData: the data set of an evaluation is not there, and it is not to be left out;
                or none is there.
            DataError: images can't be listed.
        """
        # Data sets that were listed already, by a text that is equal for equal images
        listed = {self.data.images: own} if own else {}
        evaluations = []
        left_out: dict[str, str] = {}
        for chosen in self.evaluations:
            data = chosen.data or self.data
            if data.images not in listed:
                try:
                    listed[data.images] = data.read()
                except MissingData as error:
                    if self.missing_data == "error":
                        raise
                    left_out[chosen.name] = str(error)
                    continue
            named = NamedEvaluation(
                name=chosen.name,
                group=chosen.group,
                evaluation=chosen.evaluation,
                splits=listed[data.images],
                # None for the run's own data, whose share `encode_config` passes on
                unreadable_share=chosen.data.unreadable_share if chosen.data else None,
                how_to_give=chosen.data.how_to_give if chosen.data else "",
            )
            evaluations.append(named)
        if left_out and not evaluations:
            listed = "\n  ".join(dict.fromkeys(left_out.values()))
            raise MissingData(
                f"none of {quantity(len(left_out), 'evaluation')} has its data set "
                f"({DATA_PAGE} tells what to unpack where):\n  {listed}"
            )
        return evaluations, left_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(RunSettings):
    """A pretraining, and the evaluations at its end.

    `identity` maps the names of the settings that decide what is computed to their values: a run is
    resumed only with the same ones. `images_per_forward` and `collapse_steps` are None where they
    follow from other settings.
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
        # Numbers of images and steps, each by the name of its setting
        checks.whole("recipe.images_per_step", self.images_per_step)
        checks.whole("recipe.images_per_batch_norm", self.images_per_batch_norm)
        if self.images_per_forward is not None:
            checks.whole("images_per_forward", self.images_per_forward)
        if self.collapse_steps is not None:
            checks.whole("collapse_steps", self.collapse_steps)
        checks.whole("report_every_steps", self.report_every_steps)
        checks.numbers("milestones", self.milestones, at_least=0, may_be_empty=True)
        # Checks that the batches divide. One process divides them in the most ways; how many
        # processes there are is known only where the run starts.
        StepPlan(
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
        """What a file of weights says of itself: the model's settings and those of its training."""
        return {"model": dict(self.model.settings), "computed": dict(self.identity)}

    def network(self, *, one_pass: bool = False) -> RelativeLocation:
        """Returns the backbone and its head, initialized with the seed.

        `one_pass` is passed to `RelativeLocation`.
        """
        backbone = self.model.backbone(self.seed)
        head = self.model.make_head(embedding_dim=backbone.embedding_dim)
        return RelativeLocation(
            backbone,
            head,
            batch_norm=self.batch_norm,  # pyright: ignore[reportArgumentType] - which it checks
            images_per_batch_norm=self.images_per_batch_norm,
            one_pass=one_pass,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating(RunSettings):
    """Evaluations of the backbones that `checkpoints` name.

    A `model` of None stands for the one that each checkpoint's file names.
    """

    checkpoints: Sequence[str]
    checkpoint_prefix: str | None
    model: Model | None
    verdict: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        are_names = all(isinstance(name, str) and name for name in self.checkpoints)
        if not self.checkpoints or not are_names:
            raise UsageError(
                f"checkpoint={self.checkpoints} names no backbone: "
                "give a run folder, a file, or random"
            )
        if not self.evaluations:
            raise UsageError(
                "study=[] with eval=[] leaves nothing to do: give relloc.study one such as "
                "study=neighbors (--help study lists them), or relloc.evaluate some such as "
                "eval=[linear_fast,knn]"
            )
        if PERSON in self.checkpoints:
            self._check_person()
        self._refuse_unused_view()

    def _check_person(self) -> None:
        """Raises `UsageError` where a person is asked for what only a network can answer."""
        for chosen in self.evaluations:
            if chosen.evaluation.needs_network:
                raise UsageError(
                    f"checkpoint={PERSON} stands for a person without a network, and "
                    f"{chosen.group}={chosen.name} looks into one: give checkpoint=RUN_FOLDER, or "
                    f"leave {chosen.name} out"
                )
        if self.model is not None and set(self.checkpoints) == {PERSON}:
            raise UsageError(
                f"model={self.model.name} would change nothing, since checkpoint={PERSON} is a "
                "person without a network: leave it out, or give checkpoint=RUN_FOLDER"
            )

    def _refuse_unused_view(self) -> None:
        """Raises `UsageError` for a setting of `view` that was given and changes nothing."""
        given = {
            "short_px": self.view.short_px,
            "crop_px": self.view.crop_px,
            "batch": self.view_batch,
        }
        by_default = content_of("_settings")["view"]
        used = self.used_view_settings(self.batch_norms)
        unused = []
        for name, value in given.items():
            if value != by_default[name] and name not in used:
                unused.append(f"view.{name}={value}")
        if unused:
            names = [chosen.name for chosen in self.evaluations]
            listed = names[0] if len(names) == 1 else f"[{','.join(names)}]"
            group = self.evaluations[0].group
            own = f"{group}.{names[0]}"
            raise UsageError(
                f"{' '.join(unused)} would change nothing of {group}={listed}, which has settings "
                f"of its own, such as those of {own}.view and {own}.batch: give these (--help "
                f"{group}={names[0]} lists them), or leave it out"
            )

    def check_paths(self, made_by_jobs: Sequence[str]) -> None:
        for name in self.checkpoints:
            if name not in NO_FILES and not Path(name).exists():
                raise UsageError(
                    f"checkpoint={name} is not there: "
                    f"give a run folder, a file, or {' or '.join(REFERENCE_MODELS)}"
                )
        super().check_paths(made_by_jobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparing:
    """A check of a data set and, unless `out` is None, the packing of its images into `out`.

    `workers` is the number of processes, None for one per core.
    """

    data: DataSet
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
                "data.shards names images that are packed already: "
                "give data.root to pack the originals"
            )


def pretraining(config: DictConfig) -> Pretraining:
    """Builds what relloc.train runs.

    Raises:
        UsageError: a setting is wrong.
        InstantiationException: a `_target_` can't be called with its settings.
    """
    given = resolved(config)
    # A preset of relloc.evaluate composes here too, but means something else; so does a study that
    # names a checkpoint, as that of people, for whom no training should wait.
    if "checkpoint" in given:
        raise UsageError(
            "this experiment or study evaluates checkpoints: run it with python -m relloc.evaluate "
            "experiment=… or python -m relloc.study study=…"
        )
    settings = Pretraining(
        **_shared(config, given),
        model=_model(given["model"]),
        patches=PatchPipeline(
            **{name: call(name, given[name]) for name in ("grid", "color", "normalize")}
        ),
        schedule=call("schedule", given["schedule"]),
        recipe_epochs=given["recipe"]["epochs"],
        # Made later, when the network exists whose weights it updates
        make_optimizer=functools.partial(call, "optimizer", given["optimizer"]),
        batch_norm=given["pretext_batch_norm"],
        images_per_step=given["recipe"]["images_per_step"],
        images_per_batch_norm=given["recipe"]["images_per_batch_norm"],
        images_per_forward=_unless_auto(given["images_per_forward"]),
        collapse_steps=_unless_auto(given["collapse_steps"]),
        milestones=given["milestones"],
        report_every_steps=given["report_every_steps"],
        monitor=MonitorSettings(**given["monitor"]),
        # The settings that decide the weights: without launcher, tracking, paths and the like
        identity=neutral.settings_of_weights(flatten(given)),
    )
    # The slow checks come last. They are cached by the text of the nodes, since many points of a
    # sweep have the same network.
    names = ("model", "optimizer", "pretext_batch_norm")
    _check_network(
        json.dumps({name: given[name] for name in names}),
        settings.images_per_batch_norm,
        settings.patches.grid.patch_px,
    )
    # Days of training come before an evaluation that its network will not do for.
    if settings.evaluations:
        backbone = _backbone_without_memory(json.dumps(given["model"]))
        for chosen in settings.evaluations:
            chosen.evaluation.check_network(backbone)
    # Recalibration would estimate batch statistics from one image, which not every view allows.
    if settings.evaluations and "recalibrated" in settings.batch_norms and settings.view_batch == 1:
        check_one_image(settings.model.backbone(settings.seed), settings.view.crop_px)
    return settings


def evaluating(config: DictConfig) -> Evaluating:
    """Builds what relloc.evaluate runs. Raises what `pretraining` raises."""
    given = resolved(config)
    # Reading a checkpoint that is not set raises Hydra's own error, which names the setting.
    named: Any = given["checkpoint"] if config.checkpoint is not None else None
    return Evaluating(
        **_shared(config, given),
        checkpoints=named if isinstance(named, list) else [named],
        checkpoint_prefix=given["checkpoint_prefix"],
        model=_model(given["model"]) if given.get("model") else None,
        verdict=given["verdict"],
    )


def preparing(config: DictConfig) -> Preparing:
    """Builds what relloc.prepare runs. Raises what `pretraining` raises."""
    given = resolved(config)
    # Those that the format decides where they are "auto"
    names = ("enlarge", "quality", "subsampling", "images_per_shard")
    return Preparing(
        data=_data_set("data", given["data"]),
        out=given["out"],
        packing=packing_of(
            format=given["format"],
            short_px=given["short_px"],
            **{name: _unless_auto(given[name]) for name in names},
        ),
        workers=_unless_auto(given["workers"]),
    )


def refusals(
    command: str, configs: Sequence[DictConfig], made_by_jobs: Sequence[str] = ()
) -> list[str | None]:
    """Returns for each point of a sweep why it can't be run, in one line, or None.

    Whether there is a GPU, and whether the images can be read, is checked where the point runs.
    Folders of data that are named in `made_by_jobs`, the lines of a batch script, need not exist.
    """
    build = pretraining if command == "train" else evaluating
    reasons: list[str | None] = []
    for config in configs:
        try:
            build(config).check_paths(made_by_jobs)
            reasons.append(None)
        # A setting of the wrong type raises TypeError.
        except (UsageError, InstantiationException, TypeError, OmegaConfBaseException) as error:
            one_line = " ".join(str(error).split())
            reasons.append(one_line)
    return reasons


def call(setting: str, node: Mapping[str, Any], **more: Any) -> Any:
    """Calls the `_target_` of a plain node with its keys and `more`, and returns the result.

    A mistake in a setting is raised as the target raised it, without Hydra's words around it.
    Hydra's own errors name `setting`, the full name of the node.
    """
    # Hydra names a node by its place in a config, so that it is put where users have it.
    config = OmegaConf.create()
    OmegaConf.update(config, setting, node)
    try:
        return hydra.utils.instantiate(OmegaConf.select(config, setting), _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise UsageError(str(cause)) from error
        raise


def model_of_conf(member: str) -> Model:
    """Builds the model of a member of conf/model, such as `resnet50`."""
    return _model(plain(OmegaConf.load(conf_dir() / "model" / f"{member}.yaml")))


def _shared(config: DictConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `RunSettings`; `given` are the resolved settings of `config`."""
    # Presets and data sets of users may still have names of earlier versions.
    refuse_old_names(flatten(given))
    _check_tracking(**given["tracking"])
    batch_norm = given["batch_norm"]
    view = given["view"]
    # Settings of the engine are at the top of the config, under the names of its fields.
    engine = {field.name: given[field.name] for field in dataclasses.fields(EngineSettings)}
    chosen = []
    for group in EVALUATION_GROUPS:
        for name, node in given[group].items():
            unresolved = OmegaConf.to_yaml(config[group][name])
            # Interpolations say which settings of the run's view it takes over.
            shared_view = frozenset(re.findall(r"\$\{view\.(\w+)\}", unresolved))
            chosen.append(_evaluation(group, name, node, shared_view))
    return {
        "seed": given["seed"],
        "calibration_images": given["calibration_images"],
        "bank_gib": given["bank_gib"],
        "save_every_s": given["save_every_s"],
        "engine": EngineSettings(**engine),
        "data": _data_set("data", given["data"]),
        "evaluations": chosen,
        "view": Center(short_px=view["short_px"], crop_px=view["crop_px"]),
        "view_batch": view["batch"],
        "batch_norms": [batch_norm] if isinstance(batch_norm, str) else batch_norm,
        "reused_runs": Path(given["runs"]) if given["reuse"] else None,
        "missing_data": given["missing_data"],
        "report": given["report"],
    }


def _check_tracking(uri: str | None, experiment: str) -> None:
    """Raises `UsageError` for an invalid tracking address or an experiment name MLflow refuses.

    No server is contacted.
    """
    # Importing the driver of the address finds a misspelt scheme, or a missing package.
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


def _evaluation(
    group: str, name: str, node: Mapping[str, Any], shared_view: frozenset[str]
) -> ChosenEvaluation:
    # The data set is built here; everything else in the node is for the evaluation itself.
    constants = {key: value for key, value in node.items() if key != "data"}
    try:
        evaluation = call(f"{group}.{name}", constants)
    except UsageError as error:
        # The evaluation names its kind, such as eval.linear, and doesn't know the name it has here.
        message = re.sub(r"\b(eval|study)\.[a-z0-9_]+", f"{group}.{name}", str(error))
        raise UsageError(message) from error
    data = _data_set(f"{group}.{name}.data", node["data"]) if node.get("data") else None
    return ChosenEvaluation(
        name=name, group=group, evaluation=evaluation, data=data, shared_view=shared_view
    )


def _missing_data_sets(evaluations: Sequence[ChosenEvaluation]) -> Iterator[str]:
    """Yields a line for each data set that no setting says the place of.

    It has the variable and the setting that would say it, and what the folder is to hold.
    """
    names_of: dict[str, list[str]] = {}
    data_of: dict[str, DataSet] = {}
    for one in evaluations:
        if one.data:
            # Evaluations of equal images share a line.
            names_of.setdefault(one.data.images, []).append(one.name)
            data_of.setdefault(one.data.images, one.data)
    for images, data in data_of.items():
        names = ",".join(names_of[images])
        # As shells expand it, where there are several.
        listed = f"{{{names}}}" if "," in names else names
        line = f"{data.variable} or eval.{listed}.data.root=FOLDER"
        yield f"{line}: {data.holding}" if data.holding else line


def _unless_auto(value: Any) -> Any:
    return None if value == "auto" else value


@functools.cache
def _backbone_without_memory(node: str) -> Backbone:
    """Returns the backbone of a model, in evaluation mode, without memory for the weights."""
    # Tensors on PyTorch's meta device have shapes but no storage.
    with torch.device("meta"):
        return _model(json.loads(node)).make_backbone().eval()


@functools.cache
def _check_network(nodes: str, images_per_batch_norm: int, patch_px: int) -> None:
    """Makes the network and its optimizer, without memory for the weights.

    Raises `UsageError` where one can't be made, or a batch norm would be trained on one value per
    channel, of which there is no variance.
    """
    given = json.loads(nodes)
    model = _model(given["model"])
    # Tensors on PyTorch's meta device have shapes but no storage.
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
