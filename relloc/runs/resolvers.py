"""What `${scaled:…}`, `${scaled_whole:…}`, `${images_of:…}` and `${shards_of:…}` in conf/ stand for.

Nothing here imports torch.
"""

import os
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

Value = float | str | None  # of a setting, which nobody has checked yet


def scaled(
    spans: ListConfig | list[Value] | Value, made_for: Value, epochs: Value
) -> list[Value] | Value:
    """Spans in epochs, one or several, made for a training of `made_for` epochs, in one of `epochs`.

    Where both are the same, spans stay what they are, to the bit. What is no number is left for the checks of the
    setting to refuse.
    """
    is_list = isinstance(spans, ListConfig | list)
    values: list[Value] = list(spans) if is_list else [spans]
    numbers = _numbers(values)
    lengths = _numbers([made_for, epochs])
    if numbers and lengths and lengths[0] and made_for != epochs:
        values = [float(f"{one * lengths[1] / lengths[0]:.6g}") for one in numbers]
    return values if is_list else values[0]


def scaled_whole(
    milestones: ListConfig | list[Value] | Value, made_for: Value, epochs: Value
) -> list[Value] | Value:
    """As `scaled`, in whole epochs: milestones that fall together, or outside of the training, are left out."""
    found = scaled(milestones, made_for, epochs)
    numbers = _numbers(found) if isinstance(found, list) else None
    if made_for == epochs or numbers is None or not isinstance(epochs, int | float):
        return found
    return [*sorted({round(one) for one in numbers if 1 <= round(one) < epochs})]


def _numbers(values: list[Value]) -> list[int | float] | None:
    """The values where all are numbers, else None."""
    numbers = [one for one in values if isinstance(one, int | float)]
    return numbers if len(numbers) == len(values) else None


def images_of(variable: str, *, _parent_: DictConfig, _root_: DictConfig) -> list[str] | str | None:
    """Where the images of a data set lie: where those of the same set that is trained on do, or as `variable` says.

    `variable` is an environment variable, in whose place RELLOC_DATA may stand. None where it names packed shards.
    """
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        return _plain(trained_on.get("root"))
    folder = _named(variable)
    return None if folder is None or _is_packed(folder) else folder


def shards_of(variable: str, *, _parent_: DictConfig, _root_: DictConfig) -> list[str] | str | None:
    """As `images_of`, the folder that relloc.prepare packed; None where a folder of images is given instead."""
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        same = _plain(_parent_.get("root")) == _plain(trained_on.get("root"))
        return _plain(trained_on.get("shards")) if same else None
    folder = _named(variable)
    return folder if folder and not _parent_.get("root") and _is_packed(folder) else None


def _same_set(data: DictConfig, config: DictConfig) -> DictConfig | None:
    """The data set of the whole config, where `data`, which an evaluation brings with it, is the same one."""
    trained_on = config.get("data")
    if not isinstance(trained_on, DictConfig) or trained_on is data:
        return None
    return trained_on if trained_on.get("name") == data.get("name") else None


def _named(variable: str) -> str | None:
    return os.environ.get(variable) or os.environ.get("RELLOC_DATA") or None


def _is_packed(folder: str) -> bool:
    from relloc.data.manifest import (
        is_packed,
    )  # numpy loads here, which commands that only show settings do without

    return is_packed(Path(folder))


def _plain(folders: ListConfig | str | None) -> list[str] | str | None:
    return list(folders) if isinstance(folders, ListConfig) else folders


for _resolver in (scaled, scaled_whole, images_of, shards_of):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
