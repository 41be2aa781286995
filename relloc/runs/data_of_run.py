"""`relloc.evaluate checkpoint=RUN` takes the data set that RUN was trained on, unless data= names another.

The settings are read from the run's config.yaml and become words of the command line, before those that were typed.
A run folder may be a stranger's: only plain values are taken from it, for settings that a member of conf/data has,
and that member says which function lists the images.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from relloc.checkpoints.places import BACKBONE_FILE, TRAINING_FOLDER
from relloc.errors import UsageError, reason
from relloc.runs import command_line, settings
from relloc.runs.settings import Composed
from relloc.terminal import escaped

CONFIG_FILE = "config.yaml"
_HYDRA_FILE = Path(".hydra", "hydra.yaml")
_LARGEST_FILE = 2**20
_LONGEST_NAME = 200
_SAYS_DATA = ("data", "experiment")  # a preset may choose the data
_STARTED_IN = "hydra.runtime.cwd"
_PLACES = ("data.root", "data.shards", "data.source.root")  # where images lay


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The data set of a run, as `words` of a command line; `places` are where its images lay, by setting."""

    run: Path
    member: str
    words: tuple[str, ...]
    places: Mapping[str, Any]

    def tell(self, given: Mapping[str, Any]) -> str:
        """One line that says what was taken, "" where no evaluation of the settings that are given needs it.

        Raises:
            UsageError: the images are not where they were, nor was another place given.
        """
        if all(node.get("data") for node in (given["eval"] or {}).values()):
            return ""
        name = "shards" if given["data"].get("shards") else "root"
        setting, where = f"data.{name}", given["data"].get(name)
        folders = where if isinstance(where, list) else [where] if where else []
        gone = [str(one) for one in folders if not os.path.exists(str(one))]
        if gone and where == self.places.get(setting):
            raise UsageError(
                f"{self.run} was trained on data={self.member} in {', '.join(gone)}, which is not there any more: "
                f"give {setting}=FOLDER, where it is now, or data=NAME for another data set (--help data)"
            )
        named = " ".join(
            [f"data={self.member}", *([command_line.as_word(setting, where)] if where else [])]
        )
        return f"data    that of {self.run}: {named}. data=NAME takes another"


def find(words: Sequence[Override], beside: Sequence[str] = ()) -> RunData | None:
    """The data of the first run that one evaluation's words name; None where they say data=, or name no run.

    Where they name only random weights or files, it is that of the first run `beside` them in the same sweep: what is
    compared is measured on the same images.
    """
    named = command_line.checkpoints(words)
    return _of_first([*named[0], *beside], words) if len(named) == 1 else None


def find_of_point(words: Sequence[Override]) -> RunData | None:
    """As `find`, in the command of a point of a sweep, which RELLOC_BESIDE tells of the others."""
    values = json.loads(os.environ.get("RELLOC_BESIDE", "[]"))
    return find(
        words,
        _all_names(command_line.check([f"checkpoint={value}" for value in values], sweeps=False)),
    )


def find_shared(words: Sequence[Override]) -> RunData | None:
    """As `find`, of all points of a sweep; None where they do not have the same."""
    named = command_line.checkpoints(words)
    beside = [name for names in named for name in names]
    found = [_of_first([*names, *beside], words) for names in named]
    same = len({one.words if one else () for one in found}) == 1
    return found[0] if same else None


def with_data(words: Sequence[str], command: Sequence[str]) -> list[str]:
    """The words of one point of the sweep that `command` started, and before them the data set it evaluates on."""
    swept = command_line.read(command)
    beside = _all_names(command_line.check(swept.words, sweeps=True))
    found = find(command_line.check(words, sweeps=False), beside)
    return [*(found.words if found else ()), *words]


def _all_names(words: Sequence[Override]) -> list[str]:
    return [name for word in words for names in command_line.checkpoints([word]) for name in names]


