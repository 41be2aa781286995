"""What `${scaled:…}`, `${scaled_whole:…}`, `${images_of:…}` and `${shards_of:…}` in conf/ stand for.

Nothing here imports torch.
"""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf


def scaled(spans: Any, made_for: Any, epochs: Any) -> Any:
    """Spans in epochs, one or several, made for a training of `made_for` epochs, in one of `epochs`.

    Where both are the same, spans stay what they are, to the bit. What is no number is left for the checks of the
    setting to refuse.
    """
    is_list = isinstance(spans, ListConfig | list)
    values = list(spans) if is_list else [spans]
    are_numbers = all(isinstance(one, int | float) for one in (made_for, epochs, *values))
    if are_numbers and made_for and made_for != epochs:
        values = [float(f"{one * epochs / made_for:.6g}") for one in values]
    return values if is_list else values[0]


def scaled_whole(milestones: Any, made_for: Any, epochs: Any) -> Any:
    """As `scaled`, in whole epochs: milestones that fall together, or outside of the training, are left out."""
    found = scaled(milestones, made_for, epochs)
    if made_for == epochs or not isinstance(found, list) or not all(isinstance(one, int | float) for one in found):
        return found
    return sorted({round(one) for one in found if 1 <= round(one) < epochs})


def images_of(variable: str, *, _parent_: DictConfig, _root_: DictConfig) -> Any:
    """Where the images of a data set lie: where those of the same set that is trained on do, or as `variable` says.

    `variable` is an environment variable, in whose place RELLOC_DATA may stand. None where it names packed shards.
    """
    trained_on = _same_set(_parent_, _root_)
    if trained_on is not None:
        return _plain(trained_on.get("root"))
    folder = _named(variable)
    return None if folder is None or _is_packed(folder) else folder


def shards_of(variable: str, *, _parent_: DictConfig, _root_: DictConfig) -> Any:
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
    from relloc.data.manifest import MANIFEST  # numpy loads here, which commands that only show settings do without

    return Path(folder, MANIFEST).is_file()


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


for _resolver in (scaled, scaled_whole, images_of, shards_of):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
