"""Words of the command line that are the launcher's, and none of a point's."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from relloc.errors import UsageError

RUN_ALONE = "hydra.mode=RUN"  # for the command of a point whose launcher, chosen in a file, would launch it again
_OF_LAUNCHER = ("launcher=", "launcher.", "sweep=")


def is_of_launcher(word: str) -> bool:
    """Whether a word says how points are run, or what the sweep is called."""
    return word.lstrip("+~").startswith(_OF_LAUNCHER)


def refuse_swept(config: DictConfig) -> None:
    """Raise `UsageError` where the launcher, a setting of it or the sweep's name would be swept.

    All points share one launcher, made before they are known: values from choice(...), launcher=a,b or
    hydra.sweeper.params would not reach it.
    """
    given = OverridesParser.create().parse_overrides([word for word in config.hydra.overrides.task if "=" in word])
    swept = [word.key_or_group for word in given if word.is_sweep_override()]
    swept += list(config.hydra.sweeper.get("params") or {})
    for key in swept:
        if is_of_launcher(f"{key}="):
            raise UsageError(
                f"{key} can't be swept, as all points share one launcher: give it one value on the command line; "
                f"one with a comma is quoted, {key}=\"'a,b'\" in a shell"
            )
