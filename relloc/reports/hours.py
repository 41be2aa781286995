"""The hours that each row of the card takes, as they were measured, with hardware and date.

They are lines of hours.csv, which `python benchmarks/card.py --record relloc/reports/hours.csv`
writes. A row that nobody has measured has no line.
"""

import csv
import dataclasses
import datetime
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relloc.files import write_whole
from relloc.reports.published import card_parts

PRETRAINING = "pretraining"  # the row of the training itself, which is no evaluation
HOURS_FILE = Path(__file__).with_name("hours.csv")
_LIMITS = ("", "computing", "reading")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredHours:
    """How long a row of the card takes with its full data sets and schedules; a line of hours.csv.

    Attributes:
        row: The name of the evaluation in conf/eval, or `PRETRAINING`.
        hours: The rate that was measured over seconds, times the work of the whole row.
        limited_by: "computing" or "reading" images, whichever was slower; "" where none is read,
            or where the GPU that computes decodes them, too.
        leaves_out: What the hours do not include, such as "tests"; "" for nothing.
        hardware: The GPU and the number of processor cores.
        date: When it was measured, such as 2026-11-29.
        source: The command and commit that measured it, or the page that has it.

    Raises:
        ValueError: A field has a value that it can't have.
    """

    row: str
    hours: float
    limited_by: str
    leaves_out: str
    hardware: str
    date: str
    source: str

    def __post_init__(self) -> None:
        if self.row not in rows_of_card():
            raise ValueError(f"row is {self.row!r}, not one of {', '.join(rows_of_card())}")
        if not self.hours > 0:
            raise ValueError(f"hours of {self.row} are {self.hours}, not a number above 0")
        if self.limited_by not in _LIMITS:
            raise ValueError(f"limited_by is {self.limited_by!r}, not one of {_LIMITS}")
        if not self.hardware:
            raise ValueError(f"hardware of {self.row} is empty: hours say nothing without it")
        datetime.date.fromisoformat(self.date)

    def __str__(self) -> str:
        without = f" without {self.leaves_out}" if self.leaves_out else ""
        return f"{_duration(self.hours)}{without} on {self.hardware} ({self.date})"


def _duration(hours: float) -> str:
    """Returns a duration in hours, minutes or seconds, whichever is easiest to read."""
    if hours >= 1:
        return f"{hours:.3g} h"
    if hours >= 1 / 60:
        return f"{60 * hours:.2g} min"
    return f"{3600 * hours:.2g} s"


@functools.cache
def measured_hours() -> dict[str, MeasuredHours]:
    """Returns the hours by row, of the rows that were measured."""
    return read_hours(HOURS_FILE)


def read_hours(path: Path) -> dict[str, MeasuredHours]:
    """Returns the lines of a file such as hours.csv by row."""
    by_row = {}
    for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        typed: dict[str, Any] = dict(line)
        typed["hours"] = float(line["hours"])
        by_row[line["row"]] = MeasuredHours(**typed)
    return by_row


def record_hours(path: Path, measured: Sequence[MeasuredHours]) -> None:
    """Writes lines into a file such as hours.csv, in place of those of the same rows.

    Other lines stay. Lines are in the order of the card, with the pretraining first.
    """
    by_row = read_hours(path) if path.exists() else {}
    by_row |= {each.row: each for each in measured}
    names = [field.name for field in dataclasses.fields(MeasuredHours)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows_of_card():
        if row in by_row:
            line = dataclasses.asdict(by_row[row])
            # Three digits are more than a rate of some seconds is worth
            line["hours"] = f"{by_row[row].hours:.3g}"
            writer.writerow(line)
    write_whole(path, text.getvalue().encode("utf-8"))


def rows_of_card() -> list[str]:
    """Returns the rows that have hours: the pretraining, then evaluations in the card's order."""
    evaluations = [part.evaluation for part in card_parts() if part.evaluation]
    return [PRETRAINING, *evaluations]


def hours_text(row: str, estimate: str) -> str:
    """Returns how long a row takes as it was measured, else its estimate, marked as such.

    `estimate` is the field `hours` of the row in card.csv; "" is returned where that is empty too.
    """
    if row in measured_hours():
        return str(measured_hours()[row])
    return f"about {estimate} h on one GPU (an estimate)" if estimate else ""
