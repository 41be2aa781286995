"""Divides the words of a sweep's command line between its points and the launcher."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from relloc.errors import UsageError

# Keeps a point from being launched again by a launcher that a config file chooses
RUN_ALONE = "hydra.mode=RUN"
_COMMANDS = ("train", "evaluate", "study")
_OF_LAUNCHER = ("launcher=", "launcher.", "sweep=")
# Hydra's own settings that say how and where a sweep is made, not how a point runs
_OF_SWEEP = (
    "hydra.sweep",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra/launcher",
    "hydra.mode",
    "hydra.run.",
)
# Hydra's options that name folders of configs, with the provider under which Hydra lists each
_FOLDERS = {"--config-path": "main", "--config-dir": "command-line"}


def command_of(config: DictConfig) -> str:
    """Returns the command that was started, such as train, whatever hydra.job.name says."""
    # Users may rename the job in Hydra's settings.
    started = Path(sys.argv[0]).stem
    return started if started in _COMMANDS else config.hydra.job.name


def of_points(overrides: Sequence[str]) -> list[str]:
    """Returns the words of a point without those of the launcher."""
    return [word for word in overrides if not _is_of_launcher(word)]


def refuse_swept(config: DictConfig) -> None:
    """Raises `UsageError` if the launcher, one of its settings or the sweep's name is swept over.

    All points share one launcher, which is made before they are known. Values from choice(...),
    launcher=a,b or hydra.sweeper.params would not reach it.
    """
    words = [word for word in config.hydra.overrides.task if "=" in word]
    given = OverridesParser.create().parse_overrides(words)
    swept = [word.key_or_group for word in given if word.is_sweep_override()]
    swept += list(config.hydra.sweeper.get("params") or {})
    for key in swept:
        if _is_of_launcher(f"{key}="):
            raise UsageError(
                f"{key} can't be swept, as all points share one launcher: give it one value on the "
                f"command line; one with a comma is quoted, {key}=\"'a,b'\" in a shell"
            )


def chosen(overrides: Sequence[str], config: DictConfig) -> list[str]:
    """Returns the words that a sweeper chose: they are not on the command line."""
    given = set(config.hydra.overrides.task)
    return [word for word in overrides if word not in given]


def names_launcher(overrides: Sequence[str]) -> bool:
    """Whether one of the words chooses a launcher."""
    return any(_plain(word).startswith("launcher=") for word in overrides)


def of_hydra_for_points(config: DictConfig) -> list[str]:
    """Returns the settings of Hydra that points need as well, such as hydra.searchpath."""
    return [word for word in config.hydra.overrides.hydra if not _plain(word).startswith(_OF_SWEEP)]


def of_hydra_for_launcher(config: DictConfig) -> list[str]:
    """Returns the settings of Hydra that choose the launcher and the sweep's folder.

    Those of a sweeper are left out.
    """
    beginnings = ("hydra.sweep.dir=", "hydra.launcher", "hydra/launcher")
    return [word for word in config.hydra.overrides.hydra if _plain(word).startswith(beginnings)]


def values(job_overrides: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Returns, for each setting, the distinct values that the points give it."""
    values_of: dict[str, list[str]] = {}
    for overrides in job_overrides:
        for word in overrides:
            key, _, value = word.partition("=")
            known = values_of.setdefault(_plain(key), [])
            if value not in known:
                known.append(value)
    return values_of


def folders_of_configs(config: DictConfig, usual: Path) -> dict[str, Path]:
    """Returns the folders of configs that the command's options name, without the `usual` one."""
    found = {}
    for option, provider in _FOLDERS.items():
        for source in config.hydra.runtime.config_sources:
            if source.provider == provider and source.schema == "file":
                folder = Path(os.path.abspath(source.path))
                # relloc's own folder is part of the copy of the code in any case.
                if folder != usual:
                    found[option] = folder
    return found


def options(config: DictConfig, kind: str, folders: dict[str, Path]) -> list[str]:
    """Returns Hydra's options for a point's command, which name these folders of configs."""
    name = str(config.hydra.job.config_name)
    words = [f"{option}={folder}" for option, folder in folders.items()]
    if name != kind:
        words.append(f"--config-name={name}")
    return words


def _plain(word: str) -> str:
    """Returns a word without the signs by which Hydra adds or removes a setting."""
    return word.lstrip("+~")


def _is_of_launcher(word: str) -> bool:
    """Whether a word is a setting of the launcher, or names the sweep."""
    return _plain(word).startswith(_OF_LAUNCHER)
