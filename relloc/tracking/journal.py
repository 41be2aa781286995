"""journal.jsonl: every metric of a run, one JSON line per step, written before any tracker sees it.

A line is {"time_ms": Unix milliseconds, "step": int, "metrics": {name: value}}. JSON has no nan and
no infinities: they are written as the strings "nan", "inf" and "-inf". system.jsonl is another one, of the machine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from relloc.errors import DamagedFile, reason
from relloc.files import append_lines, read_lines
from relloc.tracking.record import legal_name, now_ms

JOURNAL_FILE = "journal.jsonl"
SYSTEM_FILE = "system.jsonl"
_LOST = "Remove that line, or put back a copy of the file; no weights and no results depend on it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the journal: the metrics of a step and when they were logged (Unix ms)."""

    time_ms: int
    step: int
    metrics: dict[str, float]


class Journal:
    """The journal of a run folder, open for more. Only one process of a run may write it.

    On a journal that is already there (a resumed run) a half-written last line is cut off, and
    values of steps that a metric already has are left out. The steps of one metric only grow.
    """

    def __init__(self, run_dir: Path, file: str = JOURNAL_FILE) -> None:
        self._path = run_dir / file
        self._last_step: dict[str, int] = {}
        for entry in read_journal(run_dir, file=file):
            self._remember(entry)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of a step and hand them to the operating system before returning.

        Raises:
            ValueError: a name has characters that trackers refuse.
        """
        if illegal := [name for name in metrics if legal_name(name) != name]:
            raise ValueError(f"metric names {illegal}: only letters, digits and _ - . : / space are allowed")
        fresh = {name: float(value) for name, value in metrics.items() if self._is_new(name, step)}
        if not fresh:
            return
        entry = Entry(time_ms=now_ms(), step=step, metrics=fresh)
        append_lines(self._path, [_to_json(entry)], durable=False)  # training does not wait for the disk
        self._remember(entry)

    def _is_new(self, name: str, step: int) -> bool:
        return name not in self._last_step or step > self._last_step[name]

    def _remember(self, entry: Entry) -> None:
        self._last_step.update(dict.fromkeys(entry.metrics, entry.step))


def read_journal(run_dir: Path, first_line: int = 0, file: str = JOURNAL_FILE) -> list[Entry]:
    """Read the journal from a line (counted from 0) on; a last line still being written is left out.

    Raises:
        DamagedFile: a complete line is not a journal entry, with its line number (counted from 1).
    """
    path = run_dir / file
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DamagedFile(f"{path} can't be read ({error.strerror}): put back a copy, or move it away") from error
    return [
        _from_json(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if number > first_line
    ]


def _to_json(entry: Entry) -> str:
    metrics = {name: v if math.isfinite(v) else str(v) for name, v in entry.metrics.items()}
    line = {"time_ms": entry.time_ms, "step": entry.step, "metrics": metrics}
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


def _from_json(line: bytes, place: str) -> Entry:
    try:
        fields = json.loads(line.decode("utf-8"))
        if not isinstance(fields, dict) or not isinstance(fields["metrics"], dict):
            raise TypeError("it has no named values")
        metrics = {str(name): float(value) for name, value in fields["metrics"].items()}
        if not isinstance(fields["time_ms"], int) or not isinstance(fields["step"], int):
            raise TypeError("time_ms and step have to be whole numbers")
        return Entry(time_ms=fields["time_ms"], step=fields["step"], metrics=metrics)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{place} is not a journal entry: {reason(error)}. {_LOST}") from error
