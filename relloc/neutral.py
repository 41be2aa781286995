"""Settings that decide neither what is trained nor what is measured, with the reason beside each.

Resuming a training, recognizing a point of a sweep and telling a run's settings apart all go by these lists. Results
that are measured already need none: they are recognized by the fingerprint of what they measure.
"""

from collections.abc import Mapping
from typing import Any

# Neither weights nor results change with these, but for rounding: a run is the same with others of them.
_HOW_IT_IS_RUN = {
    "device": "the same numbers on another machine, but for rounding",
    "compile": "the same computation, compiled",
    "cuda_graphs": "the same steps, given to the GPU at one go",
    "memory_format": "the order of values in memory",
    "deterministic": "the same sums, always in one order",
    "images_per_forward": "a step is divided otherwise; its gradient is the same",
    "workers": "how many processes read images",
    "bank_gib": "more is computed again where features are not kept",
    "save_every_s": "how often a run is saved",
    "reuse": "rows that are copied are those that would be measured",
    "runs": "where run folders lie",
    "tracking": "where numbers are mirrored to",
    "launcher": "which machines run it",
    "sweep": "the name of a sweep",
    "objective": "which result a sweeper is told",
    "hydra": "how Hydra starts it",
    "recipe.epochs": "schedule.epochs says how long is trained",
    "recipe.warmup_epochs": "schedule.warmup_epochs says it",
    "recipe.milestone_epochs": "schedule.milestone_epochs says it",
    "recipe.lr": "optimizer.lr says it",
}

# The weights that are trained do not change with these, but what is kept, watched or measured of them does.
_WHAT_IS_SEEN_OF_IT = {
    "milestones": "checkpoints that are kept",
    "report_every_steps": "rows of the journal",
    "collapse_steps": "when a warning comes",
    "monitor": "what is asked while training",
    "eval": "evaluations of the trained weights",
    "probe": "sizes of evaluations",
    "batch_norm": "of evaluations",
    "calibration_images": "of evaluations",
    "view": "of evaluations and monitors",
    "data.root": "the digest of the images is compared instead",
    "data.shards": "the digest of the images is compared instead",
    "data.source": "the digest of the images is compared instead",
    "data.unreadable_share": "when to give up",
}


def of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of flat settings, `grid.gap_px`, those that decide which weights a training makes of its images."""
    neutral = tuple(f"{name}." for name in (*_HOW_IT_IS_RUN, *_WHAT_IS_SEEN_OF_IT))
    return {name: value for name, value in settings.items() if not f"{name}.".startswith(neutral)}


def of_run(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Of a nested config, what decides the weights and results of a run, and what it keeps of itself.

    `prefix` stands before the names of its settings, as in `recipe.`
    """
    kept: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key not in _HOW_IT_IS_RUN:
            kept[name] = of_run(value, f"{key}.") if isinstance(value, Mapping) else value
    return kept
