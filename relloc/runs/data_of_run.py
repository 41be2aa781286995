"""Has an evaluation use the data set that its checkpoint was trained on.

`relloc.evaluate checkpoint=RUN` takes the data set from RUN unless `data=` names another. The
settings are read from the run's config.yaml and become words of the command line, before those that
were typed.

A run folder may come from somebody else. Hence only plain values are taken from it, only for
settings that a member of conf/data has, and that member says which function lists the images.
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

from relloc.checkpoints.paths import BACKBONE_FILE, TRAINING_FOLDER
from relloc.errors import UsageError, reason
from relloc.runs import command_line, settings
from relloc.runs.settings import Composed
from relloc.terminal import escaped

CONFIG_FILE = "config.yaml"
_HYDRA_FILE = Path(".hydra", "hydra.yaml")
_LARGEST_FILE = 2**20  # bytes of a config
_LONGEST_NAME = 200  # characters of a name from a run folder, in a message
_CHOOSES_DATA = ("data", "experiment")  # groups that choose the data; a preset may do so
_STARTED_IN = "hydra.runtime.cwd"
_FOLDERS = ("data.root", "data.shards", "data.source.root")  # settings with folders of images


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The data set of a run, as `words` of a command line.

    `member` is its member of conf/data. `folders` maps the settings that name folders of images to
    the folders that the run used.
    """

    run: Path
    member: str
    words: tuple[str, ...]
    folders: Mapping[str, Any]

    def describe(self, given: Mapping[str, Any]) -> str:
        """Returns a line for the console that says which data set was taken over.

        It is empty if, by the settings `given`, all evaluations bring data sets of their own.

        Raises:
            UsageError: the images are not where they were, and no other folder was given.
        """
        evaluations = given["eval"] or {}
        if all(node.get("data") for node in evaluations.values()):
            return ""
        name = "shards" if given["data"].get("shards") else "root"
        setting = f"data.{name}"
        root = given["data"].get(name)
        roots = root if isinstance(root, list) else [root] if root else []
        missing = [str(folder) for folder in roots if not os.path.exists(str(folder))]
        # Another folder, which the user gave, is checked later with all other settings.
        if missing and root == self.folders.get(setting):
            raise UsageError(
                f"{self.run} was trained on data={self.member} in {', '.join(missing)}, which is "
                f"not there any more: give {setting}=FOLDER, where it is now, or data=NAME for "
                "another data set (--help data)"
            )
        chosen = f"data={self.member}"
        if root:
            chosen += f" {command_line.as_word(setting, root)}"
        return f"data    that of {self.run}: {chosen}. data=NAME takes another"


def find(words: Sequence[Override], beside: Sequence[str] = ()) -> RunData | None:
    """Returns the data set of the first run among the checkpoints of one evaluation.

    If these are only random weights or files, the first run of `beside`, the checkpoints of other
    points in the same sweep, counts: what is compared is measured on the same images. None if no
    run is named, or if the words choose the data.
    """
    points = command_line.checkpoints(words)
    if len(points) != 1:
        return None
    return _of_first([*points[0], *beside], words)


def find_of_point(words: Sequence[Override]) -> RunData | None:
    """Returns what `find` returns in the command of a sweep's point.

    The variable RELLOC_SWEEP_CHECKPOINTS has the checkpoints of the other points.
    """
    values = json.loads(os.environ.get("RELLOC_SWEEP_CHECKPOINTS", "[]"))
    others = command_line.check([f"checkpoint={value}" for value in values], sweeps=False)
    return find(words, _all_names(others))


def find_shared(words: Sequence[Override]) -> RunData | None:
    """Returns the data set that all points of a sweep share, or None if they differ."""
    points = command_line.checkpoints(words)
    beside = [name for names in points for name in names]
    data_of_points = [_of_first([*names, *beside], words) for names in points]
    distinct = {data.words if data else () for data in data_of_points}
    return data_of_points[0] if len(distinct) == 1 else None


def with_data(words: Sequence[str], command: Sequence[str]) -> list[str]:
    """Returns the words of a sweep's point, preceded by those of the data set it evaluates on.

    `command` are the arguments of the command that started the sweep.
    """
    sweep = command_line.read(command)
    beside = _all_names(command_line.check(sweep.words, sweeps=True))
    data = find(command_line.check(words, sweeps=False), beside)
    words_of_data = data.words if data else ()
    return [*words_of_data, *words]


