"""What of a sweep's command line its points get, and what is the launcher's."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from relloc.errors import UsageError

RUN_ALONE = "hydra.mode=RUN"  # for the command of a point whose launcher, chosen in a file, would launch it again
_COMMANDS = ("train", "evaluate")
_OF_LAUNCHER = ("launcher=", "launcher.", "sweep=")
# Hydra's own settings that say how a sweep is made and where, not how a point runs
_OF_SWEEP = (
    "hydra.sweep",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra/launcher",
    "hydra.mode",
    "hydra.run.",
)
# Hydra's options that name folders of configs, and the provider by which Hydra lists what they named
_FOLDERS = {"--config-path": "main", "--config-dir": "command-line"}


def command_of(config: DictConfig) -> str:
    """The command that was started, train or evaluate, whatever hydra.job.name calls it."""
    started = Path(sys.argv[0]).stem
    return started if started in _COMMANDS else config.hydra.job.name


def of_points(overrides: Sequence[str]) -> list[str]:
    """A point's own words: those that are not the launcher's."""
    return [word for word in overrides if not _is_of_launcher(word)]


def refuse_swept(config: DictConfig) -> None:
    """Raise `UsageError` where the launcher, a setting of it or the sweep's name would be swept.

    All points share one launcher, made before they are known: values from choice(...), launcher=a,b or
    hydra.sweeper.params would not reach it.
    """
    given = OverridesParser.create().parse_overrides(
        [word for word in config.hydra.overrides.task if "=" in word]
    )
    swept = [word.key_or_group for word in given if word.is_sweep_override()]
    swept += list(config.hydra.sweeper.get("params") or {})
    for key in swept:
        if _is_of_launcher(f"{key}="):
            raise UsageError(
                f"{key} can't be swept, as all points share one launcher: give it one value on the command line; "
                f"one with a comma is quoted, {key}=\"'a,b'\" in a shell"
            )


def chosen(overrides: Sequence[str], config: DictConfig) -> list[str]:
    """The words that do not stand on the command line as they are: a sweeper chose them."""
    given = set(config.hydra.overrides.task)
    return [word for word in overrides if word not in given]


def names_launcher(overrides: Sequence[str]) -> bool:
    """Whether a word chooses the launcher, which a point does without."""
    return any(_plain(word).startswith("launcher=") for word in overrides)


def of_hydra_for_points(config: DictConfig) -> list[str]:
    """Hydra's own settings that a point needs as the command has them, such as hydra.searchpath."""
    return [word for word in config.hydra.overrides.hydra if not _plain(word).startswith(_OF_SWEEP)]


def of_hydra_for_launcher(config: DictConfig) -> list[str]:
    """Hydra's own settings that say where points run and are noted; not how they are searched for."""
    kept = ("hydra.sweep.dir=", "hydra.launcher", "hydra/launcher")
    return [word for word in config.hydra.overrides.hydra if _plain(word).startswith(kept)]


def values(job_overrides: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """What each setting is in any of the points."""
    found: dict[str, list[str]] = {}
    for overrides in job_overrides:
        for word in overrides:
            key, _, value = word.partition("=")
            there = found.setdefault(_plain(key), [])
            there += [value] if value not in there else []
    return found


def folders_of_configs(config: DictConfig, usual: Path) -> dict[str, Path]:
    """The folders that the command named by Hydra's options, by these; not the `usual` one."""
    found = {}
    for option, provider in _FOLDERS.items():
        for source in config.hydra.runtime.config_sources:
            if source.provider == provider and source.schema == "file":
                folder = Path(os.path.abspath(source.path))
                if folder != usual:
                    found[option] = folder
    return found


def options(config: DictConfig, kind: str, folders: dict[str, Path]) -> list[str]:
    """Hydra's options for a point, with these folders of configs."""
    name = str(config.hydra.job.config_name)
    named = [f"--config-name={name}"] if name != kind else []
    return [*(f"{option}={folder}" for option, folder in folders.items()), *named]


def _plain(word: str) -> str:
    return word.lstrip("+~")


def _is_of_launcher(word: str) -> bool:
    """Whether a word says how points are run, or what the sweep is called."""
    return _plain(word).startswith(_OF_LAUNCHER)
