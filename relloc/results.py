"""Result: one number, fully named. `results.jsonl` in the run folder is the truth; trackers mirror it."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from relloc.errors import DamagedFile, reason
from relloc.files import append_lines, read_lines

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5", "avgpool")
RESULTS_FILE = "results.jsonl"
NOT_OURS = ("random", "torchvision")
HEADLINES = ("top1", "map", "rankme")  # what evaluations are known by, but for those by number of something
# In each line of results.jsonl, beside the fields of a `Result`: which row of its batch it is, of how many
_NUMBER, _OF = "row", "rows"
_LOST = "Remove that line, or put back a copy of the file; what is missing is measured again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One measured number with everything needed to know what it means.

    `value`, `low` and `high` are percent for accuracies; `low` and `high` bound a 95 % confidence
    interval where one was computed. `n` counts the samples behind the number. `checkpoint` is a
    path, or "random" (initialization only), or "torchvision" (its supervised weights).
    `batch_norm` says which batch-norm statistics the backbone used: "as_trained" or
    "recalibrated". `protocol` names the published protocol and every deviation from it;
    `fingerprint` hashes all constants, the view and the images, so that a result already there is
    recognized. `measured_in` is the run folder that measured a row which was copied from there.
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
    fingerprint: str = ""
    measured_in: str = ""

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"layer is {self.layer!r}, not one of {', '.join(LAYERS)}")
        if not math.isfinite(self.value):
            raise ValueError(f"{self.eval} {self.layer} {self.metric} is {self.value}: not a number to report")
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
    """Append rows that belong together to the run folder's results.jsonl, on disk before returning.

    All or none are there afterwards, also for readers: each line says which of how many it is, so that rows of which a
    power cut left only the first ones are known as such. Raises `OSError`.
    """
    batch = [dataclasses.asdict(row) for row in rows]
    counted = [row | {_NUMBER: number, _OF: len(batch)} for number, row in enumerate(batch, start=1)]
    append_lines(run_dir / RESULTS_FILE, [json.dumps(row, ensure_ascii=False) for row in counted])


def read_results(run_dir: Path) -> Sequence[Result]:
    """Read the run folder's rows, oldest first, without those whose batch (see `append_results`) is not complete.

    Lines that say nothing of a batch, as those before 2026-11-29, are complete each for itself.

    Raises:
        DamagedFile: a line is not a result of this version, with its line number.
    """
    path = run_dir / RESULTS_FILE
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DamagedFile(
            f"{path} can't be read ({error.strerror}): put back a copy, or move it away, and all is measured again"
        ) from error
    rows: list[Result] = []
    begun: list[Result] = []  # of the batch that is being read
    size = 0
    for place, line in enumerate(lines, start=1):
        row, number, of = _parsed(line, f"{path} line {place}")
        if number != len(begun) + 1 or of != size:
            begun, size = [], of  # what was begun before was never finished
        if number == len(begun) + 1:
            begun.append(row)
        if len(begun) == size:
            rows += begun
            begun = []
    return rows


def _parsed(line: bytes, place: str) -> tuple[Result, int, int]:
    """A row, and which it is of how many of its batch."""
    try:
        fields = json.loads(line.decode("utf-8"))
        if not isinstance(fields, dict):
            raise TypeError("it has no named values")
        number, of = fields.pop(_NUMBER, 1), fields.pop(_OF, 1)
        row = Result(**fields)
        _check_types(row)
        if not isinstance(number, int) or not isinstance(of, int) or not 1 <= number <= of:
            raise ValueError(f"it is row {number} of {of}")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{place} is not a result row: {reason(error)}. {_LOST}") from error
    return row, number, of


def _check_types(row: Result) -> None:
    """Raises `TypeError` for a field of another kind, which JSON may hold and a dataclass takes."""
    for name, kind in _KINDS.items():
        value = getattr(row, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}")


def count_of(row: Result) -> int | None:
    """k of `top1_k20` or `map_k16`; None for a metric without."""
    found = re.fullmatch(r"[a-z0-9]+_k(\d+)", row.metric)
    return int(found[1]) if found else None


def headlines(rows: Sequence[Result]) -> list[Result]:
    """What each evaluation is known by; of metrics by number of neighbors, or of images, the one closest to 20."""
    closest: dict[str, int] = {}
    for row in rows:
        if (k := count_of(row)) is not None:
            closest[row.eval] = min(k, closest.get(row.eval, k), key=lambda k: abs(k - 20))
    return [row for row in rows if row.metric in HEADLINES or closest.get(row.eval, -1) == count_of(row)]


_KINDS = {
    **dict.fromkeys(("eval", "dataset", "split", "layer", "metric", "protocol", "checkpoint", "model"), str),
    **dict.fromkeys(("batch_norm", "fingerprint", "measured_in"), str),
    **dict.fromkeys(("n", "seed"), int),
    **dict.fromkeys(("value", "low", "high"), (int, float, type(None))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What an evaluation knows of a result; who was evaluated, on what, is added outside.

    `on_train`: measured on images of the training split, by cross-validation.
    """

    layer: str
    metric: str
    value: float
    n: int
    protocol: str
    on_train: bool = False
