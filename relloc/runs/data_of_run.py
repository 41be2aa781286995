"""Has an evaluation use the data set that its checkpoint was trained on.

`relloc.evaluate checkpoint=RUN` takes the data set from RUN unless `data=` names another. The
settings are read from the run's config.yaml and become words of the command line, before those that
were typed.

A run folder may come from somebody else. Hence only plain values are taken from it, only for
settings that a member of conf/data has, and that member says which function lists the images.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from relloc.checkpoints.paths import BACKBONE_FILE, RECALIBRATED_FILE, TRAINING_FOLDER
from relloc.errors import UsageError, reason
from relloc.runs import command_line, settings
from relloc.runs.settings import Composed
from relloc.sweeps.trainings import find_trainings
from relloc.terminal import escaped

CONFIG_FILE = "config.yaml"
_HYDRA_FILE = Path(".hydra", "hydra.yaml")
_LARGEST_FILE = 2**20  # bytes of a config
_LONGEST_NAME = 200  # characters of a name from a run folder, in a message
_CHOOSES_DATA = ("data", "experiment")  # groups that choose the data; a preset may do so
_STARTED_IN = "hydra.runtime.cwd"
# Settings with folders of images, and of what belongs to them
_FOLDERS = ("data.root", "data.shards", "data.source.root", "data.proposals")


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
        evaluations = []
        for group in settings.EVALUATION_GROUPS:
            evaluations += (given[group] or {}).values()
        has_own_data = [bool(node.get("data")) for node in evaluations]
        if all(has_own_data):
            return ""
        data = given["data"]
        name = "shards" if data.get("shards") else "root"
        setting = f"data.{name}"
        root = data.get(name)
        roots = []
        if root:
            roots = root if isinstance(root, list) else [root]
        missing = []
        for folder in map(str, roots):
            if not os.path.exists(folder):
                missing.append(folder)
        # Another folder, which the user gave, is checked later with all other settings.
        if missing and root == self.folders.get(setting):
            raise UsageError(
                f"{self.run} was trained on data={self.member} in {', '.join(missing)}, which is "
                f"not there any more: give {setting}=FOLDER, where it is now, or data=NAME for "
                "another data set (--help data)"
            )
        chosen = f"data={self.member}"
        if root:
            word = command_line.as_word(setting, root)
            chosen += f" {word}"
        return f"data    that of {self.run}: {chosen}. data=NAME takes another"


def find(
    words: Sequence[Override],
    beside: Sequence[str] = (),
) -> RunData | None:
    """Returns the data set of the first run among the checkpoints of one evaluation.

    If these are only random weights or files, the first run of `beside`, the checkpoints of other
    points in the same sweep, counts: what is compared is measured on the same images. None if no
    run is named, or if the words choose the data.
    """
    watching = command_line.watched(words)
    if len(watching) == 1:
        return _of_watched(watching[0], words)
    points = command_line.checkpoints(words)
    if len(points) != 1:
        return None
    [own] = points
    return _of_first([*own, *beside], words)


def find_of_point(words: Sequence[Override]) -> RunData | None:
    """Returns what `find` returns in the command of a sweep's point.

    The variable RELLOC_SWEEP_CHECKPOINTS has the checkpoints of the other points.
    """
    text = os.environ.get("RELLOC_SWEEP_CHECKPOINTS", "[]")
    # Read as words of a command line, since a value may be a list or be in quotes.
    words_of_others = [f"checkpoint={value}" for value in json.loads(text)]
    others = command_line.check(words_of_others, sweeps=False)
    return find(words, _all_names(others))


def find_shared(words: Sequence[Override]) -> RunData | None:
    """Returns the data set that all points of a sweep share, or None if they differ."""
    watching = command_line.watched(words)
    if watching:
        data_of_watches = [_of_watched(names, words) for names in watching]
        words_of_watches = {data.words if data else () for data in data_of_watches}
        return data_of_watches[0] if len(words_of_watches) == 1 else None
    points = command_line.checkpoints(words)
    beside = itertools.chain.from_iterable(points)
    all_checkpoints = list(beside)
    data_of_points = []
    distinct = set()
    for names in points:
        # A point without a run of its own takes the data of the sweep's first run.
        data = _of_first([*names, *all_checkpoints], words)
        data_of_points.append(data)
        distinct.add(data.words if data else ())
    if len(distinct) != 1:
        return None
    return data_of_points[0]


def with_data(
    words: Sequence[str],
    command: Sequence[str],
) -> list[str]:
    """Returns the words of a sweep's point, preceded by those of the data set it evaluates on.

    `command` are the arguments of the command that started the sweep.
    """
    sweep = command_line.read(command)
    words_of_sweep = command_line.check(sweep.words, sweeps=True)
    words_of_point = command_line.check(words, sweeps=False)
    data = find(words_of_point, beside=_all_names(words_of_sweep))
    if data is None:
        return list(words)
    # First, so that what the sweep itself sets wins.
    return [*data.words, *words]


def _all_names(words: Sequence[Override]) -> list[str]:
    """Returns the checkpoints that any of the words names."""
    checkpoints = []
    for word in words:
        for names in command_line.checkpoints([word]):
            checkpoints += names
    return checkpoints


def _of_first(
    checkpoints: Sequence[str],
    words: Sequence[Override],
) -> RunData | None:
    """Returns the data set of the first run folder among the checkpoints.

    The settings of its probe are left out if the words choose a probe.
    """
    chosen = {word.key_or_group for word in words}
    # What the user chooses wins over what a run was trained on.
    if not chosen.isdisjoint(_CHOOSES_DATA):
        return None
    for checkpoint in checkpoints:
        run = _run_of(checkpoint)
        if run is not None:
            return _read(run, chooses_probe="probe" in chosen)
    return None


def _of_watched(names: Sequence[str], words: Sequence[Override]) -> RunData | None:
    """Returns the data set of the trainings that `watch=` names; None if the words choose one.

    Raises:
        UsageError: they have several, or it is not known yet since none has begun.
    """
    # A damaged record is reported when the trainings are watched.
    trainings, _ = find_trainings("watch", [name for name in names if "$" not in name])
    chosen = {word.key_or_group for word in words}
    if not trainings or not chosen.isdisjoint(_CHOOSES_DATA):
        return None
    found: dict[tuple[str, ...], RunData] = {}
    for training in trainings:
        run = _run_of(str(training.folder))
        data = _read(run, chooses_probe="probe" in chosen) if run else None
        if data:
            found.setdefault(data.words, data)
    listed = ",".join(names)
    if not found:
        raise UsageError(
            f"watch={listed}: no training has begun, so that it is not known what to evaluate on: "
            "give data=NAME, with the folder of its images, or start this command later"
        )
    if len(found) > 1:
        raise UsageError(
            f"watch={listed}: the trainings have {len(found)} data sets, or sizes of evaluations, "
            "and one command evaluates on one: give data=NAME, or watch them by a command each"
        )
    return next(iter(found.values()))


def _run_of(checkpoint: str) -> Path | None:
    """Returns the run folder of a checkpoint: a run folder itself, or a file within one."""
    path = Path(checkpoint)
    folder = path.parent
    if path.name in (BACKBONE_FILE, RECALIBRATED_FILE):
        path = folder
    elif path.suffix == ".pt" and folder.name == TRAINING_FOLDER:
        path = folder.parent
    # os.path, since pathlib raises an error for a name that is too long.
    if not os.path.isfile(path / CONFIG_FILE):
        return None
    return path


def _read(run: Path, *, chooses_probe: bool) -> RunData | None:
    """Reads the data set of a run from its config; None if the config names none.

    Raises:
        UsageError: no member of conf/data lists images by the function that the run used.
    """
    content = load_config(run / CONFIG_FILE)
    data = content.get("data")
    if not isinstance(data, Mapping):
        return None
    source = data.get("source")
    if not isinstance(source, Mapping):
        return None
    # Runs of earlier versions have the sizes of their evaluations in `data`.
    probe = {} if chooses_probe else content.get("probe", data)
    given = settings.flat({"data": data, "probe": probe})
    # Relative folders count from where the run was started, which may not be where we are.
    folders = {}
    for key in _FOLDERS:
        folder = _from_where_it_was_started(run, given.get(key))
        folders[key] = folder
        if key in given:
            given[key] = folder
    # The members that list images by the same function, each with the words that turn it into the
    # run's data set
    target = source.get("_target_")
    choices = []
    for member in settings.members("data"):
        if target is None or _target_of(member) != target:
            continue
        composed = settings.compose("evaluate", [f"data={member}"])
        words = _words(composed, given)
        choices.append((len(words), member, words))
    if not choices:
        shown = escaped(str(target)[:_LONGEST_NAME])
        raise UsageError(
            f"{run} was trained on data of {shown}, which no member of data has: give data=NAME"
        )
    # The member that needs the fewest words is the most similar one.
    _, member, words = min(choices)
    return RunData(
        run=run,
        member=member,
        words=(f"data={member}", *words),
        folders=folders,
    )


def _target_of(member: str) -> Any:
    """Returns the function by which a member of conf/data lists its images; None if it has none."""
    content = settings.content_of(f"data/{member}")
    source = content.get("source")
    if not isinstance(source, dict):
        return None
    return source.get("_target_")


def load_config(file: Path) -> Any:
    """Returns the content of a file of plain YAML.

    Raises `UsageError` for a file that is too large for a config or has aliases. relloc writes
    none, and a few nested ones can expand to more than fits into memory.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise yaml.YAMLError(f"it has more than {_LARGEST_FILE} bytes")
        text = file.read_text(encoding="utf-8")
        # Events are read before anything is expanded.
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias, which relloc does not write")
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} can't be read ({reason(error)}): give data=NAME",
        ) from error
    if not isinstance(content, dict):
        return {}
    return content


