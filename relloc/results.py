"""Result: one number, fully named. `results.jsonl` in the run folder is the truth; trackers mirror it."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from relloc.errors import DamagedFile, reason
from relloc.files import append_lines, parse_json, read_lines
from relloc.results_before import convert, mark_headlines, with_series

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5", "avgpool")
RESULTS_FILE = "results.jsonl"
NOT_OURS = ("random", "torchvision")
KINDS = ("pretext", "frozen", "fine-tuned", "study")
CHOSEN = "chosen without the test set"  # the variant of numbers whose settings were chosen so, unlike the published
FORMAT = 2
# Each line of results.jsonl has, beside the fields of a `Result`, its format, and which row it is of how many of its
# batch
_FORMAT, _NUMBER, _OF = "format", "row", "rows"
_LOST = "Remove that line, or put back a copy of the file; what is missing is measured again"


def closest_to_20(counts: Iterable[int]) -> int:
    """Which number of neighbors, or of images a class, the headline metric has: the first of those closest to 20."""
    return min(counts, key=lambda count: abs(count - 20))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Number:
    """What an evaluation knows of a number that it measured."""

    metric: str
    value: float
    n: int
    layer: str = ""
    table: str = ""
    column: str = ""
    variant: str = ""
    unit: str = "%"
    higher_is_better: bool | None = True
    headline: bool = False
    low: float | None = None
    high: float | None = None
    protocol: str = ""
    deviations: tuple[str, ...] = ()
    choice: str = ""
    details: tuple[str, ...] = ()
    series: str = ""
    k: int | None = None
    spread: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(_Number):
    """A number as an evaluation yields it; see `Result` for its fields. Who was evaluated, on what, is added outside.

    `on_train`: measured on images of the training split, by cross-validation.
    """

    on_train: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(_Number):
    """One measured number with everything needed to know what it means.

    What was measured:
        eval: the evaluation's name in the config. kind: one of `KINDS`.
        dataset, split: the images; n: how many samples are behind the number; seed.
        layer: of the backbone; "" where there is none, as of a whole network.
        metric, unit: percent for accuracies; value: in this unit.
        low, high: a 95 % confidence interval, where one was computed.
        higher_is_better: None where neither is, or it is not known.
        headline: whether it is what the evaluation is known by.
        series, k: the metric without its k, of numbers that are measured at several k, such as the number of neighbors.
        spread: "std", "min" or "max" of a number over draws; "" for a number itself.
    Where it stands in reports:
        table, column: titles; table is "" for a detail that stands in none.
        variant: what sets its line apart from others in the same columns, such as `CHOSEN` or the layer.
    How it was measured:
        protocol: the id of the published protocol, such as "3.1".
        deviations: from it, a sentence each. details: other facts, such as constants.
        choice: what was chosen on which split; "" if nothing was.
        view, precision: how images were seen, and the number format.
        batch_norm: which statistics the backbone used, "as_trained" or "recalibrated".
    Of what:
        checkpoint: a path, or "random" (initialization only), or "torchvision" (its supervised weights); model.
        fingerprint: hash of all constants, view and images, by which a result that is already there is recognized.
        measured_in: the run folder that measured a row which was copied from there.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    eval: str
    dataset: str
    split: str
    seed: int
    checkpoint: str
    model: str
    kind: str = "frozen"
    view: str = ""
    precision: str = ""
    batch_norm: str = "as_trained"
    fingerprint: str = ""
    measured_in: str = ""

    def __post_init__(self) -> None:
        if self.layer not in ("", *LAYERS):
            raise ValueError(f"layer is {self.layer!r}, neither empty nor one of {', '.join(LAYERS)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, not one of {', '.join(KINDS)}")
        if not math.isfinite(self.value):
            raise ValueError(f"{self.eval} {self.layer} {self.metric} is {self.value}: not a number to report")
        if self.n < 1:
            raise ValueError(f"n is {self.n}: a result needs at least one sample")

    @property
    def tracked_eval(self) -> str:
        """What names for a tracker begin with: `linear`, `linear_random_recalibrated`."""
        name = self.eval
        if self.checkpoint in NOT_OURS:
            name += f"_{self.checkpoint}"
        if self.batch_norm == "recalibrated":
            name += "_recalibrated"
        return name

    @property
    def tracked_name(self) -> str:
        """Name for a tracker: `linear/feature4/top1`, `linear_random_recalibrated/feature4/top1`, `pretext/top1`."""
        return "/".join(filter(None, (self.tracked_eval, self.layer, self.metric)))


def append_results(run_dir: Path, rows: Iterable[Result]) -> None:
    """Append rows that belong together to the run folder's results.jsonl, on disk before returning.

    All or none are there afterwards, also for readers: each line says which of how many it is, so that rows of which a
    power cut left only the first ones are known as such. Raises `OSError`.
    """
    batch = list(rows)
    lines = []
    for number, row in enumerate(batch, start=1):
        fields = {_FORMAT: FORMAT, **dataclasses.asdict(row), _NUMBER: number, _OF: len(batch)}
        lines.append(json.dumps(fields, ensure_ascii=False))
    append_lines(run_dir / RESULTS_FILE, lines)


def read_results(run_dir: Path) -> Sequence[Result]:
    """Read the run folder's rows, oldest first, without those whose batch (see `append_results`) is not complete.

    Lines that say nothing of a batch, as those before 2026-11-29, are complete each for itself. Lines of the format
    before are converted, see `relloc.results_before`.

    Raises:
        DamagedFile: a line is not a result of a known format, with its line number.
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
    is_of_before = False
    for place, line in enumerate(lines, start=1):
        row, number, of, form = _parsed(line, f"{path} line {place}")
        is_of_before |= form < FORMAT
        if number != len(begun) + 1 or of != size:
            begun, size = [], of  # what was begun before was never finished
        if number == len(begun) + 1:
            begun.append(row)
        if len(begun) == size:
            rows += begun
            begun = []
    return mark_headlines(rows) if is_of_before else rows


def _parsed(line: bytes, place: str) -> tuple[Result, int, int, int]:
    """A row, which it is of how many of its batch, and the format of its line."""
    problem = f"{place} is not a result row"
    text = line.decode("utf-8", "replace")  # paths were once written with any bytes
    fields = parse_json(text.encode(), dict[str, Any], problem, _LOST)
    form, number, of = fields.pop(_FORMAT, 1), fields.pop(_NUMBER, 1), fields.pop(_OF, 1)
    try:
        if form not in (1, FORMAT):
            raise ValueError(f"its format is {form}, and this version of relloc knows no format above {FORMAT}")
        if not isinstance(number, int) or not isinstance(of, int) or not 1 <= number <= of:
            raise ValueError(f"it is row {number} of {of}")
        fields = convert(fields) if form == 1 else with_series(fields)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedFile(f"{problem}: {reason(error)}. {_LOST}") from error
    return parse_json(json.dumps(fields).encode(), Result, problem, _LOST), number, of, form
