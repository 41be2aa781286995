"""What can be said against a config before data is listed or anything runs: numbers, addresses, folders."""

import math

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from relloc import checks
from relloc.errors import UsageError
from relloc.features.batch_norm import check_one_image
from relloc.pretext.objective import check_batch_norms
from relloc.runs import assemble
from relloc.runs.engine import Engine
from relloc.runs.renamed import refuse_old_names_in
from relloc.tracking import absolute_uri, experiment_name, import_driver

# Numbers that no constructor looks at before data is listed or anything is trained: lowest, highest.
_WHOLE = {
    **dict.fromkeys(("seed", "report_every_steps", "monitor.images", "monitor.k", "calibration_images"), 1),
    **dict.fromkeys(("recipe.images_per_step", "recipe.images_per_batch_norm", "probe.linear.epochs"), 1),
    **dict.fromkeys(("view.short_px", "view.crop_px", "view.batch"), 1),
    "seed": 0,
}
_NUMBERS = {
    **dict.fromkeys(
        ("save_every_s", "bank_gib", "optimizer.lr", "schedule.epochs", "schedule.warmup_epochs"), math.inf
    ),
    **dict.fromkeys(("data.unreadable_share", "monitor.most_share"), 1),
    "monitor.every_epochs": math.inf,
}


def check_numbers(config: DictConfig) -> None:
    """A wrong number is told now, not after a data set was listed or 70 epochs were trained.

    Raises:
        UsageError: a setting that is no number, or outside what it may be.
    """
    refuse_old_names_in(config)
    for name, at_least in _WHOLE.items():
        if (value := OmegaConf.select(config, name)) is not None:
            checks.whole(name, value, at_least=at_least)
    for name, at_most in _NUMBERS.items():
        if (value := OmegaConf.select(config, name)) is not None:
            checks.number(name, value, at_least=0, at_most=at_most)
    for name in ("milestones", "schedule.milestone_epochs", "probe.linear.milestone_epochs"):
        asked = OmegaConf.select(config, name, default=ListConfig([]))
        if not isinstance(asked, ListConfig | list):
            raise UsageError(f"{name}={asked} is not a list: give {name}=[{asked}]")
        for one in asked:
            checks.number(name, one, at_least=0)


def check_tracking(config: DictConfig) -> None:
    """An address that is none, or a name that MLflow refuses, is told before anything runs.

    Raises:
        UsageError: with the setting's name, and what to give instead.
    """
    uri = config.tracking.uri
    if uri is not None:
        try:
            import_driver(absolute_uri(uri))
        except UsageError as error:
            raise UsageError(f"tracking.uri: {error}; tracking=none does without MLflow") from error
    try:
        experiment_name(config.tracking.experiment, uri)
    except UsageError as error:
        raise UsageError(f"tracking.experiment: {error}") from error


def check_is_training(config: DictConfig) -> None:
    """Raises `UsageError` for a config, such as that of a preset, which is one of relloc.evaluate."""
    if "checkpoint" in config:
        raise UsageError("this experiment evaluates checkpoints: run it with python -m relloc.evaluate")


def check_network(config: DictConfig) -> None:
    """Raises `UsageError` where the network can't be made, or a batch norm would be trained on one value a channel."""
    check_batch_norms(assemble.pretext_model(config), config.grid.patch_px)


def check_optimizer(config: DictConfig) -> None:
    """Raises `UsageError` for an optimizer that can't be made; without memory for the weights that it is given."""
    with torch.device("meta"):
        assemble.call(config.optimizer, model=assemble.pretext_model(config))


def check_recalibration(config: DictConfig, how: Engine) -> None:
    """Raises `UsageError` where the evaluations of a training would recalibrate batch norm on one value a channel."""
    terms = assemble.eval_settings(config, how)
    if config.eval and "recalibrated" in terms.batch_norms and terms.encode_config.batch == 1:
        check_one_image(assemble.backbone(config.model), assemble.view(config).crop_px)


def check_has_evaluations(config: DictConfig) -> None:
    """Raises `UsageError` where an evaluation is asked to evaluate nothing, or by an evaluation that can't be made."""
    if not assemble.evaluations(config):
        raise UsageError("eval=[] leaves nothing to do: name evaluations, such as eval=[linear_fast,knn]")


def named_checkpoints(config: DictConfig) -> list[str]:
    """What `checkpoint` names, one or several. Raises `UsageError` where it names none."""
    asked = list(config.checkpoint) if isinstance(config.checkpoint, ListConfig) else [config.checkpoint]
    if not asked or any(not isinstance(one, str) or not one for one in asked):
        raise UsageError(f"checkpoint={config.checkpoint} names no backbone: give a run folder, a file, or random")
    return asked


def check_roots(config: DictConfig) -> None:
    """All data sets that evaluations bring and nobody has told the place of, in one message.

    Raises:
        UsageError: there are some.
    """
    lost = [
        f"eval.{name}.data.root=FOLDER or {_variable(config.eval[name].data)}"
        for name in assemble.own_data(config)
        if not config.eval[name].data.get("shards") and not config.eval[name].data.get("root", "photos")
    ]
    if lost:
        raise UsageError(f"{len(lost)} evaluations don't know where their data set lies; give {'; '.join(lost)}")


def _variable(data: DictConfig) -> str:
    known = {"voc": "RELLOC_VOC", "in1k": "RELLOC_IN1K", "places205": "RELLOC_PLACES205", "inat18": "RELLOC_INAT18"}
    return next((variable for name, variable in known.items() if str(data.name).startswith(name)), "RELLOC_DATA")
