"""Former names of settings, and names that other projects use.

An old command or preset ends in a message with the new name, or that a setting is gone.
"""

import difflib
from collections.abc import Iterable

from relloc.errors import UsageError

# New names by former ones. A name stands for all settings below it as well: data.linear.epochs is
# probe.linear.epochs now.
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
# Settings that are gone, and why they can be left out.
_REMOVED = {
    "eval.voc12aug_fcn.images_per_gpu": "as any batch is trained on alike",
    "eval.cityscapes_fcn.images_per_gpu": "as any batch is trained on alike",
}
# Settings by the names that other projects have for them, alone or below `data`
_USUAL_NAMES = {
    "batch": "recipe.images_per_step",
    "batch_size": "recipe.images_per_step",
    "epochs": "schedule.epochs",
}


def usual_name(setting: str) -> str | None:
    """Returns the setting that other projects call by this name, such as batch_size, or None."""
    return _USUAL_NAMES.get(setting.removeprefix("data.").replace("-", "_"))


def new_name(setting: str) -> str | None:
    """Returns the new name of a setting, or None if `setting` is no former name."""
    for old, new in _NEW_NAMES.items():
        if setting == old or setting.startswith(f"{old}."):
            return new + setting.removeprefix(old)
    return None


def nearest_old_name(setting: str) -> str | None:
    """Returns the former name that is most similar, such as data.epochs for data.epoch, or None."""
    near = difflib.get_close_matches(setting, _NEW_NAMES, n=1, cutoff=0.85)
    return near[0] if near else None


def refuse_old_names(settings: Iterable[str]) -> None:
    """Raises `UsageError` if some of the settings have former names, or are gone."""
    messages = []
    for setting in settings:
        renamed = new_name(setting)
        if renamed:
            messages.append(f"{setting} is now {renamed}")
        elif setting in _REMOVED:
            messages.append(f"{setting} is gone, {_REMOVED[setting]}: leave it out")
    if messages:
        raise UsageError("; ".join(messages))
