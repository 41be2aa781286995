"""Defines `Result`, one measured number with all the facts needed to interpret it, and its file.

Each run folder has a `results.jsonl` with one result per line. This file is the source of truth:
MLflow and the reports only mirror it. Lines are appended and never changed.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from relloc.errors import DamagedFile, reason
from relloc.files import append_lines, parse_json, read_lines
from relloc.results_before import add_decoder, add_series, convert, mark_headlines

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5", "avgpool")
RESULTS_FILE = "results.jsonl"
# Values of `Result.checkpoint` that name weights which relloc did not pretrain.
REFERENCE_MODELS = ("random", "torchvision")
# Value of `Result.checkpoint` of numbers that a person gave, without any network.
PERSON = "person"
# Values of `Result.checkpoint` that are no files.
NO_FILES = (*REFERENCE_MODELS, PERSON)
KINDS = ("pretext", "frozen", "fine-tuned", "study")
# The `variant` of numbers whose hyperparameters were chosen without the test set, where the
# published protocol chooses them on it.
CHOSEN_WITHOUT_TEST = "chosen without the test set"
FORMAT = 2

# Keys that a line of results.jsonl has beside the fields of a `Result`: the version of its format,
# which row of its batch it is (from 1), and how many rows the batch has.
_FORMAT_KEY = "format"
_ROW_KEY = "row"
_ROW_COUNT_KEY = "rows"

_ADVICE = "Remove that line, or put back a copy of the file; what is missing is measured again"


def decoder_name(decode: str, *, on_gpu: bool) -> str:
    """Returns the `Result.decoder` of JPEGs under the setting `decode`, "cpu" or "device"."""
    # torchvision's decoder on a CPU is libjpeg too.
    return "nvJPEG" if decode == "device" and on_gpu else ""


def closest_to_20(counts: Iterable[int]) -> int:
    """Returns the count closest to 20, the first of them on a tie.

    It decides which number of neighbors (kNN), or of images per class (low-shot SVM), is the
    headline metric of its evaluation.
    """
    return min(counts, key=lambda count: abs(count - 20))


def known_interval(
    low: float | None, high: float | None, unit: str = "%"
) -> tuple[float, float] | None:
    """Returns the ends of an interval as far as it tells something, or else None.

    One of 0 to 100 % is stored where all images are of one source. One without width is stored
    where all sources gave the same number: it does not mean that others would give it, too.
    """
    if low is None or high is None:
        return None
    # Rounding alone may have made a width.
    has_width = not math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-9)
    covers_all = unit == "%" and low <= 0 and high >= 100
    return (low, high) if has_width and not covers_all else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Number:
    """The fields that a `Score` and a `Result` share; they are documented at `Result`."""

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
    """One number as an evaluation yields it. The runner adds model and data set to make a `Result`.

    Attributes:
        on_train: the number was measured on images of the training split, by cross-validation.
        dataset, split, view, batch_norm: of this number, as in a `Result`, where it was not
            measured on the evaluation's images, in its view, or under its batch norm; otherwise "".
        of_person: a person gave the number, and the model that is evaluated had no part in it: the
            result has the checkpoint `PERSON`, and no model.
    """

    on_train: bool = False
    of_person: bool = False
    dataset: str = ""
    split: str = ""
    view: str = ""
    batch_norm: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(_Number):
    """One measured number with everything needed to know what it means.

    What was measured:
        eval: the evaluation's name in the config. kind: one of `KINDS`.
        dataset, split: the images that the number was measured on. n: how many these are. seed.
        layer: the layer of the backbone; "" where there is none, as for a whole network.
        metric: its name. value: in `unit`, which is percent for accuracies.
        low, high: a 95 % confidence interval, where one was computed.
        higher_is_better: None where neither direction is better, or it is not known.
        headline: whether this is the number that the evaluation is known by.
        k: a number of neighbors, or of images per class, for metrics that are measured at several;
            series: the metric without this number, such as "top1" for "top1_k20".
        spread: "std", "min" or "max" of a number over random draws; "" for a number itself.
    Where it stands in reports:
        table, column: titles; a `table` of "" keeps the number out of all tables.
        variant: distinguishes lines of the same table, such as `CHOSEN_WITHOUT_TEST` or the layer.
    How it was measured:
        protocol: the id of the published protocol, a paragraph of docs/protocols.md such as "3.1".
        deviations: differences from that protocol, a sentence each.
        details: other facts, such as hyperparameters.
        choice: which hyperparameters were chosen, and on which split; "" if none were.
        view: how images were cropped and resized. precision: the number format.
        batch_norm: which statistics the backbone used, "as_trained" or "recalibrated".
        strides: "as_trained" if the backbone had strides of its own; "" for the standard ones.
        decoder: what decoded JPEGs, such as "nvJPEG"; "" for libjpeg, on the CPU.
    What it was measured of:
        checkpoint: a path, or "random" (weights as initialized), or "torchvision" (supervised), or
            "person" (a person answered, and there is no network).
        model: the name of the architecture, with settings of the backbone that differ from what
            the name stands for, such as "resnet50 width=2"; "" for a person.
        fingerprint: hash of all constants, view and images; equal ones are not measured again.
        measured_in: the run folder that this row was copied from, if it was.

    Raises:
        ValueError: an unknown layer or kind, a value that is not finite, or no sample.
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
    strides: str = ""
    decoder: str = ""
    fingerprint: str = ""
    measured_in: str = ""

    def __post_init__(self) -> None:
        if self.layer not in ("", *LAYERS):
            known = ", ".join(LAYERS)
            raise ValueError(
                f"The layer of a result is {self.layer!r}: it must be empty or one of {known}"
            )
        if self.kind not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(f"The kind of a result is {self.kind!r}: it must be one of {known}")
        if not math.isfinite(self.value):
            name = " ".join((self.eval, self.layer, self.metric))
            raise ValueError(
                f"The result {name} is {self.value}: only finite numbers can be reported"
            )
        if self.n < 1:
            raise ValueError(f"The n of a result is {self.n}: it must count at least one sample")

    @property
    def tracked_eval(self) -> str:
        """The evaluation's name in a tracker, such as `linear` or `linear_random_recalibrated`."""
        return tracked_eval(self.eval, self.checkpoint, self.batch_norm, self.strides, self.decoder)

    @property
    def tracked_name(self) -> str:
        """The metric's name in a tracker such as MLflow, unique among the results of a run.

        Examples: `linear/feature4/top1`, `linear_random_recalibrated/feature4/top1` and
        `pretext/top1`.
        """
        parts = (self.tracked_eval, self.layer, self.metric)
        return "/".join(part for part in parts if part)