def _from_where_it_was_started(run: Path, folder: Any) -> Any:
    """Returns the absolute path of a folder that may be relative to where the run was started."""
    if isinstance(folder, list):
        return [_from_where_it_was_started(run, element) for element in folder]
    if not isinstance(folder, str) or os.path.isabs(folder):
        return folder
    # Hydra's own record has the folder of the command, if the run has that record.
    hydra_file = run / _HYDRA_FILE
    hydras_settings = {}
    if hydra_file.is_file():
        hydras_settings = settings.flat(load_config(hydra_file))
    started_in = hydras_settings.get(_STARTED_IN)
    if isinstance(started_in, str):
        there = os.path.join(started_in, folder)
        # A run that was moved to this machine may have been started in a folder that is not here.
        if os.path.exists(there):
            folder = there
    return os.path.abspath(folder)


def _words(
    composed: Composed,
    given: Mapping[str, Any],
) -> tuple[str, ...]:
    """Returns the words for settings that the run has otherwise than the member of conf/data."""
    of_member = {}
    for key, value in composed.unresolved.items():
        if key.startswith(("data.", "probe.")):
            of_member[key] = value

    # Settings that follow others of the data set come last: once those are set, most of them have
    # the right value and need no word.
    def follows_another(key: str) -> bool:
        return "${." in str(of_member[key])

    words = []
    for key in sorted(of_member, key=follows_another):
        if key not in given:
            continue
        value = given[key]
        if _is_plain(value) and value != composed.value(key):
            OmegaConf.update(composed.config, key, value, merge=False)
            words.append(f"{key}={command_line.as_value(value)}")
    return tuple(words)


def _is_plain(value: Any) -> bool:
    """Whether a value has no interpolation such as `${oc.env:SECRET}`, which Hydra resolves."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return "${" not in value
    return value is None or isinstance(value, bool | int | float)
