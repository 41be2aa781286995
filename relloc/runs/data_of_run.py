"""`relloc.evaluate checkpoint=RUN` takes the data set that RUN was trained on, unless data= names another.

The settings are read from the run's config.yaml and become words of the command line, before those that were typed.
A run folder may be a stranger's: only plain values are taken from it, for settings that a member of conf/data has,
and that member says which function lists the images.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from relloc.errors import UsageError, reason
from relloc.runs import command_line, settings
from relloc.runs.settings import Composed
from relloc.terminal import escaped

CONFIG_FILE = "config.yaml"
_HYDRA_FILE = Path(".hydra", "hydra.yaml")
_LARGEST_FILE = 2**20
_LONGEST_NAME = 200
_SAYS_DATA = ("data", "experiment")  # a preset may choose the data


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
        gone = [str(one) for one in _listed(where) if not os.path.exists(str(one))]
        if gone and where == self.places.get(setting):
            raise UsageError(
                f"{self.run} was trained on data={self.member} in {', '.join(gone)}, which is not there any more: "
                f"give {setting}=FOLDER, where it is now, or data=NAME for another data set (--help data)"
            )
        named = " ".join([f"data={self.member}", *([command_line.as_word(setting, where)] if where else [])])
        return f"data    that of {self.run}: {named}. data=NAME takes another"


def _listed(where: Any) -> list[Any]:
    return where if isinstance(where, list) else [] if where is None else [where]


def find(words: Sequence[Override], beside: Sequence[str] = ()) -> RunData | None:
    """The data of the first run that one evaluation's words name; None where they say data=, or name no run.

    Where they name only random weights or files, it is that of the first run `beside` them in the same sweep: what is
    compared is measured on the same images.
    """
    named = command_line.checkpoints(words)
    return _of_first([*named[0], *beside], words) if len(named) == 1 and not _say_data(words) else None


def find_of_point(words: Sequence[Override]) -> RunData | None:
    """As `find`, in the command of a point of a sweep, which RELLOC_BESIDE tells of the others."""
    values = json.loads(os.environ.get("RELLOC_BESIDE", "[]"))
    return find(words, _all_names(command_line.check([f"checkpoint={value}" for value in values], sweeps=False)))


def find_shared(words: Sequence[Override]) -> RunData | None:
    """As `find`, of all points of a sweep; None where they do not have the same."""
    if _say_data(words):
        return None
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


def _say_data(words: Sequence[Override]) -> bool:
    return any(word.key_or_group in _SAYS_DATA for word in words)


def _of_first(checkpoints: Sequence[str], words: Sequence[Override]) -> RunData | None:
    """The data of the first run folder among them, without the probe where `words` choose one."""
    folders = (name for name in checkpoints if os.path.isfile(os.path.join(name, CONFIG_FILE)))
    run = next(folders, None)
    found = _read(Path(run), Path(run, CONFIG_FILE)) if run else None
    if found and any(word.key_or_group == "probe" for word in words):
        kept = tuple(word for word in found.words if not word.startswith("probe."))
        return dataclasses.replace(found, words=kept)
    return found


def _read(run: Path, file: Path) -> RunData | None:
    content = _load(file)
    data = content.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), Mapping):
        return None
    places = {f"data.{name}": _from_where_it_was_started(run, data.get(name)) for name in ("root", "shards")}
    choices = [(len(words), member, words) for member, words in _matching(data, _probe(content), places)]
    if not choices:
        target = escaped(str(data["source"].get("_target_"))[:_LONGEST_NAME])
        raise UsageError(f"{run} was trained on data of {target}, which no member of data has: give data=NAME")
    _, member, words = min(choices)
    return RunData(run=run, member=member, words=(f"data={member}", *words), places=places)


def _probe(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sizes of the run's evaluations; runs of earlier versions have them in `data`."""
    probe = content.get("probe", content["data"])
    return probe if isinstance(probe, Mapping) else {}


def _load(file: Path) -> dict[str, Any]:
    """A file of plain YAML. Raises `UsageError` where it is none."""
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"{file} has more than {_LARGEST_FILE} bytes: it is no config of a run; give data=NAME")
        content = yaml.load(file.read_text(encoding="utf-8"), _WithoutAliases)
    except UsageError:  # a ValueError, too
        raise
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} can't be read ({reason(error)}): give data=NAME") from error
    return content if isinstance(content, dict) else {}


class _WithoutAliases(yaml.SafeLoader):
    """Plain YAML in which nothing stands for another part: relloc writes none, and a crafted file would never end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which relloc does not write")
        return super().compose_node(parent, index)


def _from_where_it_was_started(run: Path, folder: Any) -> Any:
    """A folder that was named relative to where the training was started."""
    if isinstance(folder, list):
        return [_from_where_it_was_started(run, one) for one in folder]
    if not isinstance(folder, str) or os.path.isabs(folder):
        return folder
    started = _load(run / _HYDRA_FILE) if (run / _HYDRA_FILE).is_file() else {}
    for name in ("hydra", "runtime", "cwd"):
        started = started.get(name) if isinstance(started, dict) else None
    there = os.path.join(started, folder) if isinstance(started, str) else folder
    return os.path.abspath(there if os.path.exists(there) else folder)


def _matching(
    data: Mapping[str, Any], probe: Mapping[str, Any], places: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Members of the group that list images by the same function, and the words that make them the run's."""
    for member in settings.members("data"):
        file = settings.file_of(f"data/{member}")
        target = OmegaConf.select(OmegaConf.load(file), "source._target_") if file else None
        if target is not None and target == data["source"].get("_target_"):
            yield member, _words(settings.compose("evaluate", [f"data={member}"]), data, probe, places)


def _words(
    composed: Composed, data: Mapping[str, Any], probe: Mapping[str, Any], places: Mapping[str, Any]
) -> tuple[str, ...]:
    """What the run has otherwise than the member, settings that follow others last: mostly they need no word then.

    `places` stand for where the run's own words said that the images lie.
    """
    config = composed.config
    both = [
        *_both(OmegaConf.to_container(config.data, resolve=False), data, "data"),
        *_both(OmegaConf.to_container(config.probe, resolve=False), probe, "probe"),
    ]
    found: dict[str, Any] = {}
    for key, _, value in sorted(both, key=lambda one: _follows(one[1])):
        if _is_plain(value) and value != composed.value(key):
            OmegaConf.update(config, key, value, merge=False)
            found[key] = value
    known = {key for key, _, _ in both}
    found |= {
        key: value
        for key, value in places.items()
        if key in known and _is_plain(value) and value != composed.value(key)
    }
    return tuple(f"{key}={command_line.as_value(value)}" for key, value in found.items())


def _both(ours: Any, theirs: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that the member and the run have, with both values; not which function is called."""
    for name in ours:
        if name == "_target_" or name not in theirs:
            continue
        if isinstance(ours[name], dict) and isinstance(theirs[name], Mapping):
            yield from _both(ours[name], theirs[name], f"{key}.{name}")
        else:
            yield f"{key}.{name}", ours[name], theirs[name]


def _follows(value: Any) -> bool:
    """Whether a setting is that of another, as data.source.root is data.root's."""
    return isinstance(value, str) and "${." in value


def _is_plain(value: Any) -> bool:
    """Whether it is a value, and none that Hydra would look up: `${oc.env:SECRET}` is one."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return "${" not in value
    return value is None or isinstance(value, bool | int | float)