def tracked_eval(
    evaluation: str, checkpoint: str, batch_norm: str, strides: str = "", decoder: str = ""
) -> str:
    """Returns the name in a tracker of an evaluation of `checkpoint` under `batch_norm`.

    `strides` and `decoder` are as in a `Result`.
    """
    name = evaluation
    if checkpoint in NO_FILES:
        name += f"_{checkpoint}"
    if batch_norm == "recalibrated":
        name += "_recalibrated"
    if strides == "as_trained":
        name += "_strides_as_trained"
    if decoder:
        name += f"_{decoder}"
    return name


def written_fields(row: Result) -> dict[str, Any]:
    """Returns the fields of a row as files have them.

    Most rows have no `strides` and no `decoder`. These are left out, so that earlier versions read
    such rows.
    """
    fields = dataclasses.asdict(row)
    for name in ("strides", "decoder"):
        if not fields[name]:
            del fields[name]
    return fields


def folder_of_files(evaluation: str, fingerprint: str) -> Path:
    """Returns where pictures and tables of an evaluation lie, relative to the run folder."""
    return Path("evaluations") / f"{evaluation}_{fingerprint}"


def append_results(run_dir: Path, rows: Iterable[Result]) -> None:
    """Appends a batch of rows to the run folder's results.jsonl; they are on disk when it returns.

    A batch is all or nothing, also for concurrent readers: each line says which row of how many it
    is, so `read_results` recognizes a batch of which a power cut left only the first lines.

    Raises:
        OSError: the file cannot be written.
    """
    batch = list(rows)
    lines = []
    for number, row in enumerate(batch, start=1):
        fields = {
            _FORMAT_KEY: FORMAT,
            **written_fields(row),
            _ROW_KEY: number,
            _ROW_COUNT_KEY: len(batch),
        }
        lines.append(json.dumps(fields, ensure_ascii=False))
    append_lines(run_dir / RESULTS_FILE, lines)


