"""The resolvers of conf/: `${scaled:…}`, `${scaled_whole:…}`, `${images_of:…}`, `${shards_of:…}`.

Nothing here imports torch.
"""

import os
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

Value = float | str | None  # the value of a setting, not checked yet


def scaled(
    spans: ListConfig | list[Value] | Value, made_for: Value, epochs: Value
) -> list[Value] | Value:
    """Scales spans of a training to another length, in proportion.

    Args:
        spans: one or several, in epochs.
        made_for: length of the training for which the spans are given, in epochs.
        epochs: length of the training that they are scaled to.

    If both lengths are equal, the spans are returned unchanged, to the bit. Values that are no
    numbers are returned unchanged too, since the checks of the setting refuse them.
    """
    is_list = isinstance(spans, ListConfig | list)
    values: list[Value] = list(spans) if is_list else [spans]
    numbers = _numbers(values)
    lengths = _numbers([made_for, epochs])
    if numbers and lengths and lengths[0] and made_for != epochs:
        # Six digits, so that a scaled value has no tail such as 1.9999999999999998.
        values = [float(f"{span * lengths[1] / lengths[0]:.6g}") for span in numbers]
    return values if is_list else values[0]


def scaled_whole(
    milestones: ListConfig | list[Value] | Value, made_for: Value, epochs: Value
) -> list[Value] | Value:
    """Scales milestones as `scaled` does, and rounds them to whole epochs.

    Milestones that coincide then are merged, and those outside of the training are left out.
    """
    spans = scaled(milestones, made_for, epochs)
    numbers = _numbers(spans) if isinstance(spans, list) else None
    if made_for == epochs or numbers is None or not isinstance(epochs, int | float):
        return spans
    rounded = {round(number) for number in numbers}
    return [*sorted(milestone for milestone in rounded if 1 <= milestone < epochs)]


def _numbers(values: list[Value]) -> list[int | float] | None:
    """Returns the values if all are numbers, else None."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else None


def images_of(variable: str, *, _parent_: DictConfig, _root_: DictConfig) -> list[str] | str | None:
    """Returns the folder of a data set's images.

    If the run trains on the same data set, that is its folder. Otherwise the environment variable
    `variable` names it or, if that is not set, RELLOC_DATA. None if the folder has packed shards.
    """
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        return _plain(trained_on.get("root"))
    folder = _named(variable)
    return None if folder is None or _is_packed(folder) else folder


def shards_of(variable: str, *, _parent_: DictConfig, _root_: DictConfig) -> list[str] | str | None:
    """Returns the folder of a data set's packed shards, found as `images_of` finds images.

    None if a folder of images is given instead.
    """
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        # Another root was given for this data set: its shards are not those of the training.
        same = _plain(_parent_.get("root")) == _plain(trained_on.get("root"))
        return _plain(trained_on.get("shards")) if same else None
    folder = _named(variable)
    return folder if folder and not _parent_.get("root") and _is_packed(folder) else None


def _same_set(data: DictConfig, config: DictConfig) -> DictConfig | None:
    """Returns the data set that the run trains on if `data`, of an evaluation, is the same one."""
    trained_on = config.get("data")
    if not isinstance(trained_on, DictConfig) or trained_on is data:
        return None
    return trained_on if trained_on.get("name") == data.get("name") else None


def _named(variable: str) -> str | None:
    return os.environ.get(variable) or os.environ.get("RELLOC_DATA") or None


def _is_packed(folder: str) -> bool:
    # Imported here, since it loads numpy, which commands that only show settings do not need.
    from relloc.data.manifest import is_packed

    return is_packed(Path(folder))


def _plain(folders: ListConfig | str | None) -> list[str] | str | None:
    return list(folders) if isinstance(folders, ListConfig) else folders


for _resolver in (scaled, scaled_whole, images_of, shards_of):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
