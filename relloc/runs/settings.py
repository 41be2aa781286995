"""The settings of relloc: folders of configs, their groups and members, composed by Hydra.

Nothing here imports torch.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from relloc.errors import UsageError
from relloc.runs import resolvers as _resolvers  # noqa: F401  (registers what conf/ names)

COMMANDS = ("train", "evaluate", "study", "prepare")  # those that Hydra composes a config for
# The commands that measure checkpoints which exist already
EVALUATING_COMMANDS = ("evaluate", "study")
# The groups that evaluations are chosen from, and the settings that hold them
EVALUATION_GROUPS = ("eval", "study")
# The groups that `~GROUP` leaves out, also where a preset chooses a member
OPTIONAL_GROUPS = ("chroma_blur", "aperture", "rotation", "curriculum", "experiment", "ablation")
# A data set chooses the member of these groups that has its own name, if there is one.
CHOSEN_BY_DATA = ("recipe", "probe")


def conf_dir() -> Path:
    """Returns the folder of configs: in the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UsageError(f"conf/ is neither in {here} nor beside it: install relloc again")


def conf_dirs() -> list[Path]:
    """Returns relloc's folder of configs and, if RELLOC_CONF names one, the user's own."""
    own = os.environ.get("RELLOC_CONF", "").removeprefix("file://")
    folders = [conf_dir()]
    if own and Path(own).is_dir():
        folders.append(Path(own))
    return folders


def is_group(name: str) -> bool:
    """Whether `name` is a group of configs, such as `grid`."""
    return bool(name) and any((folder / name).is_dir() for folder in conf_dirs())


def members(group: str) -> list[str]:
    """Returns the names of the members of a group, sorted.

    Files whose names begin with an underscore are parts that members share, and no members.
    """
    if not group:
        return []
    names = set()
    for folder in conf_dirs():
        names |= {path.stem for path in (folder / group).glob("[!_]*.yaml")}
    return sorted(names)


def members_general_first(group: str) -> list[str]:
    """Returns the members of a group, `folder` before those that are made for one data set.

    It is the member that explanations of a setting should show.
    """
    return sorted(members(group), key=lambda member: (member != "folder", member))


def file_of(member: str) -> Path | None:
    """Returns the file of a member such as `grid/mmselfsup`, or None if there is none."""
    for folder in conf_dirs():
        path = folder / f"{member}.yaml"
        if path.is_file():
            return path
    return None


def about(member: str) -> list[str]:
    """Returns the lines of the comment that a member's file opens with, without the `#`.

    Without a file, there are no lines.
    """
    file = file_of(member)
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file else ():
        if not line.startswith("#"):
            break
        # A directive of Hydra, which explains nothing
        if not line.startswith("# @package"):
            lines.append(line[1:].removeprefix(" ").rstrip())
    return lines


def content_of(member: str) -> dict[str, Any]:
    """Returns the settings in a member's file, interpolations unresolved; {} without a file."""
    file = file_of(member)
    return plain(OmegaConf.load(file), resolve=False) if file else {}


def plain(node: Any, *, resolve: bool = True) -> dict[str, Any]:
    """Returns a config node as plain dicts and lists, with interpolations resolved by default."""
    content = OmegaConf.to_container(node, resolve=resolve)
    if not isinstance(content, dict):
        return {}
    return {str(name): value for name, value in content.items()}


def chosen_evaluations(config: DictConfig, group: str) -> list[str]:
    """Returns the names of the evaluations of `group`, "eval" or "study", that a config chooses.

    A preset may have settings of an evaluation that the command line takes out of it, as `eval=[]`
    does. They lack the `_target_`, which comes with the member of the group, and call nothing.
    """
    nodes = config.get(group) or {}
    return [
        str(name)
        for name, node in nodes.items()
        if isinstance(node, DictConfig) and "_target_" in node
    ]


def resolved(config: DictConfig) -> dict[str, Any]:
    """Returns a composed config as plain dicts and lists, with interpolations resolved.

    Settings of evaluations that are not chosen are left out; others may still refer to them.
    """
    settings: dict[str, Any] = {}
    for name in config:
        key = str(name)
        if OmegaConf.is_missing(config, name):
            # As OmegaConf leaves it, so that whoever reads the setting can name it
            settings[key] = "???"
            continue
        value = config[name]
        if key in EVALUATION_GROUPS:
            # Each by itself, since what is left out need not have values for its interpolations
            chosen = chosen_evaluations(config, key)
            settings[key] = {evaluation: plain(value[evaluation]) for evaluation in chosen}
        elif OmegaConf.is_config(value):
            settings[key] = OmegaConf.to_container(value, resolve=True)
        else:
            settings[key] = value
    return settings


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns all settings of a plain config by their full names, such as `grid.gap_px`.

    A setting that holds others comes before those it holds.
    """
    settings = {}
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name != "_target_":
                settings[f"{prefix}{name}"] = value
                settings |= flat(value, f"{prefix}{name}.")
    return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A file that a config is composed of.

    Its settings come below `package`, such as `grid`; an empty package is the top of the config.
    """

    name: str
    package: str
    file: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed:
    """The config that a command composes from the words of its command line."""

    config: DictConfig
    command: str
    words: tuple[str, ...]

    @functools.cached_property
    def unresolved(self) -> dict[str, Any]:
        """All settings by their full names, with interpolations unresolved."""
        return flat(OmegaConf.to_container(self.config, resolve=False))

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files that the config is composed of; a later one overrides earlier ones."""
        with _hydra():
            loader = GlobalHydra.instance().hydra.config_loader  # pyright: ignore[reportOptionalMemberAccess]
            entries = loader.compute_defaults_list(
                self.command, list(self.words), RunMode.RUN
            ).defaults
        sources = []
        for entry in entries:
            if not entry.config_path:
                continue
            # Hydra's own configs have no file in the folders of relloc and the user.
            file = file_of(entry.config_path)
            if file is not None:
                source = Source(name=entry.config_path, package=entry.package or "", file=file)
                sources.append(source)
        return tuple(sources)

    def default(self, key: str) -> Any:
        """Returns the resolved value of a setting, or None where it can't be resolved."""
        try:
            return self.value(key)
        except (ValueError, KeyError):
            # It names another setting, or an environment variable, that is not set.
            return None

    def value(self, key: str) -> Any:
        """Returns the resolved value of a setting."""
        value = OmegaConf.select(self.config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def names(self) -> list[str]:
        """Returns the full names of all settings."""
        return list(self.unresolved)


def compose(command: str, words: Sequence[str] = (), *, with_hydra: bool = False) -> Composed:
    """Composes the config of `command`, such as `train`, with the words of a command line.

    `with_hydra` includes Hydra's own settings, such as `hydra.run.dir`. Raises what Hydra raises.

    Example: `compose("train", ["model=resnet50", "seed=1"]).value("seed")` is 1.
    """
    with _hydra():
        config = hydra.compose(command, list(words), return_hydra_config=with_hydra)
    return Composed(config=config, command=command, words=tuple(words))


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    # A command that failed while it was composed leaves Hydra initialized.
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def chosen_groups(words: Sequence[str]) -> list[str]:
    """Returns the words that choose a member of a group, which decides what settings there are.

    Words that list several members to sweep over are left out.
    """
    chosen = []
    for word in words:
        group, equals, member = word.lstrip("+").partition("=")
        is_sweep = "," in word and not member.endswith("]")
        if equals and is_group(group) and not is_sweep:
            chosen.append(word)
    return chosen