def read_results(run_dir: Path) -> Sequence[Result]:
    """Returns the run folder's rows, oldest first, without those of incomplete batches.

    Lines that do not mention a batch (older than 2026-11-29) count as batches of one. Lines of
    format 1 are converted by `relloc.results_before`. A missing file has no rows.

    Raises:
        DamagedFile: the file cannot be read, or a line is not a result of a known format; the
            message has the line's number.
    """
    path = run_dir / RESULTS_FILE
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DamagedFile(
            f"{path} can't be read ({error.strerror}): put back a copy of it, or move it away, and "
            "everything is measured again"
        ) from error
    rows: list[Result] = []
    batch: list[Result] = []  # rows of the batch that is being read
    batch_size = 0
    has_old_format = False
    for line_number, text in enumerate(lines, start=1):
        line = _parse_line(text, f"{path} line {line_number}")
        has_old_format |= line.format < FORMAT
        # A line that does not continue the batch shows that the batch was never finished: its rows
        # are dropped, and the line counts only if it is the first of a batch itself.
        continues = line.number == len(batch) + 1 and line.count == batch_size
        if not continues:
            batch = []
            batch_size = line.count
        if line.number == len(batch) + 1:
            batch.append(line.result)
        if len(batch) == batch_size:
            rows += batch
            batch = []
    # Format 1 did not say which row is the headline of its evaluation.
    return mark_headlines(rows) if has_old_format else rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    """A parsed line of results.jsonl: a result, and which row of how many in its batch it is."""

    result: Result
    number: int  # from 1
    count: int
    format: int  # of the line as it was read


def _parse_line(line: bytes, location: str) -> _Line:
    """Parses one line of results.jsonl; `location` names file and line in error messages."""
    problem = f"{location} is not a result row"
    # A path on Linux is bytes and need not be UTF-8; older versions wrote such bytes as they were.
    text = line.decode("utf-8", "replace")
    fields = parse_json(text.encode(), dict[str, Any], problem, _ADVICE)

    # The bookkeeping keys are not fields of a `Result`.
    version = fields.pop(_FORMAT_KEY, 1)
    number = fields.pop(_ROW_KEY, 1)
    count = fields.pop(_ROW_COUNT_KEY, 1)
    try:
        if version not in (1, FORMAT):
            raise ValueError(
                f"its format is {version}, "
                f"and this version of relloc knows no format above {FORMAT}"
            )
        are_whole = isinstance(number, int) and isinstance(count, int)
        if not are_whole or not 1 <= number <= count:
            raise ValueError(f"it says that it is row {number} of {count}")
        fields = convert(fields) if version == 1 else add_decoder(add_series(fields))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedFile(f"{problem}: {reason(error)}. {_ADVICE}") from error

    # Back to JSON, so that pydantic checks the fields as strictly as it does when it parses a file.
    as_json = json.dumps(fields).encode()
    result: Result = parse_json(as_json, Result, problem, _ADVICE)
    return _Line(
        result=result,
        number=number,
        count=count,
        format=version,
    )
