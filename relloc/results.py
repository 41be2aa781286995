"""Result: one number, fully named. `results.jsonl` in the run folder is the truth; trackers mirror it."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5", "avgpool")
RESULTS_FILE = "results.jsonl"
NOT_OURS = ("random", "torchvision")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One measured number with everything needed to know what it means.

    `value`, `low` and `high` are percent for accuracies; `low` and `high` bound a 95 % confidence
    interval where one was computed. `n` counts the samples behind the number. `checkpoint` is a
    path, or "random" (initialization only), or "torchvision" (its supervised weights).
    `batch_norm` says which batch-norm statistics the backbone used: "as_trained" or
    "recalibrated". `protocol` names the published protocol and every deviation from it.
    """

    eval: str
    dataset: str
    split: str
    layer: str
    metric: str
    value: float
    n: int
    seed: int
    protocol: str
    checkpoint: str
    model: str
    batch_norm: str = "as_trained"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"layer is {self.layer!r}, not one of {', '.join(LAYERS)}")
        if self.n < 1:
            raise ValueError(f"n is {self.n}: a result needs at least one sample")

    @property
    def tracked_name(self) -> str:
        """Name for a tracker: `linear/feature4/top1`, `linear_random_recalibrated/feature4/top1`."""
        variant = f"_{self.checkpoint}" if self.checkpoint in NOT_OURS else ""
        variant += "_recalibrated" if self.batch_norm == "recalibrated" else ""
        place = self.eval + variant if self.eval == "pretext" else f"{self.eval}{variant}/{self.layer}"
        return f"{place}/{self.metric}"


def append_results(run_dir: Path, rows: Iterable[Result]) -> None:
    """Append rows to the run folder's results.jsonl, flushed to disk before returning."""
    with open(run_dir / RESULTS_FILE, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(run_dir: Path) -> Sequence[Result]:
    """Read the run folder's rows, oldest first; none if nothing was written yet.

    Raises:
        ValueError: a line is not a result of this version, with its line number.
    """
    path = run_dir / RESULTS_FILE
    if not path.exists():
        return []
    rows = []
    with open(path, encoding="utf-8") as file:  # by lines of the file: a path may hold what splitlines() splits at
        for number, line in enumerate(file, start=1):
            try:
                rows.append(Result(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} line {number} is not a result row: {error}") from error
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What an evaluation knows of a result; who was evaluated, on what, is added outside."""

    layer: str
    metric: str
    value: float
    n: int
    protocol: str
