"""The objective of a search: the result that a sweeper is given for each point.

The setting `objective` names it, such as linear_fast/feature4/top1.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from relloc.errors import UsageError
from relloc.results import RESULTS_FILE, Result, read_results
from relloc.runs.settings import chosen_evaluations
from relloc.terminal import quantity

# Hydra's own sweeper, which runs a grid and needs no objective
_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_PRETEXT = "pretext"  # results that each pretraining measures itself, without an evaluation


def names_of(config: DictConfig) -> tuple[str, ...]:
    """Returns the results that `objective` names. Raises `UsageError` for what is no name."""
    asked = config.get("objective")
    if asked is None:
        return ()
    names = list(asked) if isinstance(asked, ListConfig) else [asked]
    if any(not isinstance(name, str) or not name.strip() for name in names):
        raise UsageError(
            f"objective={asked} names no result: give one such as linear_fast/feature4/top1"
        )
    return tuple(names)


def is_search(config: DictConfig) -> bool:
    """Whether the sweeper chooses points by the results of earlier ones."""
    return config.hydra.sweeper.get("_target_") != _GRID


def check_sweeper(config: DictConfig) -> None:
    """Raises `UsageError` if the sweeper needs an objective and none is named."""
    if is_search(config) and not names_of(config):
        name = str(config.hydra.sweeper.get("_target_")).rpartition(".")[2]
        raise UsageError(
            f"the sweeper {name} chooses points by a number, and objective= does not say which: "
            "name a result, such as objective=linear_fast/feature4/top1, or several, "
            "objective=[A,B]"
        )


def check_names(config: DictConfig, kind: str) -> None:
    """Raises `UsageError` if a point runs no evaluation that gives the result `objective` names."""
    evaluations = [
        *chosen_evaluations(config, "eval"),
        *chosen_evaluations(config, "study"),
        *([_PRETEXT] if kind == "train" else []),
    ]
    for name in names_of(config):
        first = name.partition("/")[0]
        # Weights, batch norm and decoder may follow the evaluation's name, as in
        # knn_random_recalibrated.
        is_measured = any(first == one or first.startswith(f"{one}_") for one in evaluations)
        if not is_measured:
            raise UsageError(
                f"objective={name} is the result of no evaluation here: "
                f"eval= names {', '.join(map(str, evaluations))}"
            )


def objective_of(folder: Path, names: tuple[str, ...]) -> float | tuple[float, ...] | None:
    """Returns the results `names` of a finished point: one number, or a tuple of several.

    Raises:
        UsageError: there is no such result, or there are several, of different checkpoints or data.
    """
    try:
        rows = read_results(folder)
    except ValueError as error:
        raise UsageError(f"{error}: mend or remove it") from error
    values = tuple(_value(rows, name, folder) for name in names)
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def _value(rows: Sequence[Result], name: str, folder: Path) -> float:
    """Returns the value of the result `name` among the rows of a run folder."""
    named = [row for row in rows if row.tracked_name == name]
    # A name says no decoder if each point has one only, that of `decode=`.
    named = named or [row for row in rows if replace(row, decoder="").tracked_name == name]
    if not named:
        known = ", ".join(dict.fromkeys(row.tracked_name for row in rows)) or "none"
        raise UsageError(
            f"objective={name} is no result in {folder / RESULTS_FILE}, which has {known}"
        )
    measured_on = {(row.dataset, row.split, row.checkpoint) for row in named}
    if len(measured_on) > 1:
        raise UsageError(
            f"objective={name} has {quantity(len(measured_on), 'value')} "
            f"in {folder / RESULTS_FILE}, of "
            "several checkpoints or data sets: have each point evaluate one"
        )
    # A result that was measured again is appended: the last one counts.
    return named[-1].value
