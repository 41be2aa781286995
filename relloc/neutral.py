"""Lists of the settings that change neither what is trained nor what is measured, with the reasons.

The lists serve two purposes:

* `settings_of_run` identifies a point of a sweep (`relloc.sweeps.points`). It leaves out how a run
  is executed. Where images lie counts, since the images themselves are not read for it.
* `settings_of_weights` decides whether a training may be resumed, and how runs differ in notebooks.
  It also leaves out what is only observed, and where images lie: their digest is compared instead.

Results use neither: a result that exists already is recognized by the fingerprint of what it
measures. `repr_without_defaults` is for what stands in fingerprints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Settings of how a run is executed. Neither weights nor results depend on them, except for
# rounding: a run with other values of these is the same run.
_EXECUTION = {
    "device": "the same numbers on another machine, but for rounding",
    "compile": "the same computation, compiled",
    "cuda_graphs": "the same steps, launched on the GPU at once",
    "memory_format": "the order of values in memory",
    "deterministic": "the same sums, always in one order",
    "images_per_forward": "a step is divided otherwise; its gradient is the same",
    "workers": "how many processes read images",
    "bank_gib": "features that do not fit in memory are computed again",
    "save_every_s": "how often a run is saved",
    "reuse": "rows that are copied equal those that would be measured",
    "missing_data": "an evaluation without its data has no results",
    "report": "what is printed at the end",
    "watch_every_s": "when new checkpoints are looked for",
    "watch_patience_min": "when a watched training is given up",
    "runs": "where run folders lie",
    "tracking": "where numbers are mirrored to",
    "launcher": "which machines run it",
    "sweep": "the name of a sweep",
    "objective": "which result a sweeper is given",
    "hydra": "how Hydra starts it",
    "recipe.epochs": "schedule.epochs holds the value",
    "recipe.warmup_epochs": "schedule.warmup_epochs holds the value",
    "recipe.milestone_epochs": "schedule.milestone_epochs holds the value",
    "recipe.lr": "optimizer.lr holds the value",
}

# Settings of what is saved, watched or measured of a training. Its weights do not depend on them.
_OBSERVATION = {
    "milestones": "which checkpoints are kept",
    "report_every_steps": "rows of the journal",
    "collapse_steps": "when a warning is given",
    "monitor": "what is measured while training",
    "eval": "evaluations of the trained weights",
    "study": "studies of the trained weights",
    "probe": "sizes of evaluations",
    "batch_norm": "of evaluations",
    "strides": "of evaluations",
    "save_recalibrated": "whether a second file of weights is written",
    "calibration_images": "of evaluations",
    "view": "of evaluations and monitors",
    "data.root": "the digest of the images is compared instead",
    "data.shards": "the digest of the images is compared instead",
    "data.source": "the digest of the images is compared instead",
    "data.unreadable_share": "when a run gives up",
}

# Settings that came after the first sweeps, and the value at which a run is as it was without them.
# With that value they are left out, so that earlier trainings and points are still recognized. The
# names also stand for those of groups within others, such as study.human.grid.yoked_jitter.
_LATER: dict[str, Any] = {
    "pairs": {"_target_": "relloc.pretext.questions.CenterPairs"},
    "grid.rows": 3,
    "grid.yoked_jitter": False,
    "grid.scale": None,
    "grid.yoked_scale": False,
    "pretext_answers": "classes",
    "pretext_flip": 0,
    "model.backbone.last_stride": 2,
    "model.backbone.stem": "imagenet",
    "model.backbone.width": 1,
    "strides": "standard",
    "watch": None,
    "save_recalibrated": False,
    "decode": "cpu",
}

# Groups that a run has only where they are chosen, which their `_target_` tells. `~curriculum`
# leaves the settings that a preset gave to the group, which nothing reads any more.
_OPTIONAL = ("chroma_blur", "aperture", "rotation", "curriculum")


def settings_of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that decide which weights a training makes of its images.

    `settings` are flat, with names such as `grid.gap_px`.
    """
    # With a dot at the end, `monitor` stands for `monitor` and `monitor.images` but not `monitors`.
    neutral_names = [*_EXECUTION, *_OBSERVATION]
    neutral_prefixes = tuple(f"{name}." for name in neutral_names)
    for group in _OPTIONAL:
        if f"{group}._target_" not in settings:
            neutral_prefixes = (*neutral_prefixes, f"{group}.")
    deciding = {}
    for name, value in settings.items():
        is_neutral = f"{name}.".startswith(neutral_prefixes)
        if not is_neutral and not _is_as_before(name, value):
            deciding[name] = value
    return deciding


def settings_of_run(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the settings that decide the weights, results and saved files of a run.

    `config` is nested, and so is what is returned. `prefix` stands before the names of its
    settings, such as `recipe.` for the settings of that group.
    """
    deciding: dict[str, Any] = {}
    for name, value in config.items():
        full_name = f"{prefix}{name}"
        if full_name in _EXECUTION or _is_as_before(full_name, value):
            continue
        if full_name in _OPTIONAL and isinstance(value, Mapping) and "_target_" not in value:
            continue
        # Groups are searched too, since some of their settings may be neutral.
        if isinstance(value, Mapping):
            deciding[name] = settings_of_run(value, f"{full_name}.")
        else:
            deciding[name] = value
    return deciding


def repr_without_defaults(value: Any) -> str:
    """Returns the repr of a dataclass without the fields that have their default values.

    Fingerprints hold such texts: a field with a default that a later version adds changes none of
    them while it has its default.
    """
    shown = []
    for field in dataclasses.fields(value):
        of_field = getattr(value, field.name)
        is_default = of_field == field.default
        if field.repr and not is_default:
            shown.append(f"{field.name}={of_field!r}")
    return f"{type(value).__qualname__}({', '.join(shown)})"


def without_later(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns nested settings without those that came later and are as before.

    What is written of a network is so read by earlier versions, too. `prefix` stands before the
    names of the settings, such as `model.` for the settings of that group.
    """
    kept: dict[str, Any] = {}
    for name, value in config.items():
        full_name = f"{prefix}{name}"
        if _is_as_before(full_name, value):
            continue
        is_group = isinstance(value, Mapping)
        kept[name] = without_later(value, f"{full_name}.") if is_group else value
    return kept


def _is_as_before(name: str, value: Any) -> bool:
    """Returns whether a later setting has the value at which a run is as it was without it."""
    for later, value_before in _LATER.items():
        values_before = {later: value_before}
        # Settings of a group may also come one by one.
        if isinstance(value_before, Mapping):
            for key, of_key in value_before.items():
                values_before[f"{later}.{key}"] = of_key
        for name_before, before in values_before.items():
            if f".{name}".endswith(f".{name_before}"):
                return value == before
    return False
