"""Settings that had another name in earlier versions, so that an old command or preset ends in the new name."""

import difflib
from collections.abc import Iterable

from relloc.errors import UsageError

# A name may stand for all settings below it: data.linear.epochs is probe.linear.epochs now.
_NEW_NAMES = {
    "data.lr": "optimizer.lr",
    "data.epochs": "schedule.epochs",
    "data.warmup_epochs": "schedule.warmup_epochs",
    "data.milestone_epochs": "schedule.milestone_epochs",
    "data.images_per_step": "recipe.images_per_step",
    "data.images_per_batch_norm": "recipe.images_per_batch_norm",
    "data.linear": "probe.linear",
    "data.knn": "probe.knn",
}


# What others call it, alone or below data
_USUAL_NAMES = {
    "batch": "recipe.images_per_step",
    "batch_size": "recipe.images_per_step",
    "epochs": "schedule.epochs",
}


def usual_name(setting: str) -> str | None:
    """The setting that many projects call like this, such as recipe.images_per_step for batch_size."""
    return _USUAL_NAMES.get(setting.removeprefix("data.").replace("-", "_"))


def new_name(setting: str) -> str | None:
    """How a setting is called now; None where its name was never another."""
    for old, new in _NEW_NAMES.items():
        if setting == old or setting.startswith(f"{old}."):
            return new + setting.removeprefix(old)
    return None


def nearest_old_name(setting: str) -> str | None:
    """The former name that this looks like, such as data.epochs for data.epoch; None where none is near."""
    near = difflib.get_close_matches(setting, _NEW_NAMES, n=1, cutoff=0.85)
    return near[0] if near else None


def refuse_old_names(settings: Iterable[str]) -> None:
    """Raises `UsageError` that says the new names, where some of these are old ones."""
    told = [f"{setting} is now {new}" for setting in settings if (new := new_name(setting))]
    if told:
        raise UsageError("; ".join(told))
