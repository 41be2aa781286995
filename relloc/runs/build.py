"""Builds the objects of a run from a composed config.

`pretraining`, `evaluating` and `preparing` turn a config into the frozen dataclasses of
`command_settings.py`; the code that gets these sees no config.

Building finds a wrong setting before images are listed or anything is computed, also on a login
node without a GPU: `refusals` builds all points of a sweep before any is submitted.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relloc import neutral
from relloc.data.packing import packing_of
from relloc.data.views import Center
from relloc.errors import UsageError
from relloc.evaluation.strides import in_strides, strides_of
from relloc.features.batch_norm import check_one_image, has_batch_norm
from relloc.geometry import PatchGrid
from relloc.models.backbone import Backbone
from relloc.patches.curriculum import TrainingPatches, check_effects
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.answers import check_distances, with_answers
from relloc.pretext.questions import CENTER_PAIRS, Questions, head_sizes
from relloc.pretext.relative_location import RelativeLocation, check_batch_norms
from relloc.runs.command_settings import (
    Evaluating,
    Model,
    MonitorSettings,
    Preparing,
    Pretraining,
    WatchSettings,
)
from relloc.runs.data_sets import DataSet
from relloc.runs.engine import EngineSettings
from relloc.runs.instantiation import call
from relloc.runs.renamed import refuse_old_names
from relloc.runs.run_settings import DECODES, ChosenEvaluation
from relloc.runs.settings import EVALUATION_GROUPS, conf_dir, content_of, plain, resolved
from relloc.tracking import absolute_uri, experiment_name, flatten, import_driver


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
    _check_groups(given)
    training_patches = _training_patches(given)
    settings = Pretraining(
        **_shared(config, given),
        model=_model(given["model"]),
        # Settings of runs that are older than this one lack it.
        flip=given.get("pretext_flip", 0),
        training_patches=training_patches,
        questions=with_answers(
            _pairs(given, training_patches.patches.grid),
            training_patches.patches,
            # Older ones lack this one, too.
            given.get("pretext_answers", "classes"),
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
        save_recalibrated=given["save_recalibrated"],
        report_every_steps=given["report_every_steps"],
        monitor=MonitorSettings(**given["monitor"]),
        # The settings that decide the weights: without launcher, tracking, paths and the like
        identity=neutral.settings_of_weights(flatten(given)),
    )
    check_effects(training_patches)
    check_distances(settings.questions, training_patches)
    # The slow checks come last. They are cached by the text of the nodes, since many points of a
    # sweep have the same network.
    names = ("model", "optimizer", "pretext_batch_norm")
    _check_network(
        json.dumps({name: given[name] for name in names}),
        settings.questions,
        settings.images_per_batch_norm,
        settings.patches.grid.patch_px,
    )
    _check_what_follows(settings)
    return settings


def _check_groups(given: Mapping[str, Any]) -> None:
    """Raises `UsageError` where a group that every training needs was taken out."""
    if not given.get("monitor"):
        raise UsageError(
            "'~monitor' takes out settings that a training needs: give monitor.every_epochs=null, "
            "with which nothing is measured in its course"
        )
    for name in ("grid", "color", "normalize", "optimizer", "schedule", "model"):
        # Where `~color` takes the group out of a preset, its settings stay without the `_target_`.
        node = given.get(name) or {}
        if "_target_" in node or "backbone" in node:
            continue
        without = "color=none treats no colors" if name == "color" else f"see --help {name}"
        raise UsageError(f"'~{name}' takes out what a training needs: give {name}=…; {without}")


def _check_what_follows(settings: Pretraining) -> None:
    """Checks that the network will do for what comes in and after days of training.

    Raises:
        UsageError: an evaluation can't work on it, its batch norm can't be recalibrated, or images
            can't hold the 3x3 grid of held-out questions.
    """
    names_positions = settings.questions.columns_of_positions() is not None
    if names_positions:
        _check_grid_about_center(settings.patches)
    backbone = _backbone_without_memory(json.dumps(settings.model.settings))
    for chosen in settings.evaluations:
        if chosen.evaluation.needs_pretext and not names_positions:
            raise UsageError(
                f"{chosen.group}.{chosen.name} asks where a patch lies as seen from the center, "
                "but with pairs=triplets, rotation=quarter_turns or pretext_answers=regression no "
                "answer is a position: leave it out, or these"
            )
        for strides in strides_of(chosen.group, settings.strides):
            chosen.evaluation.check_network(in_strides(backbone, strides))
    if settings.save_recalibrated and not has_batch_norm(backbone):
        raise UsageError(
            "save_recalibrated=true: the network has no batch norm, so that there is nothing to "
            "recalibrate. Leave it out"
        )
    # Recalibration would estimate batch statistics from one image, which not every view allows.
    is_evaluated_so = settings.evaluations and "recalibrated" in settings.batch_norms
    if settings.view_batch == 1 and (is_evaluated_so or settings.save_recalibrated):
        check_one_image(settings.model.backbone(settings.seed), settings.view.crop_px)


def _check_grid_about_center(patches: PatchPipeline) -> None:
    """Raises `UsageError` where resized images can't hold the grid of held-out questions."""
    try:
        _ = patches.about_center
    except UsageError as error:
        raise UsageError(
            f"grid.rows={patches.grid.rows}: held-out accuracy is of a 3x3 grid with the same "
            f"patches, whatever the trained one is. With 3 rows {error}"
        ) from error