def _of_first(checkpoints: Sequence[str], words: Sequence[Override]) -> RunData | None:
    """The data of the first run folder among them, without the probe if `words` choose one."""
    given = {word.key_or_group for word in words}
    run = next(filter(None, map(_run_of, checkpoints)), None)
    if run is None or not given.isdisjoint(_SAYS_DATA):
        return None
    return _read(run, chooses_probe="probe" in given)


def _run_of(checkpoint: str) -> Path | None:
    """The run folder that a checkpoint names by itself, by its backbone's file or by one of its training."""
    path = Path(checkpoint)
    if path.name == BACKBONE_FILE:
        path = path.parent
    elif path.suffix == ".pt" and path.parent.name == TRAINING_FOLDER:
        path = path.parent.parent
    return path if os.path.isfile(path / CONFIG_FILE) else None


def _read(run: Path, *, chooses_probe: bool) -> RunData | None:
    content = _load(run / CONFIG_FILE)
    data = content.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), Mapping):
        return None
    # Runs of earlier versions have the sizes of their evaluations in `data`.
    probe = {} if chooses_probe else content.get("probe", data)
    given = settings.flat({"data": data, "probe": probe})
    places = {key: _from_where_it_was_started(run, given.get(key)) for key in _PLACES}
    given |= {key: place for key, place in places.items() if key in given}
    # Members that list images by the same function, with the words that make them the run's
    target = data["source"].get("_target_")
    choices = []
    for member in settings.members("data"):
        source = settings.content_of(f"data/{member}").get("source")
        if target is not None and isinstance(source, dict) and source.get("_target_") == target:
            words = _words(settings.compose("evaluate", [f"data={member}"]), given)
            choices.append((len(words), member, words))
    if not choices:
        told = escaped(str(target)[:_LONGEST_NAME])
        raise UsageError(
            f"{run} was trained on data of {told}, which no member of data has: give data=NAME"
        )
    _, member, words = min(choices)
    return RunData(run=run, member=member, words=(f"data={member}", *words), places=places)


def _load(file: Path) -> Any:
    """The content of a file of plain YAML, at most a config's size; relloc writes no aliases, which might be endless.

    Raises `UsageError` where it is none.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise yaml.YAMLError(f"it has more than {_LARGEST_FILE} bytes")
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise yaml.YAMLError("it has an alias, which relloc does not write")
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} can't be read ({reason(error)}): give data=NAME") from error
    return content if isinstance(content, dict) else {}


def _from_where_it_was_started(run: Path, folder: Any) -> Any:
    """A folder that was named relative to where the training was started."""
    if isinstance(folder, list):
        return [_from_where_it_was_started(run, one) for one in folder]
    if not isinstance(folder, str) or os.path.isabs(folder):
        return folder
    started = (
        settings.flat(_load(run / _HYDRA_FILE)).get(_STARTED_IN)
        if (run / _HYDRA_FILE).is_file()
        else None
    )
    there = os.path.join(started, folder) if isinstance(started, str) else folder
    return os.path.abspath(there if os.path.exists(there) else folder)


def _words(composed: Composed, given: Mapping[str, Any]) -> tuple[str, ...]:
    """What the run has otherwise than the member, settings that follow others last: mostly they need no word then."""
    ours = {
        key: value
        for key, value in composed.unresolved.items()
        if key.startswith(("data.", "probe."))
    }
    found = {}
    for key in sorted(ours, key=lambda key: "${." in str(ours[key])):
        if key in given and _is_plain(given[key]) and given[key] != composed.value(key):
            OmegaConf.update(composed.config, key, given[key], merge=False)
            found[key] = given[key]
    return tuple(f"{key}={command_line.as_value(value)}" for key, value in found.items())


def _is_plain(value: Any) -> bool:
    """Whether it is a value, and none that Hydra would look up: `${oc.env:SECRET}` is one."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and "${" not in value)
    )