def _all_names(words: Sequence[Override]) -> list[str]:
    """Returns the checkpoints that any of the words names."""
    found = []
    for word in words:
        for names in command_line.checkpoints([word]):
            found += names
    return found


def _of_first(checkpoints: Sequence[str], words: Sequence[Override]) -> RunData | None:
    """Returns the data set of the first run folder among the checkpoints.

    The settings of its probe are left out if the words choose a probe.
    """
    chosen = {word.key_or_group for word in words}
    runs = map(_run_of, checkpoints)
    run = next((run for run in runs if run is not None), None)
    if run is None or not chosen.isdisjoint(_CHOOSES_DATA):
        return None
    return _read(run, chooses_probe="probe" in chosen)


def _run_of(checkpoint: str) -> Path | None:
    """Returns the run folder of a checkpoint: a run folder itself, or a file within one."""
    path = Path(checkpoint)
    if path.name == BACKBONE_FILE:
        path = path.parent
    elif path.suffix == ".pt" and path.parent.name == TRAINING_FOLDER:
        path = path.parent.parent
    return path if os.path.isfile(path / CONFIG_FILE) else None


def _read(run: Path, *, chooses_probe: bool) -> RunData | None:
    """Reads the data set of a run from its config; None if the config names none.

    Raises:
        UsageError: no member of conf/data lists images by the function that the run used.
    """
    content = _load(run / CONFIG_FILE)
    data = content.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), Mapping):
        return None
    # Runs of earlier versions have the sizes of their evaluations in `data`.
    probe = {} if chooses_probe else content.get("probe", data)
    given = settings.flat({"data": data, "probe": probe})
    folders = {key: _from_where_it_was_started(run, given.get(key)) for key in _FOLDERS}
    for key, folder in folders.items():
        if key in given:
            given[key] = folder
    # The members that list images by the same function, each with the words that turn it into the
    # run's data set
    target = data["source"].get("_target_")
    choices = []
    for member in settings.members("data"):
        source = settings.content_of(f"data/{member}").get("source")
        if target is not None and isinstance(source, dict) and source.get("_target_") == target:
            words = _words(settings.compose("evaluate", [f"data={member}"]), given)
            choices.append((len(words), member, words))
    if not choices:
        shown = escaped(str(target)[:_LONGEST_NAME])
        raise UsageError(
            f"{run} was trained on data of {shown}, which no member of data has: give data=NAME"
        )
    # The member that needs the fewest words is the most similar one.
    _, member, words = min(choices)
    return RunData(run=run, member=member, words=(f"data={member}", *words), folders=folders)


def _load(file: Path) -> Any:
    """Returns the content of a file of plain YAML.

    Raises `UsageError` for a file that is too large for a config or has aliases. relloc writes
    none, and a few nested ones can expand to more than fits into memory.
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
    """Returns the absolute path of a folder that may be relative to where the run was started."""
    if isinstance(folder, list):
        return [_from_where_it_was_started(run, element) for element in folder]
    if not isinstance(folder, str) or os.path.isabs(folder):
        return folder
    started_in = None
    if (run / _HYDRA_FILE).is_file():
        started_in = settings.flat(_load(run / _HYDRA_FILE)).get(_STARTED_IN)
    there = os.path.join(started_in, folder) if isinstance(started_in, str) else folder
    # A run that was moved to this machine may have been started in a folder that is not here.
    return os.path.abspath(there if os.path.exists(there) else folder)


def _words(composed: Composed, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the words for settings that the run has otherwise than the member of conf/data."""
    of_member = {}
    for key, value in composed.unresolved.items():
        if key.startswith(("data.", "probe.")):
            of_member[key] = value
    # Settings that follow others of the data set come last: once those are set, most of them have
    # the right value and need no word.
    ordered = sorted(of_member, key=lambda key: "${." in str(of_member[key]))
    found = {}
    for key in ordered:
        if key in given and _is_plain(given[key]) and given[key] != composed.value(key):
            OmegaConf.update(composed.config, key, given[key], merge=False)
            found[key] = given[key]
    return tuple(f"{key}={command_line.as_value(value)}" for key, value in found.items())


def _is_plain(value: Any) -> bool:
    """Whether a value has no interpolation such as `${oc.env:SECRET}`, which Hydra resolves."""
    if isinstance(value, list):
        return all(_is_plain(element) for element in value)
    if isinstance(value, str):
        return "${" not in value
    return value is None or isinstance(value, bool | int | float)
