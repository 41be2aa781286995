"""The resolvers of conf/: `${scaled:…}`, `${images_of:…}` and the like, and `${unique:}`.

Nothing here imports torch.
"""

import functools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

Value = float | str | None  # the value of a setting, not checked yet
Values = ListConfig | list[Value] | Value  # several of them, or one
Folders = list[str] | str | None  # several folders, one, or none


def scaled(
    spans: Values,
    made_for: Value,
    epochs: Value,
) -> list[Value] | Value:
    """Scales spans of a training to another length, in proportion.

    Args:
        spans: one or several, in epochs.
        made_for: length of the training for which the spans are given, in epochs.
        epochs: length of the training that they are scaled to.

    If both lengths are equal, the spans are returned unchanged, to the bit. Values that are no
    numbers are returned unchanged too, since the checks of the setting refuse them.
    """
    if isinstance(spans, ListConfig | list):
        return _scaled_list(list(spans), made_for, epochs)
    [value] = _scaled_list([spans], made_for, epochs)
    return value


def _scaled_list(
    values: list[Value],
    made_for: Value,
    epochs: Value,
) -> list[Value]:
    """Returns what `scaled` returns, for several values."""
    numbers = _numbers(values)
    lengths = _numbers([made_for, epochs])
    if not numbers or not lengths:
        return values
    old_length, new_length = lengths
    # A length of 0 can't be scaled; the checks of the schedule refuse it.
    if old_length == new_length or not old_length:
        return values
    scaled_values: list[Value] = []
    for span in numbers:
        exact = span * new_length / old_length
        # Six digits, so that a scaled value has no tail such as 1.9999999999999998.
        scaled_values.append(float(f"{exact:.6g}"))
    return scaled_values


def scaled_whole(
    milestones: Values,
    made_for: Value,
    epochs: Value,
) -> list[Value] | Value:
    """Scales milestones as `scaled` does, and rounds them to whole epochs.

    Milestones that coincide then are merged, and those outside of the training are left out.
    """
    spans = scaled(milestones, made_for, epochs)
    # Of a training of the same length they stay as written, even if they are no whole numbers.
    if made_for == epochs or not isinstance(spans, list):
        return spans
    numbers = _numbers(spans)
    if numbers is None or not isinstance(epochs, int | float):
        return spans
    rounded = {round(number) for number in numbers}
    # Before the first epoch, or after the last one, a milestone changes nothing.
    within: list[Value] = []
    for milestone in sorted(rounded):
        if 1 <= milestone < epochs:
            within.append(milestone)
    return within


def _numbers(values: list[Value]) -> list[int | float] | None:
    """Returns the values if all are numbers, else None."""
    numbers: list[int | float] = []
    for value in values:
        if not isinstance(value, int | float):
            return None
        numbers.append(value)
    return numbers


# OmegaConf passes `_parent_`, the node that the value stands in, and `_root_`, the whole config, to
# resolvers that have parameters of these names.
def images_of(
    variable: str,
    *,
    _parent_: DictConfig,
    _root_: DictConfig,
) -> Folders:
    """Returns the folder of a data set's images.

    If the run trains on the same data set, that is its folder. Otherwise the environment variable
    `variable` names it or, if that is not set, RELLOC_DATA. None if the folder has packed shards.
    """
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        return _plain(trained_on.get("root"))
    folder = _named(variable)
    if folder is None or _is_packed(folder):
        return None
    return folder


def shards_of(
    variable: str,
    *,
    _parent_: DictConfig,
    _root_: DictConfig,
) -> Folders:
    """Returns the folder of a data set's packed shards, found as `images_of` finds images.

    None if a folder of images is given instead.
    """
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        own_root = _plain(_parent_.get("root"))
        root_of_training = _plain(trained_on.get("root"))
        # Another root was given for this data set: its shards are not those of the training.
        if own_root != root_of_training:
            return None
        return _plain(trained_on.get("shards"))
    folder = _named(variable)
    # A folder of images that was given wins over packed shards in the environment.
    if not folder or _parent_.get("root"):
        return None
    return folder if _is_packed(folder) else None


def _same_set(data: DictConfig, config: DictConfig) -> DictConfig | None:
    """Returns the data set that the run trains on if `data`, of an evaluation, is the same one."""
    trained_on = config.get("data")
    # `data` may be the training's own node: nothing can be taken from itself.
    if not isinstance(trained_on, DictConfig) or trained_on is data:
        return None
    if trained_on.get("name") != data.get("name"):
        return None
    return trained_on


def _named(variable: str) -> str | None:
    """Returns the folder that an environment variable names; None if it is unset or empty."""
    own = os.environ.get(variable)
    general = os.environ.get("RELLOC_DATA")
    return own or general or None


def _is_packed(folder: str) -> bool:
    # Imported here, since it loads numpy, which commands that only show settings do not need.
    from relloc.data.manifest import is_packed

    return is_packed(Path(folder))


def _plain(folders: ListConfig | str | None) -> Folders:
    """Returns folders as Python's own types, which can be compared and put into another node."""
    if isinstance(folders, ListConfig):
        return list(folders)
    return folders


def _returning_node(resolver: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the resolver with lists as nodes; `--cfg job --resolve` fails with plain ones."""

    @functools.wraps(resolver)
    def resolve(*arguments: Any, **nodes: Any) -> Any:
        value = resolver(*arguments, **nodes)
        return ListConfig(value) if isinstance(value, list) else value

    return resolve


@functools.cache
def random_suffix(pid: int) -> str:
    """Returns six random hexadecimal digits, the same for every call in one process.

    `pid` is only the key of the cache: a forked process gets another suffix than its parent.
    """
    del pid
    return secrets.token_hex(3)


def unique() -> str:
    """Returns six random hexadecimal digits for the default names of runs and sweeps.

    They distinguish this command from another that was started in the same second.
    """
    return random_suffix(os.getpid())


OmegaConf.register_new_resolver("unique", unique, replace=True)
for _resolver in (scaled, scaled_whole, images_of, shards_of):
    OmegaConf.register_new_resolver(
        _resolver.__name__,
        _returning_node(_resolver),
        replace=True,
    )
