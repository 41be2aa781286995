"""The number that a sweeper which searches is told of a point: a result that `objective` names."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from relloc.errors import UsageError
from relloc.results import RESULTS_FILE, Result, read_results

_GRID = (
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # Hydra's own, which wants no numbers
)
_NO_EVALUATION = "pretext"  # measured by each pretraining itself


def names_of(config: DictConfig) -> tuple[str, ...]:
    """The results that `objective` names; none where it is null. Raises `UsageError` for what is no name."""
    asked = config.get("objective")
    names = list(asked) if isinstance(asked, ListConfig) else [] if asked is None else [asked]
    if any(not isinstance(name, str) or not name.strip() for name in names):
        raise UsageError(
            f"objective={asked} names no result: give one such as linear_fast/feature4/top1"
        )
    return tuple(names)


def is_search(config: DictConfig) -> bool:
    """Whether the sweeper chooses points as it goes, by the numbers of earlier ones."""
    return config.hydra.sweeper.get("_target_") != _GRID


def check_sweeper(config: DictConfig) -> None:
    """Raises `UsageError` where the sweeper wants a number of each point and none is named."""
    if is_search(config) and not names_of(config):
        name = str(config.hydra.sweeper.get("_target_")).rpartition(".")[2]
        raise UsageError(
            f"the sweeper {name} chooses points by a number, and objective= does not say which: "
            "name a result, such as objective=linear_fast/feature4/top1, or several, objective=[A,B]"
        )


def check_names(config: DictConfig, kind: str) -> None:
    """Raises `UsageError` where a point runs no evaluation that could give what `objective` names."""
    evaluations = [*(config.eval or {}), *([_NO_EVALUATION] if kind == "train" else [])]
    for name in names_of(config):
        of = name.partition("/")[0]
        # Behind the evaluation's name may stand whose weights, and which batch norm: knn_random_recalibrated
        if not any(of == one or of.startswith(f"{one}_") for one in evaluations):
            raise UsageError(
                f"objective={name} is the result of no evaluation here: eval= names {', '.join(map(str, evaluations))}"
            )


def objective_of(folder: Path, names: tuple[str, ...]) -> float | tuple[float, ...] | None:
    """The value that a finished point has for `names`, as a sweeper reads it: one number, or a tuple of several.

    Raises:
        UsageError: a name that none of its results has, or results of several checkpoints or data sets.
    """
    try:
        rows = read_results(folder)
    except ValueError as error:
        raise UsageError(f"{error}: mend or remove it") from error
    values = tuple(_value(rows, name, folder) for name in names)
    return None if not values else values[0] if len(values) == 1 else values


def _value(rows: Sequence[Result], name: str, folder: Path) -> float:
    named = [row for row in rows if row.tracked_name == name]
    if not named:
        known = ", ".join(dict.fromkeys(row.tracked_name for row in rows)) or "none"
        raise UsageError(
            f"objective={name} is no result in {folder / RESULTS_FILE}, which has {known}"
        )
    of = {(row.dataset, row.split, row.checkpoint) for row in named}
    if len(of) > 1:
        raise UsageError(
            f"objective={name} has {len(of)} values in {folder / RESULTS_FILE}, of several checkpoints or data sets: "
            "have each point evaluate one"
        )
    return named[-1].value  # measured anew, the last stands
