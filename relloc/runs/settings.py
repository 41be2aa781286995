"""What settings there are: the folders of configs, their groups and members, and what a command composes of them.

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

COMMANDS = ("train", "evaluate", "prepare")  # that have settings
# Groups of which a data set chooses the member that is called like itself, if there is one
CHOSEN_BY_DATA = ("recipe", "probe")


def conf_dir() -> Path:
    """The folder of configs: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for found in (here / "conf", here.parent / "conf"):
        if (found / "train.yaml").is_file():
            return found
    raise UsageError(f"conf/ is neither in {here} nor beside it: install relloc again")


def conf_dirs() -> list[Path]:
    """All folders that groups are looked for in: ours, and the user's own."""
    own = os.environ.get("RELLOC_CONF", "").removeprefix("file://")
    return [conf_dir(), *([Path(own)] if own and Path(own).is_dir() else [])]


def is_group(name: str) -> bool:
    return bool(name) and any((folder / name).is_dir() for folder in conf_dirs())


def members(group: str) -> list[str]:
    """The members of a group, by name; files called `_…` are parts that members share."""
    found = (
        (path.stem for folder in conf_dirs() for path in (folder / group).glob("[!_]*.yaml"))
        if group
        else ()
    )
    return sorted(set(found))


def file_of(member: str) -> Path | None:
    """The file of `grid/mmselfsup` or `settings`."""
    return next(
        (path for folder in conf_dirs() if (path := folder / f"{member}.yaml").is_file()), None
    )


def about(member: str) -> list[str]:
    """The comment that the file of `grid/mmselfsup` opens with, without its marks; [] where there is no file."""
    file = file_of(member)
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file else ():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].removeprefix(" ").rstrip())
    return lines


def content_of(member: str) -> dict[str, Any]:
    """What the file of `grid/mmselfsup` sets, unresolved; {} where there is none."""
    file = file_of(member)
    return plain(OmegaConf.load(file), resolve=False) if file else {}


def plain(node: Any, *, resolve: bool = True) -> dict[str, Any]:
    """A node of a config as JSON has it, with everything in it resolved unless said otherwise."""
    content = OmegaConf.to_container(node, resolve=resolve)
    return (
        {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}
    )


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """All settings of a plain config by their full names, those that hold others before what they hold."""
    found = {}
    for name, value in node.items() if isinstance(node, Mapping) else ():
        if name != "_target_":
            found |= {f"{prefix}{name}": value, **flat(value, f"{prefix}{name}.")}
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A file of configs as a command takes it: what it sets stands below `package`, "" for the top."""

    name: str
    package: str
    file: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed:
    """What a command composes of these words."""

    config: DictConfig
    command: str
    words: tuple[str, ...]

    @functools.cached_property
    def unresolved(self) -> dict[str, Any]:
        """All settings by their full names, groups of them before what they hold."""
        return flat(OmegaConf.to_container(self.config, resolve=False))

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files that it is composed of, later ones over earlier ones."""
        with _hydra():
            loader = GlobalHydra.instance().hydra.config_loader  # pyright: ignore[reportOptionalMemberAccess]
            listed = loader.compute_defaults_list(
                self.command, list(self.words), RunMode.RUN
            ).defaults
        names = [(one.config_path, one.package or "") for one in listed if one.config_path]
        files = ((name, package, file_of(name)) for name, package in names)
        return tuple(
            Source(name=name, package=package, file=file) for name, package, file in files if file
        )

    def default(self, key: str) -> Any:
        """The value of a setting, resolved where that is possible."""
        try:
            return self.value(key)
        except (
            ValueError,
            KeyError,
        ):  # it names another one, or an environment variable, that is not set
            return None

    def value(self, key: str) -> Any:
        """The value of a setting, resolved."""
        value = OmegaConf.select(self.config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def names(self) -> list[str]:
        """All settings by their full names."""
        return list(self.unresolved)


def compose(command: str, words: Sequence[str] = (), *, with_hydra: bool = False) -> Composed:
    """What `command` composes with these words, with Hydra's own settings if asked for. Raises what Hydra raises."""
    with _hydra():
        config = hydra.compose(command, list(words), return_hydra_config=with_hydra)
    return Composed(config=config, command=command, words=tuple(words))


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()  # a command that failed while it was composed leaves its own
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def chosen_groups(words: Sequence[str]) -> list[str]:
    """The group=member words, which decide what settings there are; not those that name several members to sweep."""
    chosen = [
        word for word in words if is_group(word.lstrip("+").partition("=")[0]) and "=" in word
    ]
    return [word for word in chosen if "," not in word or word.endswith("]")]