def evaluating(config: DictConfig) -> Evaluating:
    """Builds what relloc.evaluate runs. Raises what `pretraining` raises."""
    given = resolved(config)
    # relloc.study and earlier configs have no such setting.
    watch = _watch(given) if "watch" in given else None
    named: Any = []
    # Reading a checkpoint that is not set raises Hydra's own error, which names the setting.
    if watch is None or not OmegaConf.is_missing(config, "checkpoint"):
        named = given["checkpoint"] if config.checkpoint is not None else None
    return Evaluating(
        **_shared(config, given),
        checkpoints=named if isinstance(named, list) else [named],
        watch=watch,
        checkpoint_prefix=given["checkpoint_prefix"],
        model=_model(given["model"]) if given.get("model") else None,
        verdict=given["verdict"],
    )


def _watch(given: Mapping[str, Any]) -> WatchSettings | None:
    """Returns which trainings are watched and how, or None where `checkpoint=` names weights.

    Raises:
        UsageError: a setting is wrong, or would change nothing.
    """
    watched = given["watch"]
    if watched is not None:
        return WatchSettings(
            names=watched if isinstance(watched, list) else [watched],
            every_s=given["watch_every_s"],
            patience_min=given["watch_patience_min"],
        )
    by_default = content_of("evaluate")
    for name in ("watch_every_s", "watch_patience_min"):
        if given[name] != by_default[name]:
            raise UsageError(
                f"{name}={given[name]} would change nothing without a training that is watched: "
                "leave it out, or give watch=RUN_FOLDER in place of checkpoint="
            )
    return None


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


def model_of_conf(member: str) -> Model:
    """Builds the model of a member of conf/model, such as `resnet50`."""
    return _model(plain(OmegaConf.load(conf_dir() / "model" / f"{member}.yaml")))


def _shared(config: DictConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `RunSettings`; `given` are the resolved settings of `config`."""
    # Presets and data sets of users may still have names of earlier versions.
    refuse_old_names(flatten(given))
    if not given.get("tracking"):
        raise UsageError("'~tracking' takes out what says where metrics go: give tracking=none")
    _check_tracking(**given["tracking"])
    batch_norm = given["batch_norm"]
    # relloc.study has no such setting: studies look at a network in the strides that it has.
    strides = given.get("strides", "as_trained")
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
        # A run's own config.yaml, which an earlier version wrote, has no such setting.
        "decode": given.get("decode", DECODES[0]),
        "batch_norms": [batch_norm] if isinstance(batch_norm, str) else batch_norm,
        "strides": [strides] if isinstance(strides, str) else strides,
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


def _training_patches(given: Mapping[str, Any]) -> TrainingPatches:
    parts = {}
    for name in (*(field.name for field in dataclasses.fields(PatchPipeline)), "curriculum"):
        # What is optional has no settings unless it is chosen. Where `~curriculum` takes it out of
        # a preset, those of the preset are left, without the `_target_`.
        node = given.get(name)
        if node and "_target_" in node:
            parts[name] = call(name, node)
    curriculum = parts.pop("curriculum", None)
    return TrainingPatches(patches=PatchPipeline(**parts), curriculum=curriculum)


def _pairs(given: Mapping[str, Any], grid: PatchGrid) -> Questions:
    # Settings of runs that are older than the group have none: they ask about the center.
    if not given.get("pairs"):
        return CENTER_PAIRS
    return call("pairs", given["pairs"], rows=grid.rows)


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


def _unless_auto(value: Any) -> Any:
    return None if value == "auto" else value


@functools.cache
def _backbone_without_memory(node: str) -> Backbone:
    """Returns the backbone of a model, in evaluation mode, without memory for the weights."""
    # Tensors on PyTorch's meta device have shapes but no storage.
    with torch.device("meta"):
        return _model(json.loads(node)).make_backbone().eval()


@functools.cache
def _check_network(
    nodes: str, questions: Questions, images_per_batch_norm: int, patch_px: int
) -> None:
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
            model.make_head(embedding_dim=backbone.embedding_dim, **head_sizes(questions)),
            questions=questions,
            batch_norm=given["pretext_batch_norm"],
            images_per_batch_norm=images_per_batch_norm,
        )
        check_batch_norms(network, patch_px)
        call("optimizer", given["optimizer"], model=network)
