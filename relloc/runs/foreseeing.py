"""What can be said against a run before it is started and without its data: of all points of a sweep at once.

Each part of a config is looked at once, however many points share it. Whether the machine has the GPU, and whether
the images are any good, is seen where the point runs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from relloc import checks
from relloc.data.order import StepPlan
from relloc.errors import UsageError
from relloc.results import NOT_OURS
from relloc.runs import assemble, checking, engine
from relloc.runs.engine import Engine

Check = Callable[[DictConfig], object]  # raises what is wrong; what it makes is not needed
Checks = Sequence[tuple[tuple[str, ...], Check]]  # each with the settings that decide how it ends; () for all
# Evaluations are only made, not run: on which device they would is of no account.
_ENGINE = Engine(
    device=torch.device("cpu"),
    precision="fp32",
    compiled=False,
    cuda_graphs=False,
    memory_format="contiguous",
    deterministic=False,
    workers=0,
)


def refusals(
    kind: str, points: Sequence[tuple[DictConfig, Mapping[str, Any]]], made_by_jobs: Sequence[str] = ()
) -> list[str | None]:
    """Why each point can't be run, in one sentence; None for those that nothing is known against.

    A point is its composed config and the same resolved. Folders of data that stand in `made_by_jobs`, lines of a
    batch script, are not looked for: a job may copy its data to its node's own disk.
    """
    checks = (*_CHECKS[kind], ((), lambda config: _check_data(config, kind, made_by_jobs)))
    known: dict[tuple[int, str], str | None] = {}
    return [_refusal(checks, config, resolved, known) for config, resolved in points]


def _refusal(
    checks: Checks, config: DictConfig, resolved: Mapping[str, Any], known: dict[tuple[int, str], str | None]
) -> str | None:
    for number, (names, check) in enumerate(checks):
        if not names:
            found = _said_by(check, config)
        else:
            key = (number, json.dumps([_part(resolved, name) for name in names], sort_keys=True, default=str))
            if key not in known:
                known[key] = _said_by(check, config)
            found = known[key]
        if found:
            return found
    return None


def _part(resolved: Mapping[str, Any], name: str) -> Any:
    part: Any = resolved
    for word in name.split("."):
        part = part.get(word) if isinstance(part, Mapping) else None
    return part


def _said_by(check: Check, config: DictConfig) -> str | None:
    try:
        check(config)
    except InstantiationException as error:
        return _one_line(error.__cause__ if isinstance(error.__cause__, ValueError) else error)
    except (ValueError, TypeError, OmegaConfBaseException) as error:  # TypeError: of a value of another kind
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_steps(config: DictConfig) -> None:
    """What divides at best, in one process: how many there will be is not known here."""
    ghost, step = config.recipe.images_per_batch_norm, config.recipe.images_per_step
    forward = ghost if config.images_per_forward == "auto" else config.images_per_forward
    forward = checks.whole("images_per_forward", forward)
    StepPlan(n_images=step, images_per_step=step, images_per_batch_norm=ghost, images_per_forward=forward)
    if config.collapse_steps != "auto":
        checks.whole("collapse_steps", config.collapse_steps)


def _check_checkpoint(config: DictConfig) -> None:
    for one in checking.named_checkpoints(config):
        if one not in NOT_OURS and not Path(one).exists():
            raise UsageError(f"checkpoint={one} is not there: give a run folder, a file, or {' or '.join(NOT_OURS)}")


def _check_data(config: DictConfig, kind: str, made_by_jobs: Sequence[str]) -> None:
    for setting, node in _data_of(config, kind):
        for name, place in _places(node):
            if place is None:
                raise UsageError(f"{setting}.root is not set: give {setting}.root=FOLDER")
            if not Path(place).is_dir() and not any(place in line for line in made_by_jobs):
                raise UsageError(f"{setting}.{name}={place} is not a folder here")


def _data_of(config: DictConfig, kind: str) -> Iterator[tuple[str, DictConfig]]:
    own = assemble.own_data(config)
    if kind == "train" or len(own) < len(config.eval or {}):
        yield "data", config.data
    for name in own:
        yield f"eval.{name}.data", config.eval[name].data


def _places(data: DictConfig) -> Iterator[tuple[str, str | None]]:
    """The folders that a data set is read from, each with its setting; None for one that nobody named."""
    if data.get("shards"):
        yield "shards", str(data.shards)
        return
    if "root" not in data.source:
        return
    roots = data.source.root
    for root in [roots] if roots is None or isinstance(roots, str) else roots:
        if not root or not data.source.get("download"):  # which makes the folder
            yield "root", str(root) if root else None


_OF_ALL: Checks = (
    ((), checking.check_numbers),
    (("tracking",), checking.check_tracking),
    ((), checking.check_roots),
    ((), engine.check_words),
)
_OF_EVALUATIONS: Checks = (
    (("view",), assemble.view),
    (("batch_norm", "calibration_images", "bank_gib", "seed"), lambda config: assemble.eval_settings(config, _ENGINE)),
)
_OF_RECALIBRATION = ("eval", "batch_norm", "model", "view", "seed", "calibration_images", "bank_gib")
_CHECKS: Mapping[str, Checks] = {
    "train": (
        ((), checking.check_is_training),
        *_OF_ALL,
        (
            ("recipe.images_per_step", "recipe.images_per_batch_norm", "images_per_forward", "collapse_steps"),
            _check_steps,
        ),
        (("grid", "color", "normalize"), assemble.patches),
        (("schedule",), lambda config: assemble.call(config.schedule)),
        (("eval",), assemble.evaluations),
        *_OF_EVALUATIONS,
        (_OF_RECALIBRATION, lambda config: checking.check_recalibration(config, _ENGINE)),
        (("model", "pretext_batch_norm", "recipe.images_per_batch_norm", "grid.patch_px"), checking.check_network),
        (("model", "pretext_batch_norm", "recipe.images_per_batch_norm", "optimizer"), checking.check_optimizer),
    ),
    "evaluate": (
        *_OF_ALL,
        (("checkpoint",), _check_checkpoint),
        (("eval",), checking.check_has_evaluations),
        *_OF_EVALUATIONS,
    ),
}
